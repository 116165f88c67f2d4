"""Checkpoints on a mounted file system."""

from __future__ import annotations

import os
import shutil
import sys
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from typing_extensions import override

from lightning_qlora.checkpoints.publishing.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Published,
    dump_manifest,
    hash_stream,
)
from lightning_qlora.checkpoints.publishing.store import LATEST_NAME, CheckpointStore, check_required

if sys.platform != "win32":
    import fcntl

__all__ = ["LocalStore", "flush_and_hash", "regular_files", "verify"]

_STAGING = ".staging-"
_TRASH = ".trash-"
_STALE_AFTER_S = 3600.0


class LocalStore(CheckpointStore):
    """Checkpoints on a mounted file system, published by an atomic rename."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(root)
        self._root = Path(root)
        self._locks: dict[Path, int] = {}

    @override
    def begin(self, name: str) -> Path:
        self._root.mkdir(parents=True, exist_ok=True)
        staging = self._root / f"{_STAGING}{name}-{uuid.uuid4().hex[:8]}"
        staging.mkdir()
        descriptor = _lock(staging)
        if descriptor is not None:
            self._locks[staging] = descriptor
        return staging

    @override
    def commit(
        self, staging: Path, name: str, metadata: Mapping[str, Any], required: Collection[str] = ()
    ) -> Published:
        files = {str(path.relative_to(staging).as_posix()): flush_and_hash(path) for path in regular_files(staging)}
        check_required(staging, files, required)
        serial = self._next_serial()
        _write_durably(staging / MANIFEST_NAME, dump_manifest(serial, files, metadata))
        for directory in [path for path in staging.rglob("*") if path.is_dir()]:
            _flush_directory(directory)
        _flush_directory(staging)
        final = self._root / name
        if final.exists():
            raise FileExistsError(f"There already is a checkpoint {final}; a published one is never overwritten.")
        os.rename(staging, final)
        self._unlock(staging)
        _flush_directory(self._root)
        self._point_latest_at(name)
        return Published(str(final), serial, files, dict(metadata))

    def _point_latest_at(self, name: str) -> None:
        pointer = self._root / f"{_STAGING}{LATEST_NAME}"
        _write_durably(pointer, f"{name}\n".encode())
        os.replace(pointer, self._root / LATEST_NAME)
        _flush_directory(self._root)

    @override
    def abort(self, staging: Path) -> None:
        shutil.rmtree(staging, ignore_errors=True)
        self._unlock(staging)

    def _unlock(self, staging: Path) -> None:
        descriptor = self._locks.pop(staging, None)
        if descriptor is not None:
            os.close(descriptor)

    @override
    def sweep(self) -> list[str]:
        if not self._root.is_dir():
            return []
        swept = []
        for path in sorted(self._root.iterdir()):
            if path.name == f"{_STAGING}{LATEST_NAME}":
                path.unlink(missing_ok=True)
            elif path.name.startswith(_TRASH) or (path.name.startswith(_STAGING) and _is_abandoned(path)):
                shutil.rmtree(path, ignore_errors=True)
            else:
                continue
            swept.append(path.name)
        newest = next(iter(self.published()), None)
        if newest is not None and newest.name != self.latest():  # killed between the rename and the pointer
            self._point_latest_at(newest.name)
        return swept

    @override
    def _directories(self) -> list[str]:
        if not self._root.is_dir():
            return []
        return sorted(path.name for path in self._root.iterdir() if path.name[0] != "." and path.is_dir())

    @override
    def files(self, name: str) -> list[str]:
        try:
            return os.listdir(self._root / name)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError:
            return [MANIFEST_NAME]  # unreadable: reading the manifest will say why

    @override
    def open(self, name: str, file: str) -> BinaryIO:
        return open(self._root / name / file, "rb")

    @override
    def _path(self, name: str) -> str:
        return str(self._root / name)

    @override
    def _remove(self, name: str) -> None:
        trash = self._root / f"{_TRASH}{name}-{uuid.uuid4().hex[:8]}"
        os.rename(self._root / name, trash)
        _flush_directory(self._root)
        shutil.rmtree(trash)


def verify(directory: str | Path) -> Published:
    """Check a local directory's files against its manifest.

    Raises:
        DamagedCheckpointError: If it has no manifest, or one that cannot be trusted, or if a file is missing, cut or
            changed; the message names the file.
    """
    path = Path(directory)
    return LocalStore(path.parent).verify(path.name)


# Files


def regular_files(directory: Path) -> Iterator[Path]:
    """Yield the files below a directory, in order, the manifest excepted."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path != directory / MANIFEST_NAME:
            yield path


def flush_and_hash(path: Path) -> FileRecord:
    """Force a file to the disk and return the digest of what is there."""
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())
        return hash_stream(stream)


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _flush_directory(directory: Path) -> None:
    """Force a directory's entries (new names, renames) to the disk."""
    if os.name == "nt":  # directories cannot be opened there; NTFS journals names by itself
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(directory: Path) -> int | None:
    """Hold a lock that the kernel lets go when this process dies; ``None`` where the file system has none."""
    if sys.platform == "win32":
        return None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_abandoned(directory: Path) -> bool:
    """Whether the process that wrote here is gone: its lock is free, or (without locks) nothing moved for an hour."""
    if sys.platform != "win32":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
        else:
            return True
        finally:
            os.close(descriptor)
    return time.time() - directory.stat().st_mtime > _STALE_AFTER_S
