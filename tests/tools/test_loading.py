"""Adapters are found by folder, by the checkpoints of a run, and by names of one's own."""

from pathlib import Path

import pytest
import tiny_adapters

from lightning_qlora.checkpoints.identity import IdentityMismatchError
from lightning_qlora.checkpoints.publishing import LocalStore
from lightning_qlora.model import load_base_model
from lightning_qlora.tools.loading import find_adapters, load_for_answers, name_folders, sampling_options


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/runs/a/checkpoints/epoch=0"], ["epoch=0"]),
        (["/runs/a/epoch=0", "/runs/a/epoch=1.5"], ["epoch=0", "epoch=1_5"]),
        (["/runs/a/checkpoints/epoch=0", "/runs/b/checkpoints/epoch=0"], ["a", "b"]),
        (
            ["/runs/a/x/epoch=0", "/runs/b/x/epoch=0", "/runs/b/x/epoch=1"],
            ["a/x/epoch=0", "b/x/epoch=0", "b/x/epoch=1"],
        ),
        ([], []),
    ],
)
def test_a_name_is_what_tells_a_folder_from_the_others(folders, names):
    assert name_folders([Path(folder) for folder in folders]) == names


def write_adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def test_a_run_stands_for_its_newest_checkpoint(tmp_path):
    store = LocalStore(tmp_path / "run/checkpoints")
    older, newest = (Path(store.publish(name, write_adapter, {}).path) for name in ("old", "new"))

    assert find_adapters(str(tmp_path / "run")) == {"new": newest}
    assert find_adapters([str(tmp_path / "run" / "checkpoints")]) == {"new": newest}
    assert find_adapters([str(older), str(newest)]) == {"old": older, "new": newest}
    assert find_adapters({"r=8": str(older), "v1.5": str(newest)}) == {"r=8": older, "v1_5": newest}
    assert find_adapters(None) == {}


def test_refuses_no_adapter_and_the_same_one_twice(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    write_adapter(folder)

    with pytest.raises(ValueError, match="is no adapter folder"):
        find_adapters(str(tmp_path))
    with pytest.raises(ValueError, match="given twice"):
        find_adapters([str(folder), str(folder)])


def test_an_adapter_that_moves_the_base_is_loaded_alone(base, tokenizer, tmp_path):
    options = {"tokenizer": tokenizer, "manifest": True}
    olora, plain = (
        Path(tiny_adapters.write_adapter(tmp_path / str(init), base, init_lora_weights=init, **options))
        for init in ("olora", True)
    )
    load_for_answers({"olora": olora})
    other = load_base_model(base, quantization=None)
    other.model.layers[0].self_attn.q_proj.weight.data[5, 7] += 0.5
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(IdentityMismatchError, match=r"here:\n  base\.quantized_tensors: published with"):
        load_for_answers({"olora": olora}, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="'olora' was begun with init_lora_weights='olora'.*ask it alone"):
        load_for_answers({"olora": olora, "plain": plain})


def test_only_options_that_change_something_are_passed_on():
    assert sampling_options(0, 1, 0, 1) == {}
    assert sampling_options(0, 1, 0, 1.2) == {"repetition_penalty": 1.2}
    assert sampling_options(0.7, 0.9, 5, 1) == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
