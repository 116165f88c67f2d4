"""Publishing survives kills, full disks and damage; see also the soak matrices at the end."""

import builtins
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_qlora.checkpoints.publishing import (
    LATEST_NAME,
    MANIFEST_NAME,
    DamagedCheckpointError,
    LocalStore,
    NoValidCheckpointError,
    RemoteStore,
    open_store,
    read_manifest,
    verify,
)

FILES = {"adapter_model.safetensors": 5000, "adapter_config.json": 200, "trainer.ckpt": 20000, "sub/tokens.bin": 10}


def write_files(tag):
    def write(staging):
        for name, size in FILES.items():
            (staging / name).parent.mkdir(exist_ok=True)
            with open(staging / name, "wb") as stream:
                stream.write(random.Random(f"{tag}{name}").randbytes(size))

    return write


def publish(store, name, **metadata):
    return store.publish(name, write_files(name), metadata, required=("trainer.ckpt",))


def content(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def hidden(root):
    return [p.name for p in root.iterdir() if p.name.startswith(".")]


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    if request.param == "local":
        return open_store(tmp_path / "run")
    return open_store(f"memory://{tmp_path.name}-{time.monotonic_ns()}/run")


# What a store promises, wherever it is


def test_publishes_and_finds_the_newest(store):
    assert store.newest_valid() is None
    assert store.latest() is None
    first, second = publish(store, "epoch=0-step=10", step=10), publish(store, "a-step=5", step=5)
    assert (first.serial, second.serial) == (1, 2)
    assert store.latest() == "a-step=5"
    found = store.newest_valid()
    assert (found.name, found.metadata, found.files) == ("a-step=5", {"step": 5}, second.files)
    assert found.num_bytes == sum(FILES.values())
    assert set(found.files) == set(FILES)
    assert store.verify("epoch=0-step=10").metadata == {"step": 10}


def test_never_overwrites(store):
    publish(store, "a", step=1)
    with pytest.raises(FileExistsError, match="already is a checkpoint"):
        publish(store, "a", step=2)
    assert store.verify("a").metadata == {"step": 1}
    assert [p.name for p in store.published()] == ["a"]


def test_a_required_file_that_was_not_written_is_an_error(store):
    with pytest.raises(OSError, match=r"trainer\.ckpt was not written"):
        store.publish("a", lambda staging: (staging / "trainer.ckpt").touch(), {}, required=("trainer.ckpt",))
    assert store.newest_valid() is None
    assert store.candidates() == []


def test_prune_keeps_two_that_verify(store):
    for step in range(5):
        publish(store, f"step={step}", step=step)
    assert store.prune([f"step={i}" for i in range(5)] + ["gone"], at_least=2) == ["step=0", "step=1", "step=2"]
    assert [p.name for p in store.published()] == ["step=4", "step=3"]
    assert store.prune(["step=3"], at_least=2) == []
    assert store.prune(["step=3"], at_least=1) == ["step=3"]


def test_sweep_leaves_published_ones_alone(store):
    publish(store, "a")
    assert store.sweep() == []
    assert store.newest_valid().name == "a"


def test_open_store_by_address(tmp_path):
    assert isinstance(open_store(tmp_path), LocalStore)
    assert isinstance(open_store(f"file://{tmp_path}"), LocalStore)
    assert isinstance(open_store("memory://x"), RemoteStore)


def test_metadata_may_hold_any_text_and_number(tmp_path):
    metadata = {"config": {"path": "Zoë\udc80", "lr": 1e-4, "nan": float("nan")}}
    publish(LocalStore(tmp_path), "a", **metadata)
    assert repr(LocalStore(tmp_path).verify("a").metadata) == repr(metadata)


def test_read_manifest(tmp_path):
    publish(LocalStore(tmp_path), "a", step=3)
    assert read_manifest(tmp_path / "a").metadata == {"step": 3}
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "nowhere") is None


# Remote: a kill during the upload


