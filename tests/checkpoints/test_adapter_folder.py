"""Where an adapter is found: in its own folder, or as the newest whole checkpoint of a run."""

import pytest

from lightning_qlora.checkpoints.adapter_folder import find_adapter
from lightning_qlora.checkpoints.publishing import LocalStore, NoValidCheckpointError


def write_adapter(folder):
    (folder / "adapter_config.json").write_text(f'{{"of": "{folder.name}"}}')


@pytest.fixture
def run(tmp_path):
    """The folder of a run with two checkpoints."""
    store = LocalStore(tmp_path / "run/checkpoints")
    for name in ("b-first", "a-second"):
        store.publish(name, write_adapter, {})
    return tmp_path / "run"


def test_an_adapter_folder_is_itself(run):
    assert find_adapter(str(run / "checkpoints/b-first")) == run / "checkpoints/b-first"
    write_adapter(run)
    assert find_adapter(run) == run


@pytest.mark.parametrize("given", ["", "checkpoints"])
def test_a_run_is_its_newest_whole_checkpoint(run, given):
    assert find_adapter(run / given) == run / "checkpoints/a-second"
    (run / "checkpoints/a-second/adapter_config.json").write_text("{}")
    assert find_adapter(run / given) == run / "checkpoints/b-first"
    (run / "checkpoints/b-first/adapter_config.json").unlink()
    with pytest.raises(NoValidCheckpointError, match="b-first: adapter_config.json cannot be read"):
        find_adapter(run / given)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], "it holds nothing, but no adapter_config.json and no checkpoints"),
        (["model.safetensors", "config.json"], "it holds config.json, model.safetensors, but no adapter_config"),
        ([f"{i}.txt" for i in range(10)], "it holds 0.txt, .*, 7.txt and 2 more, but"),
    ],
)
def test_what_was_found_instead_is_said(tmp_path, files, found):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"is no adapter folder: {found}"):
        find_adapter(tmp_path)


@pytest.mark.parametrize(("name", "found"), [("LATEST", "it is a file"), ("gone", "it does not exist")])
def test_no_folder_at_all(run, name, found):
    with pytest.raises(ValueError, match=found):
        find_adapter(run / "checkpoints" / name)
