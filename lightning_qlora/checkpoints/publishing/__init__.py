"""How a folder of files becomes a checkpoint that neither a kill nor a full disk can tear.

A checkpoint is one directory. It is written under a hidden name on the file system where it will stay, checked,
flushed to the disk together with a manifest of its files' sizes and SHA-256 digests, and only then renamed to the
name that readers look for. Whatever happens in between, a reader finds the whole old state or the whole new one.

Nothing here knows what the files mean: no torch, no Lightning. :func:`open_store` is the way in.
"""

from lightning_qlora.checkpoints.publishing.background import BackgroundJob
from lightning_qlora.checkpoints.publishing.local import LocalStore, verify
from lightning_qlora.checkpoints.publishing.manifest import (
    MANIFEST_NAME,
    DamagedCheckpointError,
    FileRecord,
    NoValidCheckpointError,
    Published,
    read_manifest,
)
from lightning_qlora.checkpoints.publishing.remote import RemoteStore, newest_of_run, open_store
from lightning_qlora.checkpoints.publishing.store import LATEST_NAME, CheckpointStore

__all__ = [
    "LATEST_NAME",
    "MANIFEST_NAME",
    "BackgroundJob",
    "CheckpointStore",
    "DamagedCheckpointError",
    "FileRecord",
    "LocalStore",
    "NoValidCheckpointError",
    "Published",
    "RemoteStore",
    "newest_of_run",
    "open_store",
    "read_manifest",
    "verify",
]
