"""Tiny pairs of answers in files, and data modules of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny import tiny_tokenizer

from lightning_qlora.data import PreferenceDataModule


def tiny_pair(number: int, rng: random.Random) -> dict[str, Any]:
    """Return a pair of answers to a prompt of one to three turns."""
    prompt = [{"role": "system", "content": "Be kind."}] if rng.random() < 0.3 else []
    for turn in range(rng.randint(0, 2)):
        prompt.append({"role": "user", "content": f"Earlier question {turn} of {number}"})
        prompt.append({"role": "assistant", "content": "Earlier answer " + "yes " * rng.randint(1, 4)})
    prompt.append({"role": "user", "content": f"Question {number}: " + "what " * rng.randint(0, 6)})
    chosen, rejected = (
        [{"role": "assistant", "content": f"{word} answer {number}" + " yes" * rng.randint(0, 5)}]
        for word in ("Good", "Bad")
    )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write_pairs(path: Path, count: int, *, first: int = 0, seed: int = 0) -> Path:
    """Write ``count`` different pairs as JSON lines."""
    rng = random.Random(seed)
    rows = [tiny_pair(number, rng) for number in range(first, first + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_judged(path: Path, count: int, *, seed: int = 0) -> Path:
    """Write ``count`` answers with labels, about half of them good, as JSON lines."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        pair = tiny_pair(number, rng)
        label = rng.random() < 0.5
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair_data(source: Path, cache: Path, **options: Any) -> PreferenceDataModule:
    """Make a data module with a few pairs to a batch."""
    settings: dict[str, Any] = {"max_length": 192, "tokens_per_batch": 3 * 192, "batch_size": 3}
    settings["tokenizer"] = tiny_tokenizer()
    return PreferenceDataModule(str(source), cache_dir=str(cache), **{**settings, **options})
