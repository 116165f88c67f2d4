"""Fixed questions in JSONL files, with the check by which an answer is judged."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from lightning_qlora.data.messages import parse_messages
from lightning_qlora.data.prompts import Prompt, read_prompts
from lightning_qlora.schema import Message, Origin

__all__ = ["CHECKS", "NOT_JSON", "Check", "Question", "last_number", "parse_json", "read_questions", "schema_validator"]

Check: TypeAlias = Literal["exact", "json", "json-schema", "contains", "regex", "numeric"]
CHECKS: tuple[Check, ...] = get_args(Check)

NOT_JSON = object()
"""What :func:`parse_json` returns for text that is not JSON (``None`` is JSON's ``null``)."""

_KEYS = frozenset(
    {"id", "messages", "prompt", "system", "reference", "check", "expect", "tolerance", "tags", "tools", "metadata"}
)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass(frozen=True, slots=True)
class Question:
    """One fixed question.

    Attributes:
        id: Names the question in every table; unique in its file.
        messages: What the model is shown, ending with a turn that is not the assistant's.
        origin: Where it was read.
        reference: The answer a person would give.
        check: How an answer is judged (``scores.score_answer``); ``None`` shows the answer without a verdict.
        expect: What the check compares with where that is not the reference: a regular expression, the text or texts
            that must be contained, a number, or a JSON schema.
        tolerance: Largest absolute difference that ``numeric`` accepts.
        tags: Groups that the question belongs to.
        tools: JSON schemas of the functions offered to the assistant.
    """

    id: str
    messages: tuple[Message, ...]
    origin: Origin
    reference: str | None = None
    check: Check | None = None
    expect: Any = None
    tolerance: float = 0.0
    tags: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def wanted(self) -> Any:
        """What the check compares with: ``expect`` where it is given, else the reference."""
        return self.reference if self.expect is None else self.expect


def read_questions(path: str | Path) -> list[Question]:
    r"""Read a JSONL file of questions.

    Each line is an object with ``messages`` (or ``prompt`` and, if wanted, ``system``) and optionally ``id``,
    ``reference``, ``check``, ``expect``, ``tolerance``, ``tags``, ``tools`` and ``metadata``. Without ``check`` an
    answer must equal the reference. Messages that end with an assistant turn carry the reference in it::

        {"id": "capital", "prompt": "What is the capital of Peru?", "expect": "Lima", "check": "contains"}
        {"id": "ticket-7", "messages": [...], "reference": "{\"product\": ...}", "check": "json", "tags": ["typos"]}

    Args:
        path: The file.

    Raises:
        ValueError: If there is no such file, it holds no question, or a line is not a question; names the line.
    """
    questions: dict[str, Question] = {}
    for prompt in read_prompts(path):
        question = _as_question(prompt)
        if question.id in questions:
            raise ValueError(
                f"{question.origin}: the id {question.id!r} is already that of line "
                f"{questions[question.id].origin.line}. Give every question its own id."
            )
        questions[question.id] = question
    return list(questions.values())


def parse_json(text: str) -> Any:
    """Parse JSON strictly: ``NaN``, ``Infinity`` and repeated keys are refused, as standard parsers do.

    Returns:
        The value, or ``NOT_JSON``.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return NOT_JSON


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is repeated")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def last_number(text: str) -> float | None:
    """Return the last number of a text, thousands separators allowed: where a worked answer states its result."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def schema_validator(schema: dict[str, Any]) -> Any:
    """Build the validator of a JSON schema.

    Raises:
        ValueError: If the package jsonschema is not installed, or the schema is itself wrong.
    """
    try:
        import jsonschema  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ValueError("The check 'json-schema' needs the package jsonschema: pip install jsonschema.") from error
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"'expect' is no JSON schema: {error.message}.") from error
    return validator(schema)


def _as_question(prompt: Prompt) -> Question:
    row, origin = prompt.row, prompt.origin
    if unknown := sorted(row.keys() - _KEYS):
        raise ValueError(f"{origin}: unknown keys {unknown}; known are {sorted(_KEYS)}.")
    turns = parse_messages(row["messages"], "messages") if "messages" in row else []
    carried = [turn.content for turn in turns[len(prompt.messages) :]]
    if carried and (len(carried) > 1 or row.get("reference") is not None):
        raise ValueError(
            f"{origin}: {len(carried)} assistant turns end the messages{' beside a reference' * ('reference' in row)}. "
            "Write one reference answer: as the last turn, or as 'reference'."
        )
    reference = carried[0] if carried else row.get("reference")
    question = Question(
        id=str(row.get("id", origin.line)),
        messages=prompt.messages,
        origin=origin,
        reference=reference,
        check=row.get("check", None if reference is None else "exact"),
        expect=row.get("expect"),
        tolerance=row.get("tolerance", 0.0),
        tags=_texts(row, "tags", origin),
        tools=prompt.tools,
    )
    _validate_check(question)
    return question


def _texts(row: dict[str, Any], key: str, origin: Origin) -> tuple[str, ...]:
    value = row.get(key, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{origin}: {key!r} is {value!r}; write a text or a list of texts.")
    return tuple(texts)


def _validate_check(question: Question) -> None:
    """Raise where a check cannot work, so that no model runs for it."""
    where, check, wanted = question.origin, question.check, question.wanted
    if question.reference is not None and not isinstance(question.reference, str):
        raise ValueError(f"{where}: the reference is {question.reference!r}; write the answer as text.")
    if check is None:
        return
    if check not in CHECKS:
        raise ValueError(f"{where}: the check is {check!r}; allowed are {list(CHECKS)}.")
    if wanted is None:
        raise ValueError(f"{where}: the check {check!r} has nothing to compare with. Write 'reference' or 'expect'.")
    if not isinstance(question.tolerance, int | float) or question.tolerance < 0:
        raise ValueError(f"{where}: 'tolerance' is {question.tolerance!r}; write a number that is not negative.")
    if check == "exact" and not isinstance(wanted, str):
        raise ValueError(f"{where}: 'exact' compares texts; found {wanted!r}.")
    if check == "json" and isinstance(wanted, str) and parse_json(wanted) is NOT_JSON:
        raise ValueError(f"{where}: the check 'json' needs a reference that is JSON; found {wanted!r}.")
    if check == "numeric" and last_number(str(wanted)) is None:
        raise ValueError(f"{where}: the check 'numeric' needs a number in 'expect' or the reference; found {wanted!r}.")
    if check == "contains" and not _texts({"expect": wanted}, "expect", where):
        raise ValueError(f"{where}: 'contains' needs at least one text.")
    if check == "regex":
        _compile(wanted, where)
    if check == "json-schema":
        if not isinstance(question.expect, dict):
            raise ValueError(f"{where}: 'json-schema' needs a schema in 'expect'; found {question.expect!r}.")
        schema_validator(question.expect)


def _compile(pattern: Any, origin: Origin) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{origin}: {pattern!r} is no regular expression: {error}.") from error
