"""Checkpoints on object stores and other file systems that fsspec knows."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from typing_extensions import override

from lightning_qlora.checkpoints.publishing.local import LocalStore, flush_and_hash, regular_files
from lightning_qlora.checkpoints.publishing.manifest import MANIFEST_NAME, Published, dump_manifest
from lightning_qlora.checkpoints.publishing.store import LATEST_NAME, CheckpointStore, check_required

__all__ = ["RemoteStore", "open_store"]

_UPLOADING = ".uploading-"


class RemoteStore(CheckpointStore):
    """Checkpoints on any file system that fsspec knows (``s3://``, ``gs://``, ``memory://`` ...).

    The promise is weaker than on a local disk: object stores have no atomic rename of a folder. Files are written
    and checked locally, uploaded one by one, and the manifest last; a folder without a manifest is no checkpoint, so
    that a kill leaves an incomplete folder that :meth:`sweep` removes, never a torn checkpoint. How durable an
    upload is, and how soon other machines see it, is the service's promise.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._fs, self._root = url_to_fs(root)

    @override
    def begin(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix="lightning-qlora-"))

    @override
    def commit(
        self, staging: Path, name: str, metadata: Mapping[str, Any], required: Collection[str] = ()
    ) -> Published:
        paths = {path.relative_to(staging).as_posix(): path for path in regular_files(staging)}
        files = {file: flush_and_hash(path) for file, path in paths.items()}
        check_required(staging, files, required)
        if self._fs.exists(f"{self._root}/{name}/{MANIFEST_NAME}"):
            raise FileExistsError(f"There already is a checkpoint {self._path(name)}.")
        serial = self._next_serial()
        self._fs.makedirs(f"{self._root}/{name}", exist_ok=True)
        self._fs.pipe_file(f"{self._root}/{_UPLOADING}{name}", b"")
        for file, path in paths.items():
            target = f"{self._root}/{name}/{file}"
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(path), target)
        self._fs.pipe_file(f"{self._root}/{name}/{MANIFEST_NAME}", dump_manifest(serial, files, metadata))
        self._fs.invalidate_cache()
        published = self.verify(name)
        self._fs.rm_file(f"{self._root}/{_UPLOADING}{name}")
        self._fs.pipe_file(f"{self._root}/{LATEST_NAME}", f"{name}\n".encode())
        shutil.rmtree(staging, ignore_errors=True)
        return published

    @override
    def abort(self, staging: Path) -> None:
        shutil.rmtree(staging, ignore_errors=True)

    @override
    def sweep(self) -> list[str]:
        swept = []
        for entry in self._list(self._root):
            marker = entry["name"].rpartition("/")[2]
            if marker.startswith(_UPLOADING):
                name = marker.removeprefix(_UPLOADING)
                if not self._fs.exists(f"{self._root}/{name}/{MANIFEST_NAME}"):
                    self._remove(name)
                self._fs.rm_file(entry["name"])
                swept.append(name)
        return swept

    def _list(self, path: str) -> list[dict[str, Any]]:
        self._fs.invalidate_cache()
        return list(self._fs.ls(path, detail=True)) if self._fs.isdir(path) else []

    @override
    def _directories(self) -> list[str]:
        names = (entry["name"].rstrip("/").rpartition("/")[2] for entry in self._list(self._root) if _is_folder(entry))
        return sorted(name for name in names if not name.startswith("."))

    @override
    def files(self, name: str) -> list[str]:
        entries = self._list(f"{self._root}/{name}")
        return [entry["name"].rpartition("/")[2] for entry in entries if not _is_folder(entry)]

    @override
    def open(self, name: str, file: str) -> BinaryIO:
        stream: BinaryIO = self._fs.open("/".join(filter(None, (self._root, name, file))), "rb")
        return stream

    @override
    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    @override
    def _remove(self, name: str) -> None:
        folder = f"{self._root}/{name}"
        if self._fs.exists(f"{folder}/{MANIFEST_NAME}"):  # first, so that what is left is no checkpoint any more
            self._fs.rm_file(f"{folder}/{MANIFEST_NAME}")
        if self._fs.exists(folder):
            self._fs.rm(folder, recursive=True)


def open_store(root: str | Path) -> CheckpointStore:
    """Return the store for a folder: a local path, or an address with a scheme that fsspec knows."""
    scheme, separator, rest = str(root).partition("://")
    if not separator:
        return LocalStore(Path(root).expanduser())
    if scheme in ("file", "local"):
        return LocalStore(rest)
    return RemoteStore(str(root))


def newest_of_run(folder: str | Path) -> Published | None:
    """Return the newest whole checkpoint in a folder, or in ``checkpoints`` in it; ``None`` if neither ever held one.

    Raises:
        NoValidCheckpointError: If there are checkpoints, and all of them are damaged.
    """
    for place in (str(folder), os.path.join(folder, "checkpoints")):
        store = open_store(place)
        if store.latest() is not None or store.published():  # not just anybody's adapters side by side
            return store.newest_valid()
    return None


def _is_folder(entry: Mapping[str, Any]) -> bool:
    return bool(entry["type"] == "directory")
