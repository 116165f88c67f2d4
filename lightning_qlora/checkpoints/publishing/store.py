"""What checkpoint folders have in common, wherever they are: finding, verifying and pruning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lightning_qlora.checkpoints.publishing.manifest import (
    MANIFEST_NAME,
    DamagedCheckpointError,
    FileRecord,
    NoValidCheckpointError,
    Published,
    hash_stream,
    parse_manifest,
)

__all__ = ["LATEST_NAME", "CheckpointStore", "check_required"]

LATEST_NAME = "LATEST"
# A directory with one of these is somebody's checkpoint, whole or not, rather than a folder that happens to be there.
_TELLTALES = frozenset({MANIFEST_NAME, "adapter_config.json", "adapter_model.safetensors", "trainer.ckpt"})


class CheckpointStore(ABC):
    """A folder of checkpoints: publishes, finds, verifies and prunes them.

    One run writes into a folder at a time; any number may read. Only one process of a run calls the methods that
    write.

    Args:
        root: The folder; made by the first publication.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)

    # What the file systems do differently

    @abstractmethod
    def begin(self, name: str) -> Path:
        """Make the hidden, empty, local directory that the files of checkpoint ``name`` are to be written into."""

    @abstractmethod
    def commit(
        self, staging: Path, name: str, metadata: Mapping[str, Any], required: Collection[str] = ()
    ) -> Published:
        """Publish what :meth:`begin` began, as one unit, and point ``LATEST`` at it.

        Args:
            staging: What :meth:`begin` returned.
            name: Of the new checkpoint; must be new.
            metadata: Recorded in the manifest; plain JSON values.
            required: Files without which it is no checkpoint.

        Raises:
            OSError: If anything could not be written. The older checkpoints are untouched.
        """

    @abstractmethod
    def abort(self, staging: Path) -> None:
        """Throw away what :meth:`begin` began."""

    @abstractmethod
    def sweep(self) -> list[str]:
        """Remove what killed processes left half-written or half-removed; return the names."""

    @abstractmethod
    def _directories(self) -> list[str]:
        """Names of the directories in the root that are not hidden."""

    @abstractmethod
    def files(self, name: str) -> list[str]:
        """Names of the files right inside a directory."""

    @abstractmethod
    def open(self, name: str, file: str) -> BinaryIO:
        """Open a file of a checkpoint, or of the root where ``name`` is empty."""

    @abstractmethod
    def _path(self, name: str) -> str:
        """The address of a checkpoint."""

    @abstractmethod
    def _remove(self, name: str) -> None:
        """Take a checkpoint away so that no reader ever sees half of it."""

    # What they share

    def publish(
        self, name: str, write: Callable[[Path], None], metadata: Mapping[str, Any], required: Collection[str] = ()
    ) -> Published:
        """Publish what ``write`` puts into the directory it is given, or leave no trace and raise."""
        staging = self.begin(name)
        try:
            write(staging)
            return self.commit(staging, name, metadata, required)
        except BaseException:
            self.abort(staging)
            raise

    def latest(self) -> str | None:
        """The name that ``LATEST`` holds, for readers that trust it; :meth:`newest_valid` does not."""
        try:
            with self.open("", LATEST_NAME) as stream:
                return stream.read().decode(errors="replace").strip() or None
        except OSError:
            return None

    def candidates(self) -> list[str]:
        """Names of the directories that are meant to be checkpoints, whether whole or damaged."""
        return [name for name in self._directories() if _TELLTALES.intersection(self.files(name))]

    def read(self, name: str) -> Published:
        """Read a checkpoint's manifest, without looking at the files.

        Raises:
            DamagedCheckpointError: If there is none, or it cannot be trusted.
        """
        try:
            with self.open(name, MANIFEST_NAME) as stream:
                data = stream.read()
        except OSError as error:
            raise DamagedCheckpointError(f"{self._path(name)}: {MANIFEST_NAME} cannot be read: {error}.") from error
        return parse_manifest(self._path(name), data)

    def verify(self, name: str) -> Published:
        """Check every file of a checkpoint against its manifest.

        Raises:
            DamagedCheckpointError: With the name of the first file that is missing, cut or changed.
        """
        published = self.read(name)
        for file, record in published.files.items():
            try:
                with self.open(name, file) as stream:
                    found = hash_stream(stream)
            except OSError as error:
                raise DamagedCheckpointError(f"{published.path}: {file} cannot be read: {error}.") from error
            if found.size != record.size:
                raise DamagedCheckpointError(
                    f"{published.path}: {file} has {found.size} bytes and was published with {record.size}."
                )
            if found.sha256 != record.sha256:
                raise DamagedCheckpointError(f"{published.path}: {file} was changed after it was published.")
        return published

    def published(self) -> list[Published]:
        """All checkpoints whose manifest can be read, newest first; their files are not looked at."""
        found = []
        for name in self.candidates():
            try:
                found.append(self.read(name))
            except DamagedCheckpointError:
                continue
        return sorted(found, key=lambda item: (item.serial, item.name), reverse=True)

    def newest_valid(self) -> Published | None:
        """Find the newest checkpoint that verifies; ``None`` if nothing was ever published here.

        Raises:
            NoValidCheckpointError: If there are checkpoints but none verifies. Starting afresh beside them would
                quietly throw a run away.
        """
        problems: dict[str, str] = {}
        for item in self.published():
            try:
                return self.verify(item.name)
            except DamagedCheckpointError as error:
                problems[item.name] = str(error)
        for name in self.candidates():
            if name not in problems:
                problems[name] = f"{self._path(name)}: {self._why_unreadable(name)}"
        latest = self.latest()
        if latest is not None and not problems:
            problems[latest] = f"{self._path(latest)}: {LATEST_NAME} names it and it is gone."
        if not problems:
            return None
        raise NoValidCheckpointError(
            f"No checkpoint in {self.root} is whole:\n"
            + "\n".join(f"  {why}" for why in problems.values())
            + "\nRestore one of them, name another checkpoint, or move the folder away to start from the beginning."
        )

    def _why_unreadable(self, name: str) -> str:
        try:
            self.read(name)
        except DamagedCheckpointError as error:
            return str(error).partition(": ")[2]
        return "changed while it was being read."

    def is_valid(self, name: str) -> bool:
        """Whether a checkpoint verifies."""
        try:
            self.verify(name)
        except DamagedCheckpointError:
            return False
        return True

    def prune(
        self,
        names: Iterable[str],
        at_least: int = 2,
        among: Collection[str] | None = None,
        state: Callable[[Published], Hashable] = lambda item: item.name,
    ) -> list[str]:
        """Remove checkpoints, but never below ``at_least`` that verify at this moment.

        Args:
            names: What may go. Names that are not there are passed over.
            at_least: How many whole checkpoints must stay.
            among: Those that count as staying, such as the ones of the same run; ``None`` for all.
            state: Tells of a checkpoint what it holds; several of the same count as one.

        Returns:
            The names that were removed.
        """
        doomed = set(names).intersection(self.candidates())
        if not doomed:
            return []
        newest_first = self.published()
        # Those that stay anyway are counted first; then the newest of the doomed are spared as needed.
        valid: set[Hashable] = set()
        for item in sorted(newest_first, key=lambda item: item.name in doomed):
            if len(valid) >= at_least:
                break
            counts = (among is None or item.name in among) and state(item) not in valid
            if counts and self.is_valid(item.name):
                valid.add(state(item))
                doomed.discard(item.name)
        removed = [item.name for item in reversed(newest_first) if item.name in doomed]
        removed += sorted(doomed.difference(removed)) if len(valid) >= at_least else []
        for name in removed:
            self._remove(name)
        return removed

    def _next_serial(self) -> int:
        return 1 + max((item.serial for item in self.published()), default=0)


def check_required(staging: Path, files: Mapping[str, FileRecord], required: Collection[str]) -> None:
    """Raise ``OSError`` if a file is missing or empty: some writers report success without having written."""
    for name in required:
        if name not in files or files[name].size == 0:
            found = ", ".join(files) or "nothing"
            raise OSError(f"{name} was not written; {staging} holds {found}. Nothing is published.")
