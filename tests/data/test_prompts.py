from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_qlora.data.prompts import read_prompts


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_prompts_and_messages_are_read(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    path = write(
        tmp_path / "q.jsonl",
        {"prompt": "Hi"},
        "",
        {"prompt": "Hi", "system": "Be brief.", "id": 7},
        {"messages": chat, "tools": [{"name": "f"}]},
    )
    first, second, third = read_prompts(path)
    assert [(m.role, m.content) for m in first.messages] == [("user", "Hi")]
    assert [(m.role, m.content) for m in second.messages] == [("system", "Be brief."), ("user", "Hi")]
    assert second.row["id"] == 7
    assert second.origin.line == 3
    assert [m.content for m in third.messages] == ["a", "b", "c"]
    assert third.tools[0]["function"]["name"] == "f"


def test_null_counts_as_absent(tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    path = write(tmp_path / "q.jsonl", {"prompt": "Hi", "messages": None}, {"prompt": None, "messages": chat})
    first, second = read_prompts(path)
    assert first.messages == second.messages


def test_a_reference_answer_is_not_shown(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "secret"}]
    (prompt,) = read_prompts(write(tmp_path / "q.jsonl", {"messages": turns}))
    assert [m.content for m in prompt.messages] == ["a"]
    assert prompt.row["messages"] == turns


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "broken-json"),
        ("[1]", "unknown-shape"),
        ({"question": "x"}, "unknown-shape"),
        ({"prompt": "x", "messages": []}, "unknown-shape"),
        ({"messages": None}, "unknown-shape: the line is an object with the keys 'messages'; allowed"),
        ({"prompt": None, "messages": None}, "unknown-shape"),
        ({"prompt": "  "}, "empty-user-turn"),
        ({"prompt": 3}, "content-not-text"),
        ({"messages": [{"role": "system", "content": "x"}]}, "no-prompt"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown-role"),
    ],
)
def test_what_is_no_question_is_named_with_its_line(tmp_path, row, message):
    path = write(tmp_path / "q.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(ValueError, match=rf"q.jsonl:2 is no question: {message}"):
        read_prompts(path)


def test_no_file_and_no_question(tmp_path):
    with pytest.raises(ValueError, match="There is no file of questions"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no question"):
        read_prompts(write(tmp_path / "q.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="latin.jsonl:1 is no question"):
        read_prompts(tmp_path / "latin.jsonl")
