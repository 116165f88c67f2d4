"""What tests of tools share."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("chatml")


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=tokenizer)


VLLM_VARIABLE = "LIGHTNING_QLORA_VLLM_PYTHON"

_ASK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    lora = {"enable_lora": True, "max_lora_rank": 16} if job["adapter"] else {}
    llm = LLM(job["model"], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4, **lora)
    answers = llm.generate(
        [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]],
        SamplingParams(temperature=0, max_tokens=job["max_new_tokens"]),
        lora_request=LoRARequest("adapter", 1, job["adapter"]) if job["adapter"] else None,
    )
    with open(job["output"], "w") as file:
        json.dump([list(answer.outputs[0].token_ids) for answer in answers], file)
"""


@pytest.fixture
def ask_vllm(tmp_path):
    """The tokens that vLLM answers each prompt with, greedily, from a model's folder and perhaps an adapter's.

    vLLM asks for other versions than this project, so it may live in an environment of its own, named by a variable.
    """
    python = os.environ.get(VLLM_VARIABLE) or (sys.executable if importlib.util.find_spec("vllm") else None)
    if python is None:
        pytest.skip(f"vLLM is not installed here, and {VLLM_VARIABLE} names no Python that has it")
    script = tmp_path / "ask_vllm.py"
    script.write_text(_ASK_VLLM, encoding="utf-8")

    def ask(model, prompts, *, adapter=None, max_new_tokens=16):
        output = tmp_path / "vllm.json"
        output.unlink(missing_ok=True)
        job = {"model": str(model), "adapter": adapter and str(adapter), "prompts": prompts, "output": str(output)}
        job["max_new_tokens"] = max_new_tokens
        quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(tmp_path / "vllm"), "VLLM_CPU_KVCACHE_SPACE": "1"}
        ran = subprocess.run(
            [python, str(script), json.dumps(job)], env=os.environ | quiet, cwd=tmp_path, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
        return json.loads(output.read_text())

    return ask
