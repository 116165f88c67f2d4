"""PreferenceModule: its log-probabilities, its reference, where it starts, what it measures and keeps."""

import json
import math
import re
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig
from tiny_models import save_tiny_model
from tiny_preferences import (
    ANSWERS,
    as_batch,
    filler_batch,
    pair_batches,
    perturb,
    random_documents,
    tiny_preference_module,
    unpaired_batches,
)
from tiny_run import TinyPairs
from torch.utils.data import DataLoader

from lightning_qlora.callbacks import AdapterCheckpoint
from lightning_qlora.checkpoints.identity import IdentityMismatchError
from lightning_qlora.checkpoints.publishing import LocalStore
from lightning_qlora.losses import CPOLoss, DPOLoss, IPOLoss, KTOLoss, ORPOLoss, SimPOLoss
from lightning_qlora.model import attach_adapters, load_base_model, save_adapter
from lightning_qlora.modules import PreferenceModule
from lightning_qlora.modules.preference import _sum_by_document

MEAN_CHOSEN_TOKENS = sum(chosen for chosen, _ in ANSWERS) / len(ANSWERS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter folder as supervised fine-tuning leaves it: away from zero, with dropout."""
    torch.manual_seed(5)
    lora = LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    model = attach_adapters(load_base_model(base), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder)
    return str(folder)


def trainer(**options):
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", enable_progress_bar=False, **{**defaults, **options})


def loader(batches):
    return DataLoader(batches, batch_size=None)


def built(base, **options):
    module = tiny_preference_module(base, **options)
    module.configure_model()
    return module


def trainable(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def log_probs_of_transformers(model, batch):
    """Each document by itself, through the whole logits."""
    found = []
    for ids, labels in zip(
        batch["input_ids"][0].split(batch["document_lengths"]),
        batch["labels"][0].split(batch["document_lengths"]),
        strict=True,
    ):
        log_probs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        taken = log_probs.gather(1, ids[1:, None])[:, 0]
        found.append(taken[labels[1:] >= 0].sum())
    return torch.stack(found)


# Log-probabilities and the reference


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_log_probs_are_those_of_each_document_alone_packed_or_padded(family, tmp_path):
    module = built(save_tiny_model(tmp_path, family, **({"logits_scaling": 4.0} if family == "granite" else {})))
    perturb(module)
    packed, padded = pair_batches(6)[0], pair_batches(6, packed=False)[0]
    expected = log_probs_of_transformers(module.model, packed)
    for batch in (packed, padded):
        found = module.log_probs(batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
        gradients = torch.autograd.grad(found.sum(), [p for p in module.parameters() if p.requires_grad])
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_the_reference_of_fresh_adapters_is_the_base_without_them(base):
    module = built(base, lora={"lora_dropout": 0.5})
    batch = pair_batches(6)[0]
    start = module.reference_log_probs(batch)
    perturb(module)
    assert torch.equal(module.reference_log_probs(batch), start)
    assert (module.log_probs(batch) - start).abs().min() > 1e-4
    torch.testing.assert_close(start, log_probs_of_transformers(load_base_model(base), batch), rtol=1e-5, atol=1e-4)


def test_the_reference_of_a_continued_adapter_is_a_frozen_copy_of_it(base, adapter):
    module = built(base, adapter=adapter)
    batch = pair_batches(6)[0]
    base_alone = log_probs_of_transformers(load_base_model(base), batch)
    start = module.reference_log_probs(batch)
    assert (start - base_alone).abs().min() > 1e-4
    perturb(module)
    assert torch.equal(module.reference_log_probs(batch), start)
    assert (module.log_probs(batch) - start).abs().min() > 1e-4
    names = trainable(module)
    assert names
    assert all(".default." in name for name in names)
    assert set(module.state_dict()) == set(names)
    assert any(".reference." in name for name, _ in module.named_parameters())


@pytest.mark.parametrize(
    "lora",
    [{}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}, {"use_dora": True}],
    ids=["lora", "modules_to_save", "tokens", "dora"],
)
@pytest.mark.parametrize("continued", [False, True])
def test_a_reference_forward_leaves_the_model_as_it_was(base, lora, continued, tmp_path):
    options = {"lora": {"lora_dropout": 0.1, **lora}}
    if continued:
        first = built(base, **options)
        perturb(first)
        save_adapter(first.model, tmp_path)
        options = {"adapter": str(tmp_path)}
    module = built(base, **options)
    state = lambda: (  # noqa: E731
        {name: p.requires_grad for name, p in module.named_parameters()},
        {name: m.training for name, m in module.named_modules()},
        module.model.active_adapter,
    )
    before, batch = state(), pair_batches(2)[0]
    start = module.reference_log_probs(batch)
    assert state() == before
    with torch.inference_mode():
        module.reference_log_probs(batch)
    assert state() == before
    perturb(module)
    torch.testing.assert_close(module.reference_log_probs(batch), start, rtol=0, atol=0)
    with pytest.raises(KeyError):
        module.reference_log_probs({})
    assert state() == before


def test_losses_without_reference_run_none_and_hold_no_second_adapter(base, adapter, monkeypatch):
    monkeypatch.setattr(PreferenceModule, "reference_log_probs", None)
    for loss in (ORPOLoss(), SimPOLoss(), CPOLoss()):
        module = tiny_preference_module(base, adapter=adapter, loss=loss, mean_chosen_tokens=MEAN_CHOSEN_TOKENS)
        trainer(max_steps=1).fit(module, loader(pair_batches(2)), loader(pair_batches(2)))
        assert list(module.model.peft_config) == ["default"]


def test_an_adapter_of_another_base_is_refused_by_name(base, tmp_path):
    publisher = AdapterCheckpoint(tmp_path / "run", every_n_train_steps=1)
    run = trainer(callbacks=[publisher], enable_checkpointing=True, max_steps=1)
    run.fit(tiny_preference_module(base), loader(pair_batches(2)))
    assert not any("reference" in str(path) for path in (tmp_path / "run").rglob("*"))
    folder = str(tmp_path / "run")  # the newest checkpoint in it
    assert str(built(base, adapter=folder).adapter_folder) == LocalStore(folder).published()[0].path
    torch.manual_seed(9)
    other = save_tiny_model(tmp_path / "other", intermediate_size=64)
    with pytest.raises(IdentityMismatchError, match="base"):
        built(other, adapter=folder)


def test_publishing_a_continued_adapter_leaves_the_reference_out(base, adapter, tmp_path):
    publisher = AdapterCheckpoint(tmp_path, every_n_train_steps=1)
    module = tiny_preference_module(base, adapter=adapter)
    trainer(callbacks=[publisher], enable_checkpointing=True, max_steps=1).fit(module, loader(pair_batches(2)))
    assert [path.name for path in tmp_path.rglob("adapter_model.safetensors")] == ["adapter_model.safetensors"]
    again = built(base, adapter=LocalStore(tmp_path).published()[-1].path)
    found, expected = trainable(again), trainable(module)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# Where training starts


@pytest.mark.parametrize("loss", [DPOLoss(), DPOLoss(0.5, 0.1), IPOLoss(), KTOLoss()])
@pytest.mark.parametrize("continued", [False, True])
def test_the_first_step_starts_at_the_reference(base, adapter, loss, continued):
    module = tiny_preference_module(base, loss=loss, **({"adapter": adapter} if continued else {}))
    run = trainer(max_steps=1)
    run.fit(module, loader((pair_batches if loss.is_paired else unpaired_batches)(6)))
    if isinstance(loss, DPOLoss) and not continued:  # without dropout
        assert run.callback_metrics["train_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert run.callback_metrics["train_reward_margin"] == pytest.approx(0, abs=1e-6)


def test_adapters_that_do_not_start_at_the_base_are_refused(base):
    module = tiny_preference_module(base, lora={"init_lora_weights": False})
    with pytest.raises(MisconfigurationException, match=r"not ln 2 = 0.6931.*init_lora_weights: true"):
        trainer().fit(module, loader(pair_batches(2)))


def test_log_probs_of_another_reference_are_refused(base, adapter):
    foreign = built(base, adapter=adapter)
    batches = [{**batch, "reference_log_probs": foreign.reference_log_probs(batch)} for batch in pair_batches(2)]
    with pytest.raises(MisconfigurationException, match="that the batch brings"):
        trainer().fit(tiny_preference_module(base), loader(batches))


def test_biases_that_change_the_base_are_refused_where_it_is_the_reference(base):
    with pytest.raises(MisconfigurationException, match="bias: none"):
        tiny_preference_module(base, lora={"bias": "lora_only"})
    tiny_preference_module(base, lora={"bias": "lora_only"}, loss=SimPOLoss())


def test_given_reference_log_probs_save_the_forward(base, monkeypatch):
    module = built(base)
    batches = [{**batch, "reference_log_probs": module.reference_log_probs(batch)} for batch in pair_batches(2)]
    results = []
    for given in (pair_batches(2), batches):
        if given is batches:
            monkeypatch.setattr(PreferenceModule, "reference_log_probs", None)
        module = tiny_preference_module(base, lr=1e-2)
        trainer(max_epochs=2).fit(module, loader(given))
        results.append(trainable(module))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# What a batch must hold


def test_kinds_of_batches_and_losses_must_agree(base):
    with pytest.raises(MisconfigurationException, match="loss: KTOLoss"):
        trainer().fit(tiny_preference_module(base), loader(unpaired_batches(3)))
    with pytest.raises(MisconfigurationException, match="unpaired: true"):
        trainer().fit(tiny_preference_module(base, loss=KTOLoss()), loader(pair_batches(3)))


def test_the_likelihood_of_tokens_needs_to_know_their_mean_number(base):
    with pytest.raises(MisconfigurationException, match="mean_chosen_tokens"):
        trainer().fit(tiny_preference_module(base, loss=ORPOLoss()), loader(pair_batches(3)))
    trainer(max_steps=1).fit(
        tiny_preference_module(base, loss=ORPOLoss(likelihood_weight=0.0)), loader(pair_batches(3))
    )


def test_nothing_to_precompute_for_a_loss_without_reference(base):
    with pytest.raises(MisconfigurationException, match="Remove precompute_reference"):
        tiny_preference_module(base, loss=ORPOLoss(), precompute_reference=True)
    with pytest.raises(MisconfigurationException, match="knows its documents beforehand"):
        trainer().fit(tiny_preference_module(base, precompute_reference=True), loader(pair_batches(3)))


def test_a_batch_without_pairs_adds_an_exact_zero(base):
    for loss in (DPOLoss(), KTOLoss(), SimPOLoss()):
        module = built(base, loss=loss)
        module.trainer = trainer()
        module.log = lambda *_, **__: None
        loss_sum = module.training_step(filler_batch(), 0)
        loss_sum.backward()
        assert loss_sum == 0
        assert all(p.grad is None or p.grad.abs().sum() == 0 for p in module.parameters())


# Metrics


def whole_loss(loss, module, batch):
    """The equation of the docstring on all answers at once."""
    with torch.no_grad():
        policy, reference = module.log_probs(batch), module.reference_log_probs(batch)
    tokens = torch.tensor([float(n) for n in batch["num_targets"]])
    ratio, chosen, rejected = policy - reference, batch["chosen"], batch["rejected"]
    if isinstance(loss, KTOLoss):
        z = ratio[batch["mismatched"]].mean().clamp(min=0)
        terms = torch.cat(
            [1 - torch.sigmoid(0.1 * (ratio[chosen] - z)), 1 - torch.sigmoid(0.1 * (z - ratio[rejected]))]
        )
        return terms.mean()
    if isinstance(loss, ORPOLoss):
        mean = policy / tokens
        odds = mean - torch.log1p(-mean.exp())
        nll = -policy[chosen].sum() / tokens[chosen].sum()
        return nll - 0.1 * torch.nn.functional.logsigmoid(odds[chosen] - odds[rejected]).mean()
    return -torch.nn.functional.logsigmoid(0.1 * (ratio[chosen] - ratio[rejected])).mean()


@pytest.mark.parametrize("loss", [DPOLoss(), ORPOLoss(), KTOLoss()], ids=["dpo", "orpo", "kto"])
def test_metrics_are_exact_however_the_answers_are_cut(base, loss):
    make = pair_batches if loss.is_paired else unpaired_batches
    module = built(base, loss=loss)
    perturb(module, 0.2)
    found = []
    for per_batch in (6, 4, 1):
        batches = [*make(per_batch), filler_batch()]
        found.append(trainer().validate(module, loader(batches), verbose=False)[0])
    for other in found[1:]:
        assert other == {name: pytest.approx(value, rel=1e-5, abs=1e-5) for name, value in found[0].items()}
    batch, measured = make(6)[0], found[0]
    assert measured["val_loss"] == pytest.approx(float(whole_loss(loss, module, batch)), rel=1e-5)
    with torch.no_grad():
        policy, reference = module.log_probs(batch), module.reference_log_probs(batch)
    tokens = torch.tensor([float(n) for n in batch["num_targets"]])
    chosen, rejected = batch["chosen"], batch["rejected"]
    assert measured["val_log_prob_chosen"] == pytest.approx(float(policy[chosen].mean()), rel=1e-5)
    assert measured["val_nll"] == pytest.approx(float(-policy[chosen].sum() / tokens[chosen].sum()), rel=1e-5)
    assert measured["val_length_difference"] == pytest.approx(
        float(tokens[chosen].mean() - tokens[rejected].mean()), rel=1e-5
    )
    ratio = policy - reference
    if loss.is_paired:
        assert measured["val_longer_chosen"] == pytest.approx(1 / 6)
    if isinstance(loss, DPOLoss):
        margin = 0.1 * (ratio[chosen] - ratio[rejected])
        assert measured["val_reward_margin"] == pytest.approx(float(margin.mean()), rel=1e-4, abs=1e-6)
        assert measured["val_reward_accuracy"] == pytest.approx(float((margin > 0).float().mean()))
        assert measured["val_kl"] == pytest.approx(float(ratio.mean()), rel=1e-4, abs=1e-5)
    if isinstance(loss, KTOLoss):
        assert measured["val_kl"] == pytest.approx(float(ratio[batch["mismatched"]].mean()), rel=1e-4, abs=1e-5)


def test_each_loader_is_measured_by_itself_also_before_training(base):
    module = built(base, lr=1e-2)
    loaders = [loader(pair_batches(2, seed=seed)) for seed in (3, 4)]
    trainer().validate(module, loaders, verbose=False)
    run = trainer(max_epochs=2)
    run.fit(module, loader(pair_batches(3)), loaders)
    fitted = {name: float(value) for name, value in run.callback_metrics.items()}
    tested = trainer().test(module, loaders, verbose=False)
    for index, one in enumerate(loaders):
        alone = trainer().validate(module, one, verbose=False)[0]
        assert len({*alone, "val_loss", "val_reward_margin", "val_length_difference", "val_nll"}) == len(alone) == 11
        for name, value in alone.items():
            assert fitted[f"{name}/dataloader_idx_{index}"] == value
            assert tested[index][f"{name.replace('val_', 'test_')}/dataloader_idx_{index}"] == value


def test_training_learns_to_prefer(base):
    module = tiny_preference_module(base, lr=1e-2)
    run = trainer(max_epochs=8)
    run.fit(module, loader(pair_batches(2)), loader(pair_batches(3)))
    assert run.callback_metrics["val_reward_accuracy"] == 1.0
    assert run.callback_metrics["val_loss"] < 0.4
    run.test(module, loader(pair_batches(3)), verbose=False)
    assert run.callback_metrics["test_reward_accuracy"] == 1.0


# Checkpoints


class SaveInside(L.Callback):
    """In the middle of the second epoch of three batches."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("loss", [DPOLoss(), ORPOLoss()], ids=["dpo", "orpo"])
def test_a_resumed_epoch_is_measured_whole(base, loss, tmp_path):
    path, found = tmp_path / "inside.ckpt", []
    for callbacks, resume in (([SaveInside(path)], None), ([], path)):
        module = tiny_preference_module(base, loss=loss, mean_chosen_tokens=4.5, lr=1e-2)
        run = trainer(max_epochs=2, callbacks=callbacks, num_sanity_val_steps=0)
        run.fit(module, datamodule=TinyPairs(batches=3), ckpt_path=resume)
        found.append({name: float(value) for name, value in run.callback_metrics.items() if "train" in name})
    assert found[0]["train_reward_margin"] != 0
    assert found[0] == found[1]


class SaveHalfway(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("loss", [DPOLoss(), KTOLoss()], ids=["dpo", "kto"])
@pytest.mark.parametrize("continued", [False, True])
def test_resumes_bit_for_bit_also_the_divergence(base, adapter, loss, continued, tmp_path):
    options = {"loss": loss, "lr": 1e-2}
    if continued:
        config = json.loads((Path(adapter) / "adapter_config.json").read_text())
        shutil.copytree(adapter, tmp_path / "adapter")
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.0}))
        options["adapter"] = str(tmp_path / "adapter")
    results = []
    for callbacks, resume in (([SaveHalfway(tmp_path / "half.ckpt")], None), ([], tmp_path / "half.ckpt")):
        module = tiny_preference_module(base, **options)
        batches = (pair_batches if loss.is_paired else unpaired_batches)(2)
        trainer(max_epochs=4, callbacks=callbacks).fit(module, loader(batches), ckpt_path=resume)
        results.append((trainable(module), module._kl))
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert not any("reference" in name for name in saved["state_dict"])
    assert (saved["lightning_qlora"]["kl"] != 0) == loss.needs_kl
    assert results[0][1] == results[1][1]
    assert all(torch.equal(results[0][0][name], value) for name, value in results[1][0].items())


