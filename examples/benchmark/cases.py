"""What all measurements here have in common: the rows that are trained on, the shapes of the models, what is reported.

Nothing of this project and none of its peers is imported here, so that each starts as its users start it.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

GIB = 2**30


class Case(NamedTuple):
    """Rows of a batch, how long they are, and whether they are packed to the budget of so many full rows."""

    kind: str
    max_length: int
    rows: int
    packed: bool = False


CASES = {
    "full2k": Case("full", 2048, 4),
    "full8k": Case("full", 8192, 1),
    "chat2k": Case("chat", 2048, 4),
    "chat2k_16": Case("chat", 2048, 16),
    "chat2k_pack": Case("chat", 2048, 4, packed=True),
    "dpo": Case("pairs", 1024, 8),
}

SHRUNK = 32  # a tiny shape has rows of so many times fewer tokens

_LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rope_theta": 500000.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def _llama(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return _LLAMA | sizes | {"num_attention_heads": heads} | more


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(64, 128, 4, 4, vocab_size=512, num_key_value_heads=2),
    "0.5b": _llama(896, 4864, 24, 14, vocab_size=151936, num_key_value_heads=2),
    "8b": _llama(4096, 14336, 32, 32),
    "14b": _llama(5120, 13824, 48, 40, vocab_size=152064),
    "70b": _llama(8192, 28672, 80, 64),
}


def case_of(options: argparse.Namespace) -> Case:
    """Return the case that a command line names, in miniature for a tiny shape."""
    case = CASES[options.case]
    shrink = SHRUNK if options.shape == "tiny" else 1
    return case._replace(max_length=(options.max_length or case.max_length) // shrink, rows=options.rows or case.rows)


def random_rows(case: Case, count: int, vocab: int, learnable: bool = False) -> list[tuple[list[int], int]]:
    """Return rows of token ids and where in each the supervised tokens begin, the same ones for every trainer.

    Lengths of the kind ``chat`` are lognormal(6.0, 0.8), clipped to 32..max_length; the last 40 to 80 % of each row are
    supervised. In learnable rows 7 of 8 tokens follow from the one before.
    """
    source, rows = random.Random(0), []
    for _ in range(count):
        length = case.max_length
        if case.kind == "chat":
            length = min(length, max(min(32, length), int(source.lognormvariate(6.0, 0.8) * _scale(case))))
        ids = _ids(source, length, vocab)
        if learnable:
            _let_follow(ids, source, vocab)
        rows.append((ids, max(1, int(length * source.uniform(0.2, 0.6)))))
    return rows


def random_pairs(case: Case, count: int, vocab: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Return (prompt, chosen, rejected) token ids, each part lognormal(5.3, 0.6), clipped to 16..half of max_length."""
    source, pairs = random.Random(0), []
    for _ in range(count):
        lengths = (int(source.lognormvariate(5.3, 0.6) * _scale(case)) for _ in range(3))
        prompt, chosen, rejected = (max(4, min(case.max_length // 2, length)) for length in lengths)
        pairs.append(tuple(_ids(source, length, vocab) for length in (prompt, chosen, rejected)))
    return pairs  # type: ignore[return-value]


def _scale(case: Case) -> float:
    return case.max_length / {"chat": 2048, "pairs": 1024}[case.kind]


def _ids(source: random.Random, length: int, vocab: int) -> list[int]:
    low, high = (1000, 49000) if vocab > 49000 else (3, vocab)
    return [source.randrange(low, high) for _ in range(length)]


def _let_follow(ids: list[int], source: random.Random, vocab: int) -> None:
    for i in range(1, len(ids)):
        if source.random() < 7 / 8:
            ids[i] = 3 + (5 * ids[i - 1] + 7) % (vocab - 3)


def summary(seconds: Sequence[float], tokens: int, supervised: int) -> dict[str, Any]:
    """Return the speed of some steps: what each took, and the tokens of all of them together."""
    ordered, total = sorted(seconds), sum(seconds)
    return {
        "tok_s": round(tokens / total),
        "sup_tok_s": round(supervised / total),
        "tokens_per_step": round(tokens / len(ordered)),
        "step_ms": {f"p{p}": round(1000 * ordered[round(p / 100 * (len(ordered) - 1))], 2) for p in (5, 50, 95)},
        "mean_step_ms": round(1000 * statistics.mean(ordered), 2),
    }


def largest_distance(losses: Sequence[float], others: Sequence[float], window: int = 10) -> float:
    """Return how far the means over each window of steps are apart at most, relative to the others'."""
    starts = range(max(1, len(losses) - window + 1))
    means = ([statistics.fmean(each[start : start + window]) for start in starts] for each in (losses, others))
    return max(abs(one - two) / two for one, two in zip(*means, strict=True))


def cap_memory(gib: float | None, device: int) -> None:
    """Let torch take no more than so many GiB of a GPU from now on; ``None`` changes nothing."""
    import torch

    if gib is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * GIB / total, device)


def expand(words: Sequence[str]) -> list[list[str]]:
    """Return one command for each combination of values, and for each part between the words ``then``.

    ``run full2k --rows 1 2 then gate full2k`` is two runs and a gate.
    """
    commands = []
    for is_border, part in itertools.groupby(words, "then".__eq__):
        if is_border:
            continue
        first, *rest = part
        groups: list[tuple[list[str], list[str]]] = [([], [])]
        for word in rest:
            if word.startswith("--"):
                groups.append(([word], []))
            else:
                groups[-1][1].append(word)
        choices = [[[*name, value] for value in values] or [name] for name, values in groups]
        commands += [[first, *itertools.chain(*chosen)] for chosen in itertools.product(*choices)]
    return commands
