import os
import subprocess
import sys

import pytest

from lightning_qlora.environment import environment

NAME = "LIGHTNING_QLORA_TEST"


@pytest.mark.parametrize("given", [None, "", "before"])
def test_variables_are_set_for_a_while_for_this_process_and_those_it_starts(monkeypatch, given):
    monkeypatch.delenv(NAME, raising=False)
    if given is not None:
        monkeypatch.setenv(NAME, given)
    with environment(**{NAME: "meanwhile"}):
        code = f"import os; print(os.environ[{NAME!r}])"
        assert subprocess.check_output([sys.executable, "-c", code], text=True) == "meanwhile\n"
    assert os.environ.get(NAME) == given


def test_they_come_back_whatever_happened(monkeypatch):
    monkeypatch.setenv(NAME, "before")

    def fail():
        with environment(**{NAME: "meanwhile"}):
            del os.environ[NAME]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.environ[NAME] == "before"
