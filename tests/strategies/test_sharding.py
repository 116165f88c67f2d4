"""A rank that fails alone while the model is built takes all others with it at once, on gloo processes."""

import time

import pytest
from peft.tuners.lora.model import LoraModel
from tiny_adapters import write_adapter
from tiny_models import save_tiny_model
from tiny_ranks import run_ranks
from tiny_run import TinyData, tiny_module, tiny_trainer
from transformers.utils.logging import is_progress_bar_enabled

from lightning_qlora.modules import SFTModule
from lightning_qlora.ranks import RankError
from lightning_qlora.strategies import FSDP2Strategy, QLoRADDPStrategy

pytestmark = pytest.mark.filterwarnings("ignore")  # of the forked processes; nothing here depends on warnings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), num_hidden_layers=3)


class Broken(SFTModule):
    """Fails on one rank: while the base is read, while adapters are put on it, or when both are done."""

    where, on_rank = "reading", 1

    def _fails(self, where):
        return (where, self.global_rank) == (self.where, self.on_rank)

    def load_base(self, device):
        if self._fails("reading"):
            raise OSError(5, "Input/output error")
        return super().load_base(device)

    def _build(self, base):
        if self._fails("identity"):
            self.adapter = "nowhere"
        attach, attached = LoraModel._create_and_replace, []

        def failing(*args, **options):
            attached.append(attach(*args, **options))
            if self._fails("attaching") and len(attached) == 10:
                raise MemoryError("out of memory")

        LoraModel._create_and_replace = failing  # this process is forked for the test
        return super()._build(base)

    def on_model_built(self):
        if self._fails("built"):
            raise ValueError("no")


def fit(base, root, strategy, where, on_rank, **options):
    module = tiny_module(base, kind=Broken, **options)
    module.where, module.on_rank = where, on_rank
    trainer = tiny_trainer(root, strategy=strategy(), devices=2, max_epochs=1, enable_checkpointing=False)
    began = time.monotonic()
    try:
        trainer.fit(module, datamodule=TinyData(batches=2))
    except (OSError, MemoryError, ValueError, RankError) as error:
        return type(error).__name__, str(error), time.monotonic() - began
    return "trained", "", 0.0


@pytest.mark.parametrize(
    ("strategy", "where", "on_rank", "message"),
    [
        (FSDP2Strategy, "reading", 1, "OSError: [Errno 5] Input/output error"),
        (FSDP2Strategy, "identity", 1, "ValueError: 'nowhere' is no adapter folder"),
        (FSDP2Strategy, "attaching", 0, "MemoryError: out of memory"),
        (FSDP2Strategy, "built", 0, "ValueError: no"),
        (QLoRADDPStrategy, "reading", 1, "OSError: [Errno 5] Input/output error"),
    ],
)
def test_all_ranks_end_with_the_message_of_the_one_that_failed(base, tmp_path, strategy, where, on_rank, message):
    options = {}
    if where == "identity":
        options["adapter"] = str(write_adapter(tmp_path / "adapter", base, manifest=True, task_type="CAUSAL_LM"))
    ends = run_ranks(tmp_path / "ranks", lambda: fit(base, tmp_path, strategy, where, on_rank, **options))
    name, own, _ = ends[on_rank]
    other, told, seconds = ends[1 - on_rank]
    assert f"{name}: {own}".startswith(message)
    assert (other, told) == ("RankError", f"Rank {on_rank} failed: {name}: {own}")
    assert seconds < 30  # and not after the minutes that a process group waits


@pytest.mark.parametrize("strategy", [FSDP2Strategy, QLoRADDPStrategy])
def test_where_none_fails_all_train_and_one_shows_how_loading_goes_on(base, tmp_path, strategy, capfd):
    ends = run_ranks(tmp_path, lambda: (*fit(base, tmp_path, strategy, "", 0), is_progress_bar_enabled()))
    assert {end[0] for end in ends} == {"trained"}
    assert {end[-1] for end in ends} == {True}
    assert capfd.readouterr().err.count("Loading weights: 100%") == 1
