"""A chat template is a program from a stranger: it is tried in a capped process before it runs in this one.

Jinja's sandbox keeps a template from the interpreter, not from spinning or from filling the memory. So a template
is rendered once in a child process that may use a few seconds of processor time and well under a gigabyte, over
chats long enough that anything that grows faster than its input shows. The child loads Jinja only: the trial costs
about a fifth of a second per template and process, once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from typing import Any

__all__ = ["MAX_MEMORY_MIB", "MAX_SECONDS", "check_template"]

MAX_SECONDS = 3
"""Processor time of the trial. A template cannot wait for anything, so on a free processor this is all it gets."""

MAX_WALL_SECONDS = 60
"""For a machine whose processors are busy with other work."""

MAX_MEMORY_MIB = 512
MAX_OUTPUT_CHARACTERS = 4_000_000
"""The probe chats hold about 30,000 characters; no chat template writes a hundred times its input."""

REFUSED = 3
"""Exit status of the child that says what it found."""

TURNS = (1, 2, 40)
"""Exchanges of the probe chats: what doubles with every message reaches 2**80 in the longest."""


@lru_cache(maxsize=256)
def check_template(template: str, variables: str = "{}") -> None:
    """Try a chat template in a capped process.

    Args:
        template: The Jinja source.
        variables: JSON of the variables that it is rendered with.

    Raises:
        ValueError: It ran out of time or memory, or wrote too much.
    """
    job = json.dumps({"template": template, "variables": json.loads(variables), "path": sys.path})
    command = [sys.executable, "-I", "-B", __file__]
    try:
        trial = subprocess.run(
            command, input=job, capture_output=True, text=True, timeout=MAX_WALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        verdict = f"did not finish within {MAX_WALL_SECONDS} seconds"
    else:
        if trial.returncode == 0:
            return
        if trial.returncode > 0 and trial.returncode != REFUSED:
            raise RuntimeError(f"The process that tries chat templates failed:\n{trial.stderr}")
        verdict = trial.stderr.strip() or f"used more than {MAX_SECONDS} s of processor time"
    raise ValueError(
        f"The chat template {verdict} when it was tried on short chats, so it is not run. "
        "Give another template; a usual one needs milliseconds."
    )


def _probe_chats() -> list[dict[str, Any]]:
    """Chats of several lengths, with and without system prompt, tools and calls."""
    call = {"id": "call12345", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    schema = {"type": "object", "properties": {"a": {"type": "integer", "description": "One."}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": schema}}
    question = {"role": "user", "content": "What is the sum of one and two, and why does it matter to anyone at all?"}
    answer = {
        "role": "assistant",
        "content": "It is three.\n\nAnd it matters to those who count.",
        "reasoning_content": "1+2",
    }
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    told = {"role": "tool", "content": '{"sum": 3}', "name": "add", "tool_call_id": "call12345"}
    chats: list[dict[str, Any]] = []
    for turns in TURNS:
        plain, calling = [question, answer] * turns, [question, asked, told, answer] * turns
        chats.append({"messages": plain, "tools": None})
        chats.append({"messages": [{"role": "system", "content": "Be brief."}, *calling], "tools": [tool]})
    return chats


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows: only the wall-clock limit holds
        return
    megabytes = MAX_MEMORY_MIB * 1024 * 1024
    for limit, value in (
        (resource.RLIMIT_CPU, MAX_SECONDS),
        (resource.RLIMIT_AS, megabytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _try_template(job: dict[str, Any]) -> str | None:
    """Render the probe chats as transformers would; a template may raise, but not outgrow its input."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda _: "01 Jan 2026"}
    template = environment.from_string(job["template"])
    for chat in _probe_chats():
        for for_generation in (False, True):
            written = 0
            try:
                for piece in template.generate(
                    **{**chat, "documents": None, "add_generation_prompt": for_generation, **job["variables"]}
                ):
                    written += len(piece)
                    if written > MAX_OUTPUT_CHARACTERS:
                        return f"wrote more than {MAX_OUTPUT_CHARACTERS} characters"
            except MemoryError:
                raise
            except Exception:
                continue  # a template may object to a chat; only its appetite is judged here
    return None


def _main() -> int:
    job = json.loads(sys.stdin.read())
    sys.path[:] = job["path"]
    _limit_resources()
    try:
        verdict = _try_template(job)
    except MemoryError:
        verdict = f"used more than {MAX_MEMORY_MIB} MiB"
    except Exception:  # a syntax error is reported where the template is compiled for use
        return 0
    if verdict is not None:
        print(verdict, file=sys.stderr)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main())
