"""What a published checkpoint says of itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

__all__ = [
    "MANIFEST_NAME",
    "DamagedCheckpointError",
    "FileRecord",
    "NoValidCheckpointError",
    "Published",
    "dump_manifest",
    "hash_stream",
    "parse_manifest",
    "read_manifest",
]

MANIFEST_NAME = "manifest.json"
_FORMAT = 1
_CHUNK_BYTES = 1 << 22


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was published, or never was published as a whole."""


class NoValidCheckpointError(ValueError):
    """There are checkpoints, and none of them can be trusted."""


class FileRecord(NamedTuple):
    """What the manifest says of one file.

    Attributes:
        size: In bytes.
        sha256: Of the content, in hexadecimal.
    """

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Published:
    """A published checkpoint, as its manifest describes it.

    Attributes:
        path: The directory, or its address on a remote file system.
        serial: Counts the checkpoints of one folder; the highest is the newest, whatever the clocks say.
        files: Each file, by its path inside the directory.
        metadata: What the publisher wanted to be known of it.
    """

    path: str
    serial: int
    files: dict[str, FileRecord]
    metadata: dict[str, Any]

    @property
    def name(self) -> str:
        """The directory's own name."""
        return PurePosixPath(self.path.replace(os.sep, "/")).name

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, the manifest not counted."""
        return sum(record.size for record in self.files.values())


def dump_manifest(serial: int, files: Mapping[str, FileRecord], metadata: Mapping[str, Any]) -> bytes:
    """Write a manifest that carries a digest of itself."""
    content = {
        "format": _FORMAT,
        "serial": serial,
        "files": {name: record._asdict() for name, record in sorted(files.items())},
        "metadata": metadata,
    }
    checked = {**content, "sha256": _digest_of(content)}
    return (json.dumps(checked, indent=1) + "\n").encode()


def _digest_of(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def parse_manifest(path: str, data: bytes) -> Published:
    """Read a manifest that vouches for itself by its own digest."""
    try:
        content = json.loads(data)
        claimed = content.pop("sha256")
        if content["format"] != _FORMAT:
            raise DamagedCheckpointError(
                f"{path}: {MANIFEST_NAME} has format {content['format']!r}; this version reads format {_FORMAT}."
            )
        if claimed != _digest_of(content):
            raise DamagedCheckpointError(f"{path}: {MANIFEST_NAME} was changed after it was written.")
        files = {name: FileRecord(int(record["size"]), record["sha256"]) for name, record in content["files"].items()}
        return Published(path, int(content["serial"]), files, content["metadata"])
    except DamagedCheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path}: {MANIFEST_NAME} cannot be read: {error!r}.") from error


def read_manifest(directory: str | Path) -> Published | None:
    """Return what a local directory's manifest says, or ``None`` where there is no manifest.

    Raises:
        DamagedCheckpointError: If there is one that cannot be trusted.
    """
    path = Path(directory)
    try:
        data = (path / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedCheckpointError(f"{path}: {MANIFEST_NAME} cannot be read: {error}.") from error
    return parse_manifest(str(path), data)


def hash_stream(stream: BinaryIO) -> FileRecord:
    """Return the size and digest of what is left to read."""
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return FileRecord(size, digest.hexdigest())
