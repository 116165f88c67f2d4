from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_tokenizer

import lightning_qlora.data
from lightning_qlora.data import preparation, workers
from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.data.lines import JsonLine, RowParser
from lightning_qlora.data.preparation import CHUNK_ROWS, prepare
from lightning_qlora.schema import Completion, Conversation, Message, Origin, PreferenceRow, UnpairedRow

ROOT = Path(lightning_qlora.data.__file__).parents[2]

ROWS = 2 * CHUNK_ROWS + 1
"""The fewest rows of a few words that workers are started for."""

ENCODERS = """
import os
import sys

from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.schema import RowRefused


class Telling(RowEncoder):
    def fit(self, rows, max_length):
        fitted = super().fit(rows, max_length)
        print("This is no result.", flush=True)
        detail = f"{os.getpid()} {os.environ['TOKENIZERS_PARALLELISM']} " + " ".join(sys.modules)
        refusal = RowRefused("told", detail, rows[0].origin)
        return [fitted[0]._replace(result=refusal), *fitted[1:]]


class Raising(RowEncoder):
    def fit(self, rows, max_length):
        raise KeyError("the ninth column")


class Dying(RowEncoder):
    def fit(self, rows, max_length):
        os._exit(9)
"""


@pytest.fixture
def encoders(tmp_path, monkeypatch):
    """Encoders of a module that needs little, as those that workers encode with."""
    (tmp_path / "some_encoders.py").write_text(ENCODERS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("some_encoders")
    del sys.modules["some_encoders"]


@pytest.fixture
def started(monkeypatch) -> list[subprocess.Popen]:
    """The processes of the workers that were started."""
    processes = []

    class Remembered(subprocess.Popen):
        def __init__(self, command, **options):
            super().__init__(command, **options)
            if command[-1] == workers._START:
                processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Remembered)
    return processes


def chat() -> ChatTemplate:
    return ChatTemplate(tiny_tokenizer())


