"""Names of the package are imported when they are asked for."""

from __future__ import annotations

import importlib
import json

import jsonargparse
import lightning.pytorch as pl
import pytest

import lightning_qlora.data


def test_every_public_name_is_there():
    assert lightning_qlora.data.__all__ == sorted(lightning_qlora.data._MODULE_OF, key=lambda n: (n.islower(), n))
    for name, module in lightning_qlora.data._MODULE_OF.items():
        home = importlib.import_module(f"lightning_qlora.data.{module}")
        assert getattr(lightning_qlora.data, name) is getattr(home, name)
    with pytest.raises(AttributeError, match=r"module 'lightning_qlora\.data' has no attribute 'Tokens'"):
        lightning_qlora.data.Tokens  # noqa: B018


def test_classes_are_found_by_their_public_path():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningDataModule, "data")
    given = {
        "class_path": "lightning_qlora.data.SFTDataModule",
        "init_args": {"train": "rows.jsonl", "tokenizer": "some-tokenizer"},
    }
    config = parser.parse_args(["--data", json.dumps(given)])
    assert type(parser.instantiate_classes(config).data) is lightning_qlora.data.SFTDataModule