def test_an_interrupted_upload_is_no_checkpoint_and_is_swept(monkeypatch):
    root = f"memory://interrupted-{time.monotonic_ns()}"
    store = RemoteStore(root)
    publish(store, "a", step=1)
    monkeypatch.setattr(store._fs, "pipe_file", _failing_at(store._fs.pipe_file, MANIFEST_NAME))
    with pytest.raises(OSError, match="No space"):
        publish(store, "b", step=2)
    monkeypatch.undo()
    assert store.newest_valid().name == "a"
    assert store.sweep() == ["b"]
    assert store.candidates() == ["a"]


def _failing_at(function, word):
    def call(path, *args, **kwargs):
        if word in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(path, *args, **kwargs)

    return call


# Damage: discovery takes the newest that is whole, or refuses


def cut(directory):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(directory):
    path = directory / "trainer.ckpt"
    data = bytearray(path.read_bytes())
    data[1234] ^= 1
    path.write_bytes(data)


def edit_manifest(directory):
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    manifest["metadata"]["step"] = 999
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))


def other_format(directory):
    manifest = json.loads((directory / MANIFEST_NAME).read_text())
    manifest["format"] = 99
    (directory / MANIFEST_NAME).write_text(json.dumps(manifest))


def foreign_manifest(directory):
    sibling = next(p for p in sorted(directory.parent.iterdir()) if p.is_dir() and p != directory)
    (directory / MANIFEST_NAME).write_bytes((sibling / MANIFEST_NAME).read_bytes())


def directory_for_file(directory):
    (directory / "trainer.ckpt").unlink()
    (directory / "trainer.ckpt").mkdir()


DAMAGE = {
    "cut file": (cut, "adapter_model.safetensors has 4999 bytes"),
    "flipped bit": (flip, "trainer.ckpt was changed"),
    "missing file": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    "missing nested file": (lambda d: (d / "sub/tokens.bin").unlink(), "sub/tokens.bin cannot be read"),
    "emptied file": (lambda d: (d / "trainer.ckpt").write_bytes(b""), "trainer.ckpt has 0 bytes"),
    "directory for a file": (directory_for_file, "trainer.ckpt cannot be read"),
    "no manifest": (lambda d: (d / MANIFEST_NAME).unlink(), "manifest.json cannot be read"),
    "empty manifest": (lambda d: (d / MANIFEST_NAME).write_bytes(b""), "manifest.json cannot be read"),
    "cut manifest": (
        lambda d: (d / MANIFEST_NAME).write_bytes((d / MANIFEST_NAME).read_bytes()[:100]),
        "manifest.json cannot be read",
    ),
    "manifest is a list": (lambda d: (d / MANIFEST_NAME).write_text("[]"), "manifest.json cannot be read"),
    "edited manifest": (edit_manifest, "manifest.json was changed"),
    "other format": (other_format, "has format 99"),
    "another one's manifest": (foreign_manifest, "was changed"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_discovery_passes_over_damage(tmp_path, damage):
    harm, message = DAMAGE[damage]
    store = LocalStore(tmp_path)
    publish(store, "good", step=1)
    publish(store, "harmed", step=2)
    harm(tmp_path / "harmed")
    with pytest.raises(DamagedCheckpointError, match=message):
        verify(tmp_path / "harmed")
    found = store.newest_valid()
    assert (found.name, found.metadata) == ("good", {"step": 1})


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "another one's manifest"], ids=str)
def test_nothing_whole_is_refused_not_restarted(tmp_path, damage):
    harm, message = DAMAGE[damage]
    publish(LocalStore(tmp_path), "only")
    harm(tmp_path / "only")
    with pytest.raises(NoValidCheckpointError, match=message):
        LocalStore(tmp_path).newest_valid()


def test_pointer_to_nothing_is_refused(tmp_path):
    (tmp_path / LATEST_NAME).write_text("step=9\n")
    with pytest.raises(NoValidCheckpointError, match=r"step=9.*gone"):
        LocalStore(tmp_path).newest_valid()


def test_a_stale_pointer_does_not_mislead_and_is_put_right(tmp_path):
    store = LocalStore(tmp_path)
    publish(store, "a")
    publish(store, "b")
    (tmp_path / LATEST_NAME).write_text("a\n")
    assert store.newest_valid().name == "b"
    store.sweep()
    assert store.latest() == "b"