def write_chats(path: Path, count: int) -> Path:
    rows = [{"prompt": f"Question {i}", "completion": "yes " * (1 + i % 5)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chunk(source: str, count: int = 2) -> list[Conversation]:
    turns = (Message("user", "hi"), Message("assistant", "yes"))
    return [Conversation(turns, Origin(source, line)) for line in range(1, count + 1)]


def test_workers_import_what_encodes_and_no_more(encoders):
    show = "import sys; from transformers import PreTrainedTokenizerFast; print(*sys.modules)"
    tokenizers_modules = set(subprocess.check_output([sys.executable, "-c", show], text=True).split())  # 5.17: torch
    chunks = [(part, chunk(f"{part}.jsonl")) for part in range(6)]
    told = [c.report.examples[0] for c in workers.encode_in_workers(chunks, encoders.Telling(chat()), 2)]
    assert [example["place"] for example in told] == [f"{part}.jsonl:1" for part in range(6)]
    assert len({example["detail"].split()[0] for example in told}) <= 2
    for example in told:
        _, parallelism, *modules = example["detail"].split()
        assert parallelism == "false"
        assert {"lightning_qlora.data.encoding", "transformers", "pyarrow"} < set(modules)
        heavy = {"torch", "lightning", "peft", "bitsandbytes", "datasets", "pandas"}
        assert heavy.intersection(modules) <= tokenizers_modules


def test_an_error_is_raised_where_the_rows_were_asked_for(encoders, started):
    with pytest.raises(KeyError, match="the ninth column") as error:
        list(workers.encode_in_workers([(0, chunk("a"))] * 9, encoders.Raising(chat()), 2))
    (note,) = error.value.__notes__
    assert "In a process that prepares rows:" in note
    assert "some_encoders.py" in note
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)


def test_a_worker_that_dies_is_said(encoders, started):
    with pytest.raises(RuntimeError, match=r"has ended by itself \(exit code 9\).* lower num_proc"):
        list(workers.encode_in_workers([(0, chunk("a"))] * 9, encoders.Dying(chat()), 2))
    assert all(process.returncode is not None for process in started)


def test_workers_end_with_whoever_asked(started):
    encoded = workers.encode_in_workers([(0, chunk("a"))] * 9, RowEncoder(chat()), 2)
    assert next(encoded).batch.columns.num_rows == 2
    assert [process.poll() for process in started] == [None, None]
    encoded.close()
    assert all(process.returncode is not None for process in started)


def test_no_more_are_started_than_there_are_chunks(started):
    chunks = [(0, chunk("a", 3)), (1, chunk("b", 5)), (1, [])]
    encoded = list(workers.encode_in_workers(chunks, RowEncoder(chat()), 8))
    assert [(c.part, c.report.rows_kept, c.batch.columns.num_rows) for c in encoded] == [
        (0, 3, 3),
        (1, 5, 5),
        (1, 0, 0),
    ]
    assert [c.batch.sources for c in encoded] == [["a"], ["b"], []]
    assert len(started) == 3


def test_few_rows_start_no_workers(tmp_path, started):
    few = write_chats(tmp_path / "few.jsonl", ROWS - 1)
    many = write_chats(tmp_path / "many.jsonl", ROWS)
    here = prepare(str(few), RowEncoder(chat()), cache_dir=tmp_path, num_proc=2)
    assert len(here.documents) == ROWS - 1
    assert not started
    prepare(str(many), RowEncoder(chat()), cache_dir=tmp_path, num_proc=2)
    assert len(started) == 2


def test_few_long_rows_start_workers(tmp_path, started, monkeypatch):
    monkeypatch.setattr(preparation, "CHUNK_CHARACTERS", 100)
    path = write_chats(tmp_path / "rows.jsonl", 30)
    there = prepare(str(path), RowEncoder(chat()), cache_dir=tmp_path / "two", num_proc=2)
    assert len(started) == 2
    here = prepare(str(path), RowEncoder(chat()), cache_dir=tmp_path / "one")
    assert there.documents.path.read_bytes() == here.documents.path.read_bytes()
    assert len(here.documents) == 30


SCRIPT = """
import pickle
import sys

from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.data.workers import encode_in_workers

print("imported")


class Halving(RowEncoder):
    def fit(self, rows, max_length):
        return super().fit(rows[: len(rows) // 2], max_length)


def run(encoder):
    with open(sys.argv[1], "rb") as file:
        chat, rows = pickle.load(file)
    chunks = encode_in_workers([(0, rows)] * 2, encoder(chat), 2)
    print(*(chunk.batch.columns.num_rows for chunk in chunks))


"""


@pytest.mark.parametrize(
    ("call", "printed", "imported_again"),
    [
        ("run(RowEncoder)", ["imported", "4", "4"], 0),
        ("if __name__ == '__main__':\n    run(Halving)", ["imported", "2", "2"], 2),
    ],
)
def test_the_main_module_is_imported_only_for_encoders_of_its_own(tmp_path, call, printed, imported_again):
    (tmp_path / "script.py").write_text(SCRIPT + call)
    (tmp_path / "chats").write_bytes(pickle.dumps((chat(), chunk("a", 4))))
    done = subprocess.run(
        [sys.executable, "script.py", "chats"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.split() == printed, done.stderr
    assert done.stderr.count("imported") == imported_again  # what a worker prints


def test_a_prepared_set_is_read_without_pandas(tmp_path):
    path = write_chats(tmp_path / "rows.jsonl", 3)
    documents = prepare(str(path), RowEncoder(chat()), cache_dir=tmp_path).documents
    (tmp_path / "documents").write_bytes(pickle.dumps(documents))
    script = """
import pickle, sys
documents = pickle.load(open(sys.argv[1], "rb"))
print(len(documents), *documents.parts, documents.origin(2).line)
print({"pandas", "torch"}.intersection(sys.modules))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "documents")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["3 0 0 0 3", "set()"]


MESSAGE = Message("assistant", "", "why", ({"name": "f", "arguments": {"x": 1}},), "call", "f", train=True)
ORIGIN = Origin("a", 3)


@pytest.mark.parametrize(
    "row",
    [
        Completion("a", "b", ORIGIN),
        Conversation((MESSAGE, Message("user", "\ud800")), ORIGIN, ({"name": "f"},), {"think": False}),
        PreferenceRow((MESSAGE,), (MESSAGE, MESSAGE), (), ORIGIN, ({},), {"x": 1}),
        UnpairedRow((), (MESSAGE,), False, ORIGIN),
        JsonLine(b'{"a": "\xff"}', ORIGIN, RowParser("auto", {"prompt": "a"}, "sft")),
    ],
)
def test_rows_arrive_as_they_were(row):
    sent = workers._pickled((2, [row, row]))
    assert pickle.loads(sent) == (2, [row, row])
    assert len(sent) <= len(pickle.dumps((2, [row, row])))
