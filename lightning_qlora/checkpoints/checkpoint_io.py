"""How Lightning reads and writes the resumable half of a published checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import CheckpointIO
from typing_extensions import override

from lightning_qlora.checkpoints.adapter_folder import describe_place
from lightning_qlora.checkpoints.publishing import (
    MANIFEST_NAME,
    CheckpointStore,
    Published,
    newest_of_run,
    open_store,
)

__all__ = [
    "TRAINER_FILE",
    "PublishedCheckpointIO",
    "published_directory",
    "read_checkpoints_without_pickle",
    "verify_published",
]

TRAINER_FILE = "trainer.ckpt"
"""Lightning's own checkpoint inside a published directory: trained tensors, optimizer, loops, callbacks, data."""


def published_directory(path: _PATH) -> str | None:
    """Return the published directory that a path means, itself or the file inside it; ``None`` if it means none."""
    directory = str(path).rstrip("/").removesuffix(f"/{TRAINER_FILE}")
    if directory.startswith(("http://", "https://")):
        return None
    store, name = _store_of(directory)
    files = store.files(name)
    # A directory without a manifest is still meant as a checkpoint: verifying it then says what is wrong with it.
    meant = MANIFEST_NAME in files or (directory == str(path).rstrip("/") and TRAINER_FILE in files)
    return directory if meant else None


def _store_of(directory: str) -> tuple[CheckpointStore, str]:
    root, slash, name = directory.rpartition("/")
    return open_store(root or slash or "."), name


def _newest_directory(path: _PATH) -> str | None:
    """Return the newest whole checkpoint of the run whose folder a path is; ``None`` if it is no such folder."""
    newest = None if str(path).startswith(("http://", "https://")) else newest_of_run(path)
    return None if newest is None else newest.path


def verify_published(directory: str) -> Published:
    """Check a published directory's files, local or remote, against its manifest.

    Raises:
        DamagedCheckpointError: With the file that is missing, cut or changed.
    """
    store, name = _store_of(directory)
    return store.verify(name)


class PublishedCheckpointIO(CheckpointIO):
    """Reads published checkpoints only whole and only where they belong, and all checkpoints without pickle.

    ``ckpt_path`` may name the published directory, the ``trainer.ckpt`` inside it, or a run's folder for its newest
    whole checkpoint. Any other path goes to the plugin that was there before.

    Args:
        inner: The plugin that was there before.
        check: Called with the manifest before anything is loaded; raises if the checkpoint belongs elsewhere.
    """

    def __init__(self, inner: CheckpointIO, check: Callable[[Published], None] | None = None) -> None:
        self.inner = inner
        self.check = check
        self._staging: Path | None = None
        self._error: Exception | None = None
        self.saved_weights: dict[str, Any] = {}
        """The ``state_dict`` of the expected checkpoint, as callbacks left it; on the rank that wrote it."""
        self.checked: str | None = None
        """The published directory that was verified and checked last."""

    def expect(self, staging: Path | None) -> None:
        """Write checkpoints that go into this directory here, instead of handing them to the inner plugin."""
        self._staging, self._error, self.saved_weights = staging, None, {}

    def raise_error(self) -> None:
        """Raise what went wrong in the last write.

        Only one rank writes, and the others wait for it right after. So an error is kept until all can be told.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        if self._staging is None or Path(path).parent != self._staging:
            self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
            return
        self.saved_weights = checkpoint.get("state_dict", {})
        try:
            with open(path, "wb") as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError where it finds out late
            self._error = error

    @override
    def load_checkpoint(
        self, path: _PATH, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        self.checked = None
        directory = published_directory(path) or _newest_directory(path)
        if directory is None:
            return self._load_other(path, weights_only)
        published = verify_published(directory)
        if self.check is not None:
            self.check(published)
        self.checked = directory
        store, name = _store_of(directory)
        with store.open(name, TRAINER_FILE) as stream:
            checkpoint: dict[str, Any] = torch.load(stream, map_location="cpu", weights_only=True)
        return checkpoint

    def _load_other(self, path: _PATH, weights_only: bool | None) -> dict[str, Any]:
        try:
            # Lightning's default for http:// is to run whatever the pickle holds.
            return self.inner.load_checkpoint(path, weights_only=True if weights_only is None else weights_only)
        except (FileNotFoundError, IsADirectoryError) as error:
            place = Path(path)
            if (place / "adapter_config.json").is_file():
                raise ValueError(
                    f"ckpt_path={str(path)!r} is an adapter without {TRAINER_FILE}, from which a run would go on. "
                    f"Write --model.adapter={path} to start with its weights."
                ) from error
            raise ValueError(
                f"ckpt_path={str(path)!r} is no checkpoint: {describe_place(place, TRAINER_FILE)}. Write the folder of "
                "a checkpoint, that of a run, whose newest checkpoint then counts, or a file that Lightning wrote."
            ) from error

    @override
    def remove_checkpoint(self, path: _PATH) -> None:
        self.inner.remove_checkpoint(path)

    @override
    def teardown(self) -> None:
        self.inner.teardown()


def read_checkpoints_without_pickle(trainer: L.Trainer) -> PublishedCheckpointIO:
    """Let a trainer read its checkpoints through :class:`PublishedCheckpointIO`, and return that."""
    io = trainer.strategy.checkpoint_io
    if not isinstance(io, PublishedCheckpointIO):
        io = trainer.strategy.checkpoint_io = PublishedCheckpointIO(io)
    return io