def test_other_folders_are_nobodys_checkpoint(tmp_path):
    (tmp_path / "lightning_logs").mkdir()
    (tmp_path / "lightning_logs" / "metrics.csv").touch()
    (tmp_path / "notes.txt").touch()
    assert LocalStore(tmp_path).newest_valid() is None


def test_prune_counts_only_whole_ones(tmp_path):
    store = LocalStore(tmp_path)
    for name in ("a", "b", "c", "d"):
        publish(store, name)
    flip(tmp_path / "c")
    flip(tmp_path / "d")
    assert store.prune(["a", "b"], at_least=2) == []
    assert store.prune(["a", "c"], at_least=1) == ["a", "c"]  # b is whole and stays
    assert store.is_valid("b")


def test_prune_counts_a_state_once(tmp_path):
    store = LocalStore(tmp_path)
    for name, step in (("before", 1), ("old", 2), ("new", 2)):
        publish(store, name, step=step)
    shutil.copytree(tmp_path, tmp_path / "damaged", ignore=shutil.ignore_patterns("damaged"))
    damaged = LocalStore(tmp_path / "damaged")
    flip(tmp_path / "damaged/new")
    for each, removed in ((store, ["old"]), (damaged, [])):
        assert each.prune(["before", "old"], at_least=2, state=lambda item: item.metadata["step"]) == removed


# Faults: an error is raised, and the last good one is byte for byte what it was


class Faults:
    """Lets the n-th file operation fail, once or (a full disk) from then on."""

    def __init__(self, monkeypatch, number=None, code=errno.ENOSPC, lasting=False):
        self.calls, self.number, self.code, self.lasting = [], number, code, lasting
        for name in ("fsync", "rename", "replace", "mkdir"):
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name)))
        monkeypatch.setattr(builtins, "open", self._open(builtins.open))

    def hit(self, what):
        self.calls.append(what)
        index = len(self.calls) - 1
        if index == self.number or (self.lasting and self.number is not None and index > self.number):
            raise OSError(self.code, os.strerror(self.code), what)

    def _counted(self, name, function):
        def call(path, *args, **kwargs):
            if name != "mkdir" or not os.path.isdir(path):  # pathlib tries to make what is there and asks afterwards
                self.hit(name)
            return function(path, *args, **kwargs)

        return call

    def _open(self, function):
        faults = self

        class Stream:
            def __init__(self, inner):
                self.inner = inner

            def write(self, data):
                faults.hit("write")
                return self.inner.write(data)

            def __enter__(self):
                return self

            def __exit__(self, *args):
                return self.inner.__exit__(*args)

            def __getattr__(self, name):
                return getattr(self.inner, name)

        def call(path, mode="r", *args, **kwargs):
            if "r" in mode and "+" not in mode:
                return function(path, mode, *args, **kwargs)
            faults.hit("open")
            return Stream(function(path, mode, *args, **kwargs))

        return call


def count_operations(tmp_path, monkeypatch):
    publish(LocalStore(tmp_path), "good", step=1)
    with monkeypatch.context() as patch:
        faults = Faults(patch)
        publish(LocalStore(tmp_path), "next", step=2)
    return faults.calls


def check_fault(root, monkeypatch, number, code, lasting):
    store = LocalStore(root)
    publish(store, "good", step=1)
    before = content(root / "good")
    with monkeypatch.context() as patch:
        Faults(patch, number, code, lasting)
        with pytest.raises(OSError, match=re.escape(os.strerror(code))) as raised:
            publish(store, "next", step=2)
    assert raised.value.errno == code
    assert content(root / "good") == before
    restarted = LocalStore(root)
    restarted.sweep()
    assert hidden(root) == []
    newest = restarted.newest_valid()
    assert newest.metadata["step"] in (1, 2)
    assert restarted.latest() == newest.name
    publish(restarted, "after", step=3)
    assert restarted.newest_valid().name == "after"


def test_the_faults_reach_every_operation(tmp_path, monkeypatch):
    calls = count_operations(tmp_path, monkeypatch)
    assert len(calls) >= 25
    assert set(calls) == {"fsync", "rename", "replace", "mkdir", "write", "open"}


