"""What must hold before a run is worth starting."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from peft import PeftModel

from lightning_qlora.memory import MemoryEstimate
from lightning_qlora.schema import ChatDataModule
from lightning_qlora.tools.rehearsal.step import Rehearsal

__all__ = ["Check", "Places", "check_disk", "check_gradients", "check_memory", "check_places", "check_stop_tokens"]

_GIB, _MIB = 2**30, 2**20
_NAMED = 4
_SMALL_FILES = 256 * 1024  # configuration, manifest, model card of a checkpoint


class Check(NamedTuple):
    """One line of the list.

    Attributes:
        name: What was looked at.
        passed: Whether it holds; ``None`` where there is nothing that could fail.
        detail: What was found, and what to do if it does not hold.
    """

    name: str
    passed: bool | None
    detail: str


class Places(NamedTuple):
    """Where a run will write.

    Attributes:
        checkpoints: Folders of checkpoints, and how many each will hold at once; ``None`` where that grows with the
            run.
        others: The remaining folders, and whose they are.
    """

    checkpoints: list[tuple[str, int | None]]
    others: list[tuple[str, str]]

    @classmethod
    def of(cls, trainer: L.Trainer) -> Places:
        """Read them from a trainer, before anything is taken away from it."""
        root = str(trainer.default_root_dir)
        savers = [c for c in trainer.callbacks if isinstance(c, Checkpoint)]  # type: ignore[attr-defined]
        folders = [str(getattr(c, "dirpath", None) or os.path.join(root, "checkpoints")) for c in savers]
        kept = [_most_kept(c) for c in savers]
        logs = [(str(logger.save_dir), type(logger).__name__) for logger in trainer.loggers if logger.save_dir]
        return cls(list(zip(folders, kept, strict=True)), [(root, "default_root_dir"), *logs])


def _most_kept(saver: Checkpoint) -> int | None:
    """Count the checkpoints that lie there at once: those kept, and the next one before an old one goes."""
    if not isinstance(saver, ModelCheckpoint):
        return 2
    if saver.save_top_k == -1:
        return None
    kept = saver.save_top_k + bool(saver.save_last)
    return max(kept, getattr(saver, "keep_at_least", 1)) + 1


def check_gradients(found: Rehearsal) -> list[Check]:
    """Every trained parameter must receive a finite gradient, and every ``lora_B`` one that is not zero.

    ``lora_B`` starts at zero, so at the first step the gradient of ``lora_A`` is exactly zero, and nothing is wrong.
    """
    loss = Check("loss", math.isfinite(found.loss), f"{found.loss:.4g} summed over the batch")
    dead = [name for name in found.all_zero if not _starts_at_zero_gradient(name)]
    wrong = [
        f"{len(names)} {what}{_examples(names)}"
        for names, what in (
            (found.no_gradient, "received none"),
            (found.not_finite, "are NaN or infinite"),
            (dead, "are zero throughout"),
        )
        if names
    ]
    if not found.num_trained:
        return [loss, Check("gradients", False, "nothing is trained: name layers that exist in lora.target_modules")]
    good = f"all {found.num_trained} trained tensors received a finite gradient, every lora_B one that is not zero"
    return [loss, Check("gradients", not wrong, "; ".join(wrong) if wrong else good)]


def _starts_at_zero_gradient(name: str) -> bool:
    return "lora_A" in name or "lora_embedding_A" in name or "lora_magnitude" in name


def check_stop_tokens(model: Any, datamodule: Any) -> Check:
    """Generation must stop at what training teaches as the end of an answer."""
    if not isinstance(datamodule, ChatDataModule) or not isinstance(getattr(model, "model", None), PeftModel):
        return Check("stop tokens", None, "not known of this data module")
    taught = datamodule.stop_token_ids
    stops = model.model.get_base_model().generation_config.eos_token_id
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    named = {token: str(datamodule.tokenizer.convert_ids_to_tokens(token)) for token in taught}
    if not taught:
        return Check("stop tokens", False, "the answers end with no token that generation could stop at")
    if missing := [named[token] for token in taught if token not in stops]:
        return Check("stop tokens", False, f"generation does not stop at {', '.join(missing)}, which answers end with")
    return Check("stop tokens", True, f"answers end with {', '.join(named.values())}, and generation stops there")


def check_memory(found: Rehearsal, estimate: MemoryEstimate | None, device: torch.device) -> Check:
    """Compare the peak with the device's memory, and the estimate with the peak."""
    by_estimate = "" if estimate is None else f", by estimate {_size(estimate.peak)} and the libraries themselves"
    if found.out_of_memory is not None:
        return Check(
            "memory",
            False,
            f"the longest batch does not fit: {found.out_of_memory}{by_estimate}. Write "
            "model.activation_checkpointing: full, or lower data.tokens_per_batch or data.max_length; the subcommand "
            "estimate says what fits",
        )
    if found.peak_bytes is None:
        return Check("memory", None, f"not counted on a CPU{by_estimate}")
    total = torch.cuda.get_device_properties(device).total_memory
    share = 100 * found.peak_bytes / total
    return Check("memory", True, f"{_size(found.peak_bytes)} of {_size(total)} ({share:.0f} %){by_estimate}")


def check_places(places: Places) -> list[Check]:
    """Every folder that the run will write to must take a file."""
    checks, seen = [], set()
    for folder, owner in [*((folder, "checkpoints") for folder, _ in places.checkpoints), *places.others]:
        if folder in seen or _is_remote(folder):
            continue
        seen.add(folder)
        parent = _existing_parent(folder)
        try:
            with tempfile.TemporaryFile(dir=parent) as file:
                file.write(b"0")
        except OSError as error:
            detail = f"{folder}: {error.strerror or error} in {parent}. Write another folder, or make it writable"
            checks.append(Check(f"writable ({owner})", False, detail))
        else:
            checks.append(Check(f"writable ({owner})", True, folder))
    return checks


def check_disk(places: Places, found: Rehearsal, datamodule: Any, num_saves: int | None) -> list[Check]:
    """The checkpoints that lie there at once must find room."""
    tokenizer = getattr(datamodule, "tokenizer", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    of_tokenizer = len(backend.to_str().encode()) if backend is not None else 0
    checks = []
    for folder, kept in places.checkpoints:
        if _is_remote(folder):
            checks.append(Check("disk space", None, f"{folder} is remote and was not looked at"))
            continue
        size = 2 * found.trained_bytes + found.optimizer_bytes + of_tokenizer + _SMALL_FILES
        count = kept if kept is not None else num_saves
        free = shutil.disk_usage(_existing_parent(folder)).free
        if count is None:
            detail = f"{_size(size)} a checkpoint, all of them kept, {_size(free)} free: room for {free // size:,}"
            checks.append(Check("disk space", free > size, detail))
            continue
        detail = f"{count} checkpoints of {_size(size)} at once, {_size(free)} free in {_existing_parent(folder)}"
        checks.append(Check("disk space", free > count * size, detail))
    return checks


def _is_remote(folder: str) -> bool:
    return "://" in folder


def _existing_parent(folder: str) -> Path:
    path = Path(folder).expanduser().absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def _examples(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" ({', '.join(names[:_NAMED])}{more})"


def _size(nbytes: float) -> str:
    return f"{nbytes / _GIB:.2f} GiB" if nbytes >= _GIB else f"{nbytes / _MIB:.1f} MiB"
