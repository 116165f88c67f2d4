import subprocess
import sys

import pytest

import lightning_qlora


def test_every_public_name_is_there():
    for name in lightning_qlora.__all__:
        assert getattr(lightning_qlora, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        lightning_qlora.no_such_name  # noqa: B018


def test_the_package_itself_imports_without_torch():
    code = "import sys, lightning_qlora.checkpoints.publishing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
