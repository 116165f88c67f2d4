"""Preference alignment: losses on the log-probabilities of answers, against a reference made of the same weights."""

from __future__ import annotations

import math
import time
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from lightning_qlora.checkpoints.identity import identify_base
from lightning_qlora.losses.log_probs import head_log_probs
from lightning_qlora.losses.preference import AnswerLogProbs, DPOLoss, PreferenceLoss, PreferenceTerms
from lightning_qlora.modules.base import CHECKPOINT_KEY, CausalLMModule
from lightning_qlora.modules.measured import Measured
from lightning_qlora.modules.metrics import Stage, StageMetrics
from lightning_qlora.modules.preference_metrics import PreferenceMetrics
from lightning_qlora.modules.reference import REFERENCE_ADAPTER, ReferenceTable, adapter_digest, use_adapter
from lightning_qlora.ranks import add_up, on_rank_zero
from lightning_qlora.schema import DataStage, PreferenceBatch, PreferenceData
from lightning_qlora.transfers import send

__all__ = ["PreferenceModule"]

_REPORT_EVERY_SECONDS = 30.0
_START_TOLERANCE = 1e-3
"""How far the first DPO loss may be from ln 2."""
_START_TOLERANCE_16_BIT = 2e-2
"""The same where products are rounded to 16 bits, which no two ways to compute them round alike."""


