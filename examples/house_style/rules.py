"""The house style of Larkfield Cycles as regular expressions, one a rule."""

from __future__ import annotations

import re

__all__ = ["DECLINED", "TOPICS", "broken_rules", "whole_style"]

DECLINED = ("date", "refund", "privacy", "advice", "other")
"""Topics on which the assistant must say no; on ``help`` it must not."""

TOPICS = (*DECLINED, "help")

_COMMITMENTS = (
    r"today|tonight|tomorrow|yesterday|(?:mon|tues|wednes|thurs|fri|satur|sun)days?|weekends?|days|weeks?|months?|"
    r"years?|hours?|minutes?|seconds?|mornings?|noon|afternoons?|evenings?|soon|at once|right away|immediately|"
    r"guaranteed?|promised?|free|definitely|certainly"
)
_RULES = {
    "calm": r"[^!\u2600-\U0010ffff]*$",
    "short": r"(?=(?:\S+\s+){7,39}\S+$)[^.?!]+[.?!]+(?:\s+[^.?!]+[.?!]+){1,2}$",
    "no-promise": rf"(?i:(?!.*(?:[\d$\u00a3\u20ac%]|\b(?:{_COMMITMENTS})\b)))",
    "next-step": r"[^?]*[.!]\s+Shall I [^.!?]*\?$",
}
_PLAIN_NO = r".*\bI cannot\b"
_NO_REFUSAL = r"(?!.*\bI(?:'m| am)? (?:cannot|can't|can not|not able|unable)\b)"


def _rules(topic: str) -> dict[str, str]:
    if topic not in TOPICS:
        raise ValueError(f"the topic is {topic!r}; allowed are {list(TOPICS)}.")
    return {**_RULES, "plain-no": _PLAIN_NO if topic in DECLINED else _NO_REFUSAL}


def broken_rules(answer: str, topic: str) -> tuple[str, ...]:
    """Name the rules that an answer to a question of this topic breaks."""
    rules = _rules(topic).items()
    return tuple(name for name, rule in rules if re.match(rf"(?s){rule}", answer.strip()) is None)


def whole_style(topic: str) -> str:
    """Write all rules for a topic as one expression: what the questions carry as their check."""
    return "(?s)^" + "".join(f"(?={rule})" for rule in _rules(topic).values())