def test_another_reference_is_refused_when_a_run_goes_on(base, adapter, tmp_path):
    path = tmp_path / "half.ckpt"
    first = tiny_preference_module(base, adapter=adapter)
    trainer(max_epochs=2, callbacks=[SaveHalfway(path)]).fit(first, loader(pair_batches(2)))
    save_adapter(first.model, tmp_path / "other")
    for options in ({"adapter": str(tmp_path / "other")}, {"lora": {"lora_dropout": 0.3}}):
        module = tiny_preference_module(base, **options)
        told = re.escape(options.get("adapter", "the base"))
        with pytest.raises(ValueError, match=rf"was the adapter in .*{told}.* Write adapter: {re.escape(adapter)}"):
            trainer(max_epochs=3).fit(module, loader(pair_batches(2)), ckpt_path=path)


def test_hyperparameters_written_are_plain_data(base):
    module = tiny_preference_module(base, loss=KTOLoss())
    json.dumps(dict(module.hparams))
    assert "loss" not in module.hparams


def test_answers_that_share_a_row_of_the_batch_are_weighed_apart():
    """Sums go by document, whatever lies between the supervised tokens."""
    documents, masks = random_documents([(4, 3), (4, 5), (4, 2)], 0)
    batch = as_batch(documents, masks, chosen=[2], rejected=[0])
    assert _sum_by_document(torch.ones(10), batch).tolist() == [3, 5, 2]
