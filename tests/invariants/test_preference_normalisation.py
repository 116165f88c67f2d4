"""However pairs are cut into micro-batches and dealt to ranks, the optimizer sees the same gradient."""

import lightning as L
import pytest
import torch
from tiny_models import save_tiny_model
from tiny_preferences import ANSWERS, filler_batch, pair_batches, perturb, tiny_preference_module, unpaired_batches
from torch.utils.data import DataLoader

from lightning_qlora.losses import DPOLoss, KTOLoss, ORPOLoss

LEARNING_RATE, CLIP = 1.0, 0.5
MEAN_CHOSEN_TOKENS = sum(chosen for chosen, _ in ANSWERS) / len(ANSWERS)
LOSSES = {"dpo": DPOLoss(0.5), "orpo": ORPOLoss(2.0), "kto": KTOLoss(0.5, desirable_weight=1.5)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"), num_hidden_layers=1)


def make(loss, per_batch):
    """With this seed the divergence of KTO is positive from the second step on, so that it takes part."""
    return pair_batches(per_batch) if loss.is_paired else unpaired_batches(per_batch, seed=7)


def module_for(base, loss):
    options = {"mean_chosen_tokens": MEAN_CHOSEN_TOKENS} if loss.nll_weight else {}
    return tiny_preference_module(
        base, loss=loss, optimizer=lambda params: torch.optim.SGD(params, lr=LEARNING_RATE), **options
    )


class Recorder(L.Callback):
    """Keeps the loss of each optimizer step, and at the end the trained tensors of rank 0."""

    def __init__(self, path=None):
        self.losses, self.path, self.divergence = [], path, 0.0

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(0)  # the adapters of every rank begin alike

    def on_train_batch_end(self, trainer, *_):
        if "train_loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train_loss"]))

    def on_train_end(self, trainer, pl_module):
        self.divergence = float(pl_module._kl)
        if self.path is not None and trainer.is_global_zero:
            trained = {n: p.detach() for n, p in pl_module.named_parameters() if p.requires_grad}
            torch.save({"trained": trained, "losses": self.losses}, self.path)


class Ranks(L.LightningDataModule):
    """Rank r of n trains on the micro-batches r, r + n, ...; a rank that has fewer gets a filler."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        mine = self.batches[self.trainer.global_rank :: self.trainer.world_size]
        longest = -(-len(self.batches) // self.trainer.world_size)
        return DataLoader(mine + [filler_batch()] * (longest - len(mine)), batch_size=None)


def options(accumulate, epochs, recorder):
    return {
        "accelerator": "cpu", "max_epochs": epochs, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "accumulate_grad_batches": accumulate,
        "callbacks": [recorder], "gradient_clip_val": CLIP,
    }  # fmt: skip


def train(base, loss, batches, accumulate, epochs=3):
    recorder = Recorder()
    module = module_for(base, loss)
    L.Trainer(**options(accumulate, epochs, recorder)).fit(module, DataLoader(batches, batch_size=None))
    if loss.needs_kl and epochs > 1:
        assert recorder.divergence > 0.1
    return {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}, recorder.losses


def assert_same(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_micro_batches_do_not_change_the_steps(base, loss):
    """Three steps, so that KTO's divergence, which comes from the step before, is at work."""
    expected, one = train(base, loss, make(loss, 6), 1)
    for per_batch, accumulate in ((1, 6), (4, 2), (1, 8)):
        found, cut = train(base, loss, make(loss, per_batch), accumulate)
        assert_same(found, expected)
        assert cut[-1] == pytest.approx(one[-1], rel=1e-5)
    found, _ = train(base, loss, [*make(loss, 3), filler_batch()], 3)
    assert_same(found, expected)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_two_ranks_take_the_steps_of_one(base, loss, tmp_path):
    expected, one = train(base, loss, make(loss, 6), 1)
    module = module_for(base, loss)
    recorder = Recorder(tmp_path / "rank0.pt")
    trainer = L.Trainer(devices=2, strategy="ddp_fork", use_distributed_sampler=False, **options(2, 3, recorder))
    module.load_state_dict = lambda *_, **__: None  # the parent process, to which spawned weights return, has no model
    trainer.fit(module, datamodule=Ranks(make(loss, 2)))
    found = torch.load(tmp_path / "rank0.pt", weights_only=True)
    assert_same(found["trained"], expected)
    assert found["losses"][-1] == pytest.approx(one[-1], rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_step_is_the_gradient_of_the_documented_equation(base, loss):
    """One step by hand, from each document's log-probabilities under transformers' own logits."""
    found, losses = train(base, loss, make(loss, 2), 3, epochs=1)
    module = module_for(base, loss)
    module.configure_model()
    batch = make(loss, 6)[0]
    policy = torch.stack(
        [
            model_log_prob(module.model, ids, labels)
            for ids, labels in zip(
                batch["input_ids"][0].split(batch["document_lengths"]),
                batch["labels"][0].split(batch["document_lengths"]),
                strict=True,
            )
        ]
    )
    ratio = policy - policy.detach()  # at the first step the reference is the model
    chosen, rejected = batch["chosen"], batch["rejected"]
    tokens = torch.tensor([float(n) for n in batch["num_targets"]])
    if isinstance(loss, DPOLoss):
        value = -torch.nn.functional.logsigmoid(0.5 * (ratio[chosen] - ratio[rejected])).mean()
    elif isinstance(loss, KTOLoss):
        terms = 1.5 * (1 - torch.sigmoid(0.5 * ratio[chosen])), 1 - torch.sigmoid(-0.5 * ratio[rejected])
        value = torch.cat(terms).mean()
    else:
        mean = policy / tokens
        odds = mean - torch.log1p(-mean.exp())
        value = -2.0 * torch.nn.functional.logsigmoid(odds[chosen] - odds[rejected]).mean()
        value = value - policy[chosen].sum() / MEAN_CHOSEN_TOKENS / len(chosen)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(value, list(trained.values()))
    norm = torch.stack([g.norm() for g in gradients]).norm()
    factor = LEARNING_RATE * (CLIP / (norm + 1e-6)).clamp(max=1.0)
    assert_same(found, {n: p.detach() - factor * g for (n, p), g in zip(trained.items(), gradients, strict=True)})
    assert losses[-1] == pytest.approx(float(value.detach()), rel=1e-5)


def model_log_prob(model, ids, labels):
    log_probs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, ids[1:, None])[labels[1:] >= 0, 0].sum()


def test_every_chosen_token_weighs_the_same_in_short_and_long_answers(base):
    """ORPO's likelihood over an epoch of one-pair steps, without clipping: the mean over tokens, not over answers."""
    module = module_for(base, ORPOLoss(1e-9))
    module.configure_model()
    perturb(module)
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    module.log = lambda *_, **__: None
    module.on_fit_start()
    losses = [float(module.training_step(batch, 0).detach()) for batch in pair_batches(1)]
    with torch.no_grad():
        policy, batch = module.log_probs(pair_batches(6)[0]), pair_batches(6)[0]
    tokens = sum(batch["num_targets"][i] for i in batch["chosen"].tolist())
    assert sum(losses) / len(losses) == pytest.approx(float(-policy[batch["chosen"]].sum() / tokens), rel=1e-5)
