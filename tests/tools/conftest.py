"""What tests of tools share."""

import pytest
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("chatml")


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=tokenizer)