CODES = (errno.ENOSPC, errno.EACCES, errno.EIO, errno.EDQUOT)


def test_a_fault_at_each_operation(tmp_path, monkeypatch):
    total = len(count_operations(tmp_path / "count", monkeypatch))
    for number in range(total):
        check_fault(tmp_path / str(number), monkeypatch, number, CODES[number % 4], lasting=number % 2 == 0)


@pytest.mark.soak
def test_every_fault_at_each_operation(tmp_path, monkeypatch):
    total = len(count_operations(tmp_path / "count", monkeypatch))
    for number in range(total):
        for code in CODES:
            for lasting in (False, True):
                check_fault(tmp_path / f"{number}-{code}-{lasting}", monkeypatch, number, code, lasting)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB, which holds two or three checkpoints."""
    root = tmp_path / "disk"
    root.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(root)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a file system here")
    yield root
    subprocess.run(["umount", str(root)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    store = LocalStore(small_disk)
    publish(store, "good", step=1)
    before = content(small_disk / "good")
    (small_disk / "filler").write_bytes(bytes(64 << 10))
    with pytest.raises(OSError, match="No space left"):
        publish(store, "next", step=2)
    assert content(small_disk / "good") == before
    assert hidden(small_disk) == []
    (small_disk / "filler").unlink()
    assert publish(store, "next", step=2).serial == 2


# Kills: a process that only publishes is killed at any moment

WRITER = """
import sys, types
package = types.ModuleType("lightning_qlora"); package.__path__ = [sys.argv[2]]  # without the package's heavy imports
sys.modules["lightning_qlora"] = package
import random
from lightning_qlora.checkpoints.publishing import LocalStore
store = LocalStore(sys.argv[1])
store.sweep()
start = max((p.serial for p in store.published()), default=0)
def write(staging):
    for name, size in (("adapter_model.safetensors", 60000), ("adapter_config.json", 300), ("trainer.ckpt", 120000)):
        with open(staging / name, "wb") as stream:
            for _ in range(6): stream.write(random.randbytes(size // 6))
print("ready", flush=True)
for step in range(start + 1, start + 1000):
    store.publish(f"step={step}", write, {"step": step}, required=("trainer.ckpt",))
    store.prune([p.name for p in store.published()], at_least=2)
"""


def kill_while_publishing(root, rng):
    """Start a writer, kill it within its first saves, and check what is left."""
    package = Path(__file__).parents[2] / "lightning_qlora"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(package)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n", process.stderr.read()
    store = LocalStore(root)
    acknowledged = store.newest_valid()
    time.sleep(rng.uniform(0.0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    published = store.published()
    for item in published:
        store.verify(item.name)
    assert sorted(store.candidates()) == sorted(item.name for item in published)
    if acknowledged is not None:
        assert store.newest_valid().serial >= acknowledged.serial
    return bool(hidden(root)) if root.exists() else False


def storm(root, kills, seed):
    rng = random.Random(seed)
    interrupted = sum(kill_while_publishing(root, rng) for _ in range(kills))
    store = LocalStore(root)
    store.sweep()
    assert hidden(root) == []
    store.prune([item.name for item in store.published()], at_least=2)
    assert len(store.published()) == 2
    assert store.latest() == store.newest_valid().name
    return interrupted


def test_kills_never_tear_a_checkpoint(tmp_path):
    assert storm(tmp_path / "run", kills=20, seed=0) >= 3  # that many hit a save in the middle


@pytest.mark.soak
def test_kills_never_tear_a_checkpoint_soak(tmp_path):
    assert storm(tmp_path / "run", kills=400, seed=1) >= 100


def test_sweep_spares_a_save_that_is_under_way(tmp_path):
    writer, other = LocalStore(tmp_path), LocalStore(tmp_path)
    staging = writer.begin("a")
    write_files("a")(staging)
    assert other.sweep() == []
    assert writer.commit(staging, "a", {}).name == "a"
    abandoned = tmp_path / ".staging-b-0"
    abandoned.mkdir()
    assert other.sweep() == [".staging-b-0"]