class PreferenceModule(Measured, CausalLMModule):
    r"""Preference alignment of a 4-bit base with adapters: DPO, ORPO and their kin.

    The reference is never a second base. It is the base without adapters where training starts from the base, and a
    frozen copy of the adapter where it continues from one (``adapter``); losses without a reference run none.

    The gradient of an optimizer step is that of

    .. math:: \frac{1}{P} \Big( \sum_{pairs} \ell + w \frac{1}{m} \sum_{tokens} -\log \pi(token) \Big)

    with P the pairs (for KTO the answers) of the whole step, over its micro-batches and ranks. The second sum, there
    for losses that give the likelihood a weight w, goes over the tokens of the chosen answers; m is their mean number
    for a pair in the training data. So each token weighs the same, in short and long answers, wherever the steps are
    cut; dividing by the tokens of the step would need their number before its first micro-batch.

    KTO's divergence z is estimated over all mismatched answers of the optimizer step before (0 in the first, where
    model and reference are the same), again so that it does not depend on the cut. Validation and test compute their
    loss from all answers at once, with z over all of them and the NLL over all of their tokens.

    Logs ``train_loss`` at each optimizer step, ``val_loss`` and ``test_loss``; and, per epoch of each stage:
    ``reward_chosen``, ``reward_rejected``, ``reward_margin``, ``reward_accuracy``, ``log_prob_chosen`` and
    ``log_prob_rejected`` (of whole answers, in nats), ``nll`` (of the chosen answers per token, in nats), ``kl``
    (the mean log-ratio of model to reference, in nats an answer: over mismatched answers in KTO, and for pairs over
    the answers of the data, which the model need not be likely to give), and the length bias of the data:
    ``length_difference`` (mean tokens of chosen less rejected answers) and ``longer_chosen`` (share of pairs whose
    chosen answer is the longer one). Several data loaders of a stage are measured each by itself, as
    ``val_loss/dataloader_idx_0`` and so on.

    Args:
        model_name: The base: a Hugging Face id, a folder, a .gguf file, or package:NAME for a GGUF file that an
            installed Python package carries.
        loss: What is optimised: DPOLoss, RobustDPOLoss, IPOLoss, HingeLoss, ORPOLoss, SimPOLoss, CPOLoss or KTOLoss;
            null for DPOLoss.
        precompute_reference: Compute the reference's log-probabilities once, before training, and keep them in
            ``$LIGHTNING_QLORA_CACHE/reference`` for every later run on the same base, adapter and data. It pays from
            the second epoch, or run, on.
        mean_chosen_tokens: m of the equation above, for data modules that cannot tell it themselves.
        kwargs: Further arguments of CausalLMModule.
    """

    object_arguments: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(
        self,
        model_name: str,
        *,
        loss: PreferenceLoss | None = None,
        precompute_reference: bool = False,
        mean_chosen_tokens: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_name, **kwargs)
        loss = loss or DPOLoss()
        if precompute_reference and not loss.needs_reference:
            raise MisconfigurationException(
                f"{type(loss).__name__} has no reference to be computed beforehand. Remove precompute_reference."
            )
        bias = getattr(self.lora, "bias", "none")
        if loss.needs_reference and self.adapter is None and bias != "none":
            raise MisconfigurationException(
                f"lora trains biases of the base (bias={bias!r}), so the base without adapters is no longer what "
                f"training started from, and {type(loss).__name__} has no reference. Write bias: none."
            )
        self.loss = loss
        self.precompute_reference = precompute_reference
        self.mean_chosen_tokens = mean_chosen_tokens
        self.reference_adapter: str | None = None
        self._reference_record: dict[str, str] | None = None  # of a reference that is not the base
        self.metrics = StageMetrics(
            {stage: PreferenceMetrics(loss, with_loss=stage != "train") for stage in ("train", "val", "test")}
        )
        self._is_start_checked = False
        self._has_mismatched = False
        self._kl = torch.zeros(())
        self._nll_scale = 0.0

    # Building

    @override
    def on_model_built(self) -> None:
        if self.adapter_folder is None or not self.loss.needs_reference:
            return
        assert self.model is not None
        self.model.load_adapter(str(self.adapter_folder), REFERENCE_ADAPTER, is_trainable=False)
        self.model.train()  # PEFT has put all of it into evaluation mode
        self.reference_adapter = REFERENCE_ADAPTER
        folder = self.adapter_folder
        self._reference_record = {"folder": str(folder), "sha256": adapter_digest(folder)}

    @override
    def on_fit_start(self) -> None:
        data = self._preference_data()
        if self.loss.nll_weight:
            self._nll_scale = self.loss.nll_weight / self._mean_chosen_tokens(data)
        if not self.precompute_reference:
            return
        if data is None or "train" not in data.preference_stages:
            raise MisconfigurationException(
                "precompute_reference needs a data module that knows its documents beforehand, such as "
                "PreferenceDataModule without streaming. Write precompute_reference: false."
            )
        for stage in data.preference_stages:
            self._set_reference_log_probs(data, stage)

    def _preference_data(self) -> PreferenceData | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, PreferenceData) else None

    def _mean_chosen_tokens(self, data: PreferenceData | None) -> float:
        if self.mean_chosen_tokens is not None:
            return self.mean_chosen_tokens
        if data is None:
            raise MisconfigurationException(
                f"{type(self.loss).__name__} weighs the tokens of the chosen answers by their mean number for a pair "
                "in the training data, which only a data module such as PreferenceDataModule tells. Write "
                "mean_chosen_tokens."
            )
        return data.mean_chosen_tokens()

    # The reference

    def log_probs(self, batch: PreferenceBatch) -> Tensor:
        """Return the (K,) summed log-probabilities of the supervised tokens of a batch's documents, in nats."""
        hidden_ND, head = self.supervised_forward(batch)
        log_probs_N, _ = head_log_probs(hidden_ND, head, batch["targets"])
        return _sum_by_document(log_probs_N, batch)

    @torch.no_grad()
    def reference_log_probs(self, batch: PreferenceBatch) -> Tensor:
        """Return the (K,) summed log-probabilities of a batch's documents under the reference, in nats."""
        assert self.model is not None, "configure_model has not run"
        with use_adapter(self.model, self.reference_adapter):
            return self.log_probs(batch)

    def _set_reference_log_probs(self, data: PreferenceData, stage: DataStage) -> None:
        """Give the data the reference log-probabilities of a stage, from the cache or computed now."""
        table = ReferenceTable(self._reference_identity() | {"documents": data.documents_digest(stage)})
        log_probs = on_rank_zero(self.trainer, table.read)
        if log_probs is None:
            log_probs = self._compute_reference(data, stage)
            on_rank_zero(self.trainer, lambda: table.write(log_probs))
        data.set_reference_log_probs(stage, log_probs)

    def _reference_identity(self) -> dict[str, Any]:
        assert self.model is not None
        identity = identify_base(self.model)
        if identity["base"]["tensors"] is not None:  # then names say nothing more
            identity["base"] |= {"name": None, "revision": None}
        return {
            **identity,
            "adapter": None if self._reference_record is None else self._reference_record["sha256"],
            "precision": str(self.trainer.precision),
            "dtype": str(self.model.dtype),
        }

    def _compute_reference(self, data: PreferenceData, stage: DataStage) -> Tensor:
        started = reported = time.monotonic()
        # Of log-probabilities, and of how often they were computed; last, of documents that only fill a batch.
        num_documents = data.num_documents(stage)
        sums = torch.zeros(2, num_documents + 1, device=self.device)
        num_done = 0
        for host_batch in data.reference_batches(stage):
            batch = self.trainer.strategy.batch_to_device(host_batch, self.device)
            with self.trainer.precision_plugin.forward_context():
                log_probs_K = self.reference_log_probs(batch)
            rows = [row if row >= 0 else num_documents for row in batch["row_ids"]]
            rows_K = send(torch.tensor(rows, device="cpu"), self.device)
            sums[0].index_copy_(0, rows_K, log_probs_K.float())
            sums[1].index_fill_(0, rows_K, 1.0)
            num_done += len(rows_K)
            if time.monotonic() > reported + _REPORT_EVERY_SECONDS:
                reported = time.monotonic()
                rank_zero_info(f"Reference of {stage}: {num_done:,} answers in {reported - started:.0f} s.")
        sums = add_up(sums[:, :num_documents].contiguous())
        rank_zero_info(
            f"Computed the reference log-probabilities of {int(sums[1].count_nonzero()):,} {stage} answers once, in "
            f"{time.monotonic() - started:.0f} s."
        )
        return (sums[0] / sums[1]).cpu()  # NaN where there is no document

    # Steps

    def _step(
        self, batch: PreferenceBatch, stage: Stage, dataloader_idx: int = 0
    ) -> tuple[PreferenceTerms, tuple[AnswerLogProbs, ...]]:
        self._check_kind(batch)
        reference_K = batch["reference_log_probs"]
        if self.loss.needs_reference and reference_K is None:
            reference_K = self.reference_log_probs(batch)
        if stage == "train" and not self._is_start_checked:
            self._check_start(batch, reference_K)
        answers = _answers(batch, self.log_probs(batch), reference_K if self.loss.needs_reference else None)
        chosen, rejected, _ = answers
        terms = self.loss(chosen, rejected, self._kl.to(self.device) if self.loss.needs_kl else None)
        metrics: Any = self.metrics.of(stage, dataloader_idx)
        metrics.add_batch(terms, *answers)
        self.metrics.log(self, stage, dataloader_idx, shown=frozenset({"val_loss", "val_reward_accuracy"}))
        return terms, answers

    @override
    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        terms, (chosen, _, mismatched) = self._step(batch, "train")
        self.metrics.keep_sums(batch_idx)
        loss_sum = terms.loss_sum
        if self.loss.nll_weight:
            loss_sum = loss_sum - self._nll_scale * chosen.policy.sum()
        extras: tuple[Tensor, ...] = ()
        if self.loss.needs_kl:
            count = loss_sum.new_full((), float(len(mismatched.policy)))
            extras = mismatched.log_ratio.detach().sum(), count
        self.count_terms(loss_sum, terms.num_terms, *extras)
        return loss_sum

    @override
    def on_step_totals(self, extras: Tensor) -> None:
        if self.loss.needs_kl:  # a step without mismatched answers leaves the estimate as it was
            self._kl = torch.where(extras[1] > 0, extras[0] / extras[1].clamp(min=1.0), self._kl.to(extras.device))
            if not self._has_mismatched:
                raise MisconfigurationException(
                    f"{type(self.loss).__name__} estimates how far the model has moved from answers put to other "
                    "prompts, and the batches of the first step hold none. Write unpaired: true in the options of "
                    "PreferenceDataModule."
                )

    @override
    def validation_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._step(batch, "val", dataloader_idx)

    @override
    def test_step(self, batch: PreferenceBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._step(batch, "test", dataloader_idx)

    def _check_kind(self, batch: PreferenceBatch) -> None:
        """Refuse single answers where pairs are needed, and look for what KTO needs."""
        num_chosen, num_rejected, num_mismatched = (len(batch[k]) for k in ("chosen", "rejected", "mismatched"))
        self._has_mismatched |= num_mismatched > 0
        if self.loss.is_paired and (num_chosen != num_rejected or num_mismatched):
            raise MisconfigurationException(
                f"{type(self.loss).__name__} compares the two answers of a pair, and this batch holds single answers: "
                f"{num_chosen} desirable and {num_rejected} undesirable ones. Write loss: KTOLoss, or give pairs."
            )

    @torch.no_grad()
    def _check_start(self, batch: PreferenceBatch, reference_K: Tensor | None) -> None:
        """Make sure that training starts at its reference: margins of 0, and a DPO loss of ln 2.

        Raises:
            MisconfigurationException: If it does not; every reward would then be measured from a wrong zero.
        """
        self._is_start_checked = True
        if reference_K is None or not self.loss.needs_reference:
            return
        assert self.model is not None
        with use_adapter(self.model, self.model.active_adapter):  # dropout off
            policy_K = self.log_probs(batch)
        chosen, rejected, _ = _answers(batch, policy_K, reference_K)
        sides = [side for side in (chosen, rejected) if len(side.policy)]
        if not sides:
            return
        drift = max(float(side.mean_log_ratio.abs().mean()) for side in sides)
        margins_P = self.loss.reward(chosen) - self.loss.reward(rejected) if self.loss.is_paired else policy_K[:0]
        loss = float(-functional.logsigmoid(margins_P).mean()) if len(margins_P) else math.log(2)
        is_rounded = self.model.dtype.itemsize < 4 or "16" in str(self.trainer.precision)
        tolerance = _START_TOLERANCE_16_BIT if is_rounded else _START_TOLERANCE
        if drift <= tolerance and abs(loss - math.log(2)) <= tolerance:
            return
        given = "the log-probabilities that the batch brings" if batch["reference_log_probs"] is not None else "it"
        raise MisconfigurationException(
            f"Training does not start at its reference: the model differs from {given} by {drift:.4f} nats a token, "
            f"and the first DPO loss is {loss:.4f}, not ln 2 = {math.log(2):.4f}. Adapters that change the base when "
            "they are made (init_lora_weights: pissa, olora, loftq, ...) or do not start at zero leave no reference; "
            "write init_lora_weights: true. Reference log-probabilities must come from this base and adapter."
        )

    # Checkpoints

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY] |= {"kl": float(self._kl), "reference": self._reference_record}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._check_reference(checkpoint[CHECKPOINT_KEY].get("reference", self._reference_record))
        self._kl = torch.tensor(checkpoint[CHECKPOINT_KEY].get("kl", 0.0))
        self._is_start_checked = True  # trained adapters are no longer where they started

    def _check_reference(self, saved: dict[str, str] | None) -> None:
        """Refuse to go on against another reference: rewards would be measured from another zero."""
        found = self._reference_record
        if (saved or {}).get("sha256") == (found or {}).get("sha256"):
            return
        told = ["the base" if record is None else f"the adapter in {record['folder']!r}" for record in (saved, found)]
        raise ValueError(
            f"The reference of the run that made this checkpoint was {told[0]}; that of this run is {told[1]}, "
            f"which differs. Write adapter: {'null' if saved is None else saved['folder']}"
        )


def _sum_by_document(values_N: Tensor, batch: PreferenceBatch) -> Tensor:
    sums_K = values_N.new_zeros(len(batch["num_targets"]))
    return sums_K.index_add(0, batch["target_documents"], values_N)


def _answers(batch: PreferenceBatch, policy_K: Tensor, reference_K: Tensor | None) -> tuple[AnswerLogProbs, ...]:
    """Sort a batch's documents into chosen, rejected and mismatched answers."""
    tokens_K = _sum_by_document(torch.ones_like(batch["targets"], dtype=torch.float32), batch)
    return tuple(
        AnswerLogProbs(policy_K[index], None if reference_K is None else reference_K[index], tokens_K[index])
        for index in (batch["chosen"], batch["rejected"], batch["mismatched"])
    )
