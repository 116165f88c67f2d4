"""What every fine-tuning module shares: the 4-bit base with adapters, the optimizer, checkpoints and generation."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor
from torch.optim import Optimizer
from transformers import BitsAndBytesConfig, PreTrainedModel
from typing_extensions import override

from lightning_qlora.checkpoints.adapter_folder import find_adapter
from lightning_qlora.checkpoints.checkpoint_io import read_checkpoints_without_pickle
from lightning_qlora.checkpoints.identity import changes_base, check_adapter
from lightning_qlora.checkpoints.loop_state import repair_loops
from lightning_qlora.kernels.attention import use_document_attention
from lightning_qlora.kernels.checkpointing import PLANS, MixedPlan, Plan
from lightning_qlora.kernels.compilation import compile_decoder
from lightning_qlora.kernels.elementwise import fuse_elementwise
from lightning_qlora.kernels.lora import fuse_lora_if_equal
from lightning_qlora.memory import autocast_dtype, choose_plan, host_has_room, most_tokens
from lightning_qlora.model import (
    Quantization,
    attach_adapters,
    base_model,
    checkpointed_layers,
    load_adapter,
    load_base_model,
    set_activation_checkpointing,
)
from lightning_qlora.modules.averaging import forget_missing, refuse_early_averaging
from lightning_qlora.modules.forward import SupervisedForward
from lightning_qlora.modules.generation import generate_answers
from lightning_qlora.modules.lr_schedulers import WarmupCosine
from lightning_qlora.modules.normalisation import SummedLossModule
from lightning_qlora.modules.precision import check_precision, clip_gradients
from lightning_qlora.modules.record import (
    allowed_by_callbacks,
    arguments_for,
    check_adapter_keys,
    check_lora,
    check_optimizer,
    check_quantization,
    name_optimizer,
    plain_lora,
    plain_quantization,
    read_record,
)
from lightning_qlora.modules.schedule import Schedule, ScheduleCallable
from lightning_qlora.modules.special_tokens import add_stop_tokens, tokens_to_train
from lightning_qlora.modules.steps import restore_accumulation
from lightning_qlora.redaction import scrub
from lightning_qlora.schema import ChatDataModule, PromptBatch, SFTBatch
from lightning_qlora.signals import tell_ranks_without_waiting
from lightning_qlora.strategies import build_sharded, check_is_sharded, check_strategy, shard

__all__ = ["CausalLMModule"]

CHECKPOINT_KEY = "lightning_qlora"
_CHECKPOINT_FORMAT = 1


class CausalLMModule(SummedLossModule):
    """A causal language model whose frozen base is 4-bit and whose adapters are trained (QLoRA, arXiv:2305.14314).

    The base is loaded in ``configure_model``, on each rank's own device, so that building the module is free. Its
    checkpoints hold the trained tensors only. Subclasses say what a step computes; they return the *sum* of their
    loss and report to :meth:`count_terms` how many terms (tokens, pairs) it sums, and the gradient is divided once per
    optimizer step by the count of the whole step, over all micro-batches and ranks.

    Logs at each optimizer step ``train_loss``, ``gradient_norm`` (before clipping) and ``learning_rate``. The progress
    bar shows ``loss``, on a GPU that of the step before, so that no step waits for its own.

    Args:
        model_name: The base: a Hugging Face id, a folder, a .gguf file, or package:NAME for a GGUF file that an
            installed Python package carries.
        revision: Branch, tag or commit of a Hugging Face id. Pin it to get the same base every time.
        adapter: A PEFT folder to continue from, instead of fresh adapters, or a run's folder for the newest whole
            checkpoint in it. Its own configuration then counts, not ``lora``. One that AdapterCheckpoint published is
            refused on another base, tokenizer or chat template.
        allow_mismatch: What may differ from what ``adapter`` was published with, all the same: base, quantization,
            tokenizer, chat_template; adapter (its options) and quantization also from what a checkpoint was made with.
        lora: PEFT's adapter configuration; every option of peft.LoraConfig works (DoRA, rsLoRA, rank patterns,
            modules_to_save, trainable_token_indices, initialisations).
        quantization: How the base is stored. nf4 is 4-bit with double quantisation, int8 is LLM.int8(), null is none;
            or the options of transformers.BitsAndBytesConfig.
        optimizer: Builds the optimizer from the trainable parameters.
        lr: Learning rate. When given it replaces the optimizer's own; the learning rate finder sets it.
        lr_scheduler: Builds the schedule, stepped once per optimizer step, from the optimizer and, where it has a
            parameter for them that is not set (total_steps, T_max, ...), the steps of the run; null for a constant
            rate. lightning.pytorch.cli.ReduceLROnPlateau, with a monitor, is stepped after each epoch that validates.
        activation_checkpointing: What a layer keeps for the backward pass: everything (none), all but what its MLP
            computes, which is computed again (selective), that in host memory (selective_offload), its input (full),
            which takes far less memory and about a third more time, or that in host memory (offload). auto takes, when
            fit starts, the fastest that fits the memory then free, layer by layer. The gradients are the same.
        fused_lora: Add plain LoRA inside the products of 4-bit layers, in place of PEFT's own code, with equal results
            up to rounding; auto does so on GPUs. Other adapters, and dropout, run PEFT's code in any case.
        fused_elementwise: Run norms, rotary embeddings and gated activations by one kernel each on GPUs that have
            Triton, with equal results up to rounding, where the family's are of the common kinds. compile_layers takes
            their place. Backward passes write over what they have used: a second one through one graph (retain_graph)
            is refused, and needs false here.
        compile_layers: Compile whole decoder layers with torch.compile, for faster steps after a first one that takes
            up to a minute, less where the cache has the kernels; other lengths cost nothing more. Only norms and MLPs
            where a family has its own attention or a router; not in layers that follow a selective plan.
        cuda_graphs: Launch a step's forward and backward pass as a whole, from one of the first on: a GPU is done with
            the kernels of a small model, or of few tokens, before the host has launched the next. Packed batches are
            padded to one size, and what the passes take of memory stays taken between steps. auto does so where the
            host is slow, that is less than half of it, and algorithms need not be deterministic; true where it can be,
            and says why where not: FSDP, plans that use host memory, dropout, compile_layers, hooks. A number that a
            closure keeps stays as it was recorded: where it changes during a run, write false.
        untrained_tokens: What to do when the chat template writes control tokens that the base was never trained on:
            refuse, train their embedding rows (auto), or go on regardless (ignore).
        dtype: Of everything that is not quantised: float32, bfloat16 or float16; null chooses by hardware.
        attn_implementation: transformers' name of an attention function; null for the one that keeps packed documents
            apart without a dense mask.
        trust_remote_code: Whether Python code from the base's repository may run. Off unless you trust it.
        max_new_tokens: Longest answer of ``predict``, in tokens.
        model_kwargs: Further arguments of transformers' from_pretrained.
    """

    object_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of a subclass that are no plain data, to be kept out of its hyperparameters."""

    def __init__(
        self,
        model_name: str,
        *,
        revision: str | None = None,
        adapter: str | None = None,
        allow_mismatch: list[str] | None = None,
        lora: PeftConfig = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),  # noqa: B008
        quantization: BitsAndBytesConfig | Literal["nf4", "int8"] | None = "nf4",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0, fused=True),
        lr: float | None = None,
        lr_scheduler: ScheduleCallable | None = WarmupCosine,  # type: ignore[assignment]
        activation_checkpointing: Literal["none", "selective", "selective_offload", "full", "offload", "auto"] = "full",
        fused_lora: bool | Literal["auto"] = "auto",
        fused_elementwise: bool = True,
        compile_layers: bool = False,
        cuda_graphs: bool | Literal["auto"] = "auto",
        untrained_tokens: Literal["refuse", "auto", "ignore"] = "refuse",
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        max_new_tokens: int = 256,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_choice("activation_checkpointing", activation_checkpointing, (*PLANS, "auto"))
        _check_choice("fused_lora", fused_lora, (True, False, "auto"))
        _check_choice("cuda_graphs", cuda_graphs, (True, False, "auto"))
        _check_choice("untrained_tokens", untrained_tokens, ("refuse", "auto", "ignore"))
        # Objects do not go into checkpoints, which are read without pickle; what identifies them does, as plain
        # data, in on_save_checkpoint.
        self.save_hyperparameters(ignore=["lora", "quantization", "optimizer", "lr_scheduler", *self.object_arguments])
        self.model_name = model_name
        self.revision = revision
        self.adapter = adapter
        self.adapter_folder: Path | None = None  # found when the model is built
        self.allow_mismatch = tuple(allow_mismatch or ())
        self.lora = lora
        self.quantization: Quantization = quantization
        self.optimizer = optimizer
        self.lr = lr
        self.lr_scheduler = lr_scheduler
        self.activation_checkpointing = activation_checkpointing
        self.fused_lora = fused_lora
        self.fused_elementwise = fused_elementwise
        self.compile_layers = compile_layers
        self.cuda_graphs = cuda_graphs
        self.untrained_tokens = untrained_tokens
        self.base_dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        self.attn_implementation = attn_implementation
        self.trust_remote_code = trust_remote_code
        self.max_new_tokens = max_new_tokens
        self.model_kwargs = model_kwargs or {}

        self.register_load_state_dict_post_hook(_forget_the_base)  # type: ignore[no-untyped-call]
        self.strict_loading = False  # checkpoints hold adapters only; on_load_checkpoint checks the keys instead
        self.model: PeftModel | None = None
        self.layer_plan: Plan | MixedPlan | None = None  # what auto has not chosen yet
        if activation_checkpointing != "auto":
            self.layer_plan = activation_checkpointing
        self.stop_token_ids: tuple[int, ...] = ()
        self.isolates_documents = False
        self._supervised_forward: SupervisedForward | None = None
        self._adapter_keys: frozenset[str] = frozenset()
        self._schedule: Schedule | None = None
        self._optimizers: dict[str, str | None] | None = None  # names of what this fit trains with
        self._resumed: dict[str, str | None] | None = None  # and of what its checkpoint was made with

    @property
    @override
    def hparams_initial(self) -> Any:
        """What loggers write down: the hyperparameters without their secrets."""
        initial = super().hparams_initial
        initial.update(scrub(dict(initial)))
        return initial

    # Building

    @override
    def setup(self, stage: str) -> None:
        check_strategy(self.trainer.strategy)
        check_precision(self.trainer)
        read_checkpoints_without_pickle(self.trainer)
        if stage == "fit" and self.model is None:
            refuse_early_averaging(self.trainer)
        self._optimizers = self._resumed = None

    @override
    def configure_model(self) -> None:
        if self.model is not None:  # Lightning calls this hook again for each stage
            return
        strategy = self._trainer.strategy if self._trainer is not None else None
        with build_sharded(strategy):
            shard(strategy, self._build(self.load_base(strategy.root_device if strategy is not None else None)))

    def load_base(self, device: torch.device | None) -> PreTrainedModel:
        """Load the frozen base onto a device; ``None`` for the current one."""
        return load_base_model(
            self.model_name,
            revision=self.revision,
            quantization=self.quantization,
            dtype=self.base_dtype,
            device=device,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            model_kwargs=self.model_kwargs,
        )

    def _build(self, base: PreTrainedModel) -> PeftModel:
        """Put adapters on the base, and whatever else a model is before a strategy wraps it."""
        if self.attn_implementation is None:
            self.isolates_documents = use_document_attention(base)
        if not self.isolates_documents:
            rank_zero_info(
                f"{type(base).__name__} runs on its own attention; where that builds a dense mask to keep packed "
                "documents apart, its size grows with the square of the batch's tokens."
            )
        data = self._chat_data()
        if self.adapter is not None:
            self.adapter_folder = find_adapter(self.adapter)
            tokenizer = data.tokenizer if data is not None else None
            check_adapter(self.adapter_folder, base, tokenizer, self.allow_mismatch)
            self.model = load_adapter(base, self.adapter_folder, is_trainable=True).train()
            if changes_base(self.model.active_peft_config):
                check_adapter(self.adapter_folder, self.model, tokenizer, self.allow_mismatch)
        else:
            tokens: list[int] = []
            if self.untrained_tokens != "ignore":
                refuse = self.untrained_tokens == "refuse"
                tokens = tokens_to_train(base, data, self.lora, refuse=refuse, model_name=self.model_name)
            self.model = attach_adapters(base, self.lora, token_ids_to_train=tokens)
        if self.fuses_lora(base.device.type):
            fuse_lora_if_equal(self.model)
        if self.fuses_elementwise(base.device.type):
            fuse_elementwise(self.model)
        self._hold_plan(self.layer_plan or "full")
        self.stop_token_ids = add_stop_tokens(base, data.stop_token_ids if data is not None else ())
        # Names are taken before a strategy wraps anything; wrapping renames parameters but not state_dict keys.
        self._adapter_keys = frozenset(name for name, p in self.named_parameters() if p.requires_grad)
        self._supervised_forward = SupervisedForward(self.model, self.isolates_documents)
        self.on_model_built()
        return self.model

    def fuses_lora(self, device_type: str) -> bool:
        """Whether LoRA is to be fused on such a device, ``cuda`` or ``cpu``."""
        return self.fused_lora is True or (self.fused_lora == "auto" and device_type == "cuda")

    def fuses_elementwise(self, device_type: str) -> bool:
        """Whether norms, rotations and activations are to be fused on such a device."""
        return self.fused_elementwise and not self.compile_layers and device_type == "cuda"

    def on_model_built(self) -> None:
        """Hook for subclasses: ``self.model`` has just been built and is not wrapped yet."""

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        # A full collection walks all objects of all libraries, some tenths of a second in the middle of a step.
        gc.collect()
        gc.freeze()
        if self.trainer.world_size > 1:
            tell_ranks_without_waiting(self.trainer)
        restore_accumulation(self.trainer)
        if self._schedule is not None:
            self._schedule.renew(self.trainer, self.lr)
        if self._supervised_forward is not None:
            self._supervised_forward.record(
                self.cuda_graphs,
                self.layer_plan,
                is_compiled=self.compile_layers,
                most_tokens=most_tokens(getattr(self.trainer, "datamodule", None)),
            )

    @override
    def on_validation_start(self) -> None:
        if self._supervised_forward is not None:
            self._supervised_forward.make_room()

    @override
    def on_train_end(self) -> None:
        gc.unfreeze()
        if self._supervised_forward is not None:
            self._supervised_forward.graphs = None  # with the memory they hold

    @override
    def cpu(self) -> Self:
        """Move to the host, as a trainer does with its module when it ends, unless there is not the room."""
        if self._trainer is not None and not host_has_room(self.device, self._trainer.num_devices):
            rank_zero_warn("The model stays on its GPU, for the host has not the memory that it takes there.")
            return self
        return super().cpu()

    def supervised_forward(self, batch: SFTBatch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Run the model on a batch; return what predicts its supervised tokens, and the head that reads it.

        Returns:
            (N, D) hidden states, and a function from (n, D) of them to (n, V) logits. All ranks call it equally often,
            or inside of :func:`lightning_qlora.parts.whole`, as the losses do: it may be in parts.
        """
        assert self._supervised_forward is not None, "configure_model has not run"
        return self._supervised_forward(batch)

    @property
    def graph_replays(self) -> int:
        """How many batches of the fit under way were run by CUDA graphs."""
        graphs = self._supervised_forward.graphs if self._supervised_forward is not None else None
        return graphs.replays if graphs is not None else 0

    def _chat_data(self) -> ChatDataModule | None:
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        return data if isinstance(data, ChatDataModule) else None

    def _hold_plan(self, plan: Plan | MixedPlan) -> None:
        assert self.model is not None
        set_activation_checkpointing(base_model(self.model), plan)

    def _choose_plan(self, optimizer: Optimizer) -> None:
        """Let ``auto`` choose once: now weights are where they will be, and the optimizer is known."""
        if self.layer_plan is not None or self.model is None:
            return
        choice = choose_plan(self.trainer, self.model, [optimizer], recorded=self.cuda_graphs is True)
        self.layer_plan = choice.plan
        self._hold_plan(choice.plan)
        rank_zero_info(f"activation_checkpointing: auto chose {choice.plan} ({choice.reason}).")

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [p for p in self.parameters() if p.requires_grad]
        check_is_sharded(self.trainer.strategy, trained)
        optimizer = self.optimizer(trained)
        self._choose_plan(optimizer)
        if self.compile_layers and self.model is not None:
            base, plan = base_model(self.model), self.layer_plan or "full"
            compile_decoder(base, checkpointed_layers(base), plan, dtype=autocast_dtype(self.trainer) or base.dtype)
        if self.lr is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr
        schedule = None if self.lr_scheduler is None else Schedule(self.lr_scheduler, optimizer, self.trainer)
        self._schedule = schedule
        self._optimizers = name_optimizer(optimizer, None if schedule is None else schedule.scheduler)
        check_optimizer(self._resumed, self._optimizers)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": schedule.config(self.trainer)}

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients also with a fused optimizer.

        Lightning refuses that under any mixed precision, because a fused optimizer may undo a loss scale by itself,
        after the clipping. bf16-mixed has no loss scale.
        """
        clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    # Checkpoints: adapters only

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return what is trained and a subclass's own buffers: everything else is the base, which is loaded by name."""
        prefix: str = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        own = {name for name, _ in self.named_buffers() if not name.startswith("model.")}
        keep = {prefix + name for name in self._adapter_keys | own}
        for name in [name for name in state if name.startswith(prefix) and name not in keep]:
            del state[name]  # in place: sharded strategies hold the same dictionary
        return state

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, *args: Any, weights_only: bool = True, trust_remote_code: bool = False, **kwargs: Any
    ) -> Self:
        """Load a module from Lightning's checkpoint, as ``LightningModule.load_from_checkpoint`` does.

        The adapters and the quantization are those it was trained with, unless ``lora`` or ``quantization`` is given.
        Two things are not for the checkpoint to decide: whether its pickle may run (Lightning's default for addresses),
        and whether its base may bring code.
        """
        record = read_record(checkpoint_path, CHECKPOINT_KEY, weights_only=weights_only)
        kwargs = {**arguments_for(cls, record), **kwargs}
        kwargs |= {"weights_only": weights_only, "trust_remote_code": trust_remote_code}
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = {
            "format": _CHECKPOINT_FORMAT,
            "model_name": self.model_name,
            "revision": self.revision,
            "activation_checkpointing": str(self.layer_plan),
            "adapter_keys": sorted(self._adapter_keys),
            "lora": None if self.model is None else plain_lora(self.model.active_peft_config),
            "quantization": plain_quantization(self.quantization),
            "optimizers": self._optimizers,
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another module, in words, before it is loaded in part or fails somewhere inside."""
        if CHECKPOINT_KEY not in checkpoint:
            raise ValueError(
                "This checkpoint was not written by lightning_qlora: it does not name its adapters. Write the path of "
                "a checkpoint that fit made, or start afresh without ckpt_path."
            )
        record = checkpoint[CHECKPOINT_KEY]
        check_adapter_keys(record, self._adapter_keys)
        allowed = {*self.allow_mismatch, *allowed_by_callbacks(self._trainer)}
        if self.model is not None and "adapter" not in allowed:
            check_lora(record, self.model.active_peft_config)
        if "quantization" not in allowed:
            check_quantization(record, self.quantization)
        self._resumed = record.get("optimizers")
        check_optimizer(self._resumed, self._optimizers)  # where the strategy has made them before it loads
        repair_loops(checkpoint)

    # Generation

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        max_new_tokens: int | None = None,
        **sampling: Any,
    ) -> list[list[int]]:
        """Continue prompts, greedily unless ``sampling`` says otherwise, until a stop token.

        Args:
            input_ids: (B, L) int64 prompts, padded on the left.
            attention_mask: (B, L) int64, 0 for padding.
            max_new_tokens: Longest answer; ``None`` for the module's own bound.
            sampling: Options of ``transformers.GenerationConfig``, such as do_sample, temperature, top_p.

        Returns:
            B lists of the new token ids, without the stop token.
        """
        assert self.model is not None, "configure_model has not run"
        prompts = input_ids.to(self.device), attention_mask.to(self.device)
        longest = max_new_tokens or self.max_new_tokens
        return generate_answers(self.model, *prompts, self.stop_token_ids, longest, sampling)

    @override
    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Answer a batch of questions: the rows as they were read, each with its ``answer``."""
        answers = self.generate(batch["input_ids"], batch["attention_mask"])
        data = self._chat_data()
        if data is None:
            raise MisconfigurationException(
                "predict needs a data module with a tokenizer, such as SFTDataModule, to turn tokens into text."
            )
        texts = data.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [{**row, "answer": text} for row, text in zip(batch["rows"], texts, strict=True)]


def _forget_the_base(module: CausalLMModule, keys: Any) -> None:
    """That the base is not among what is loaded is no news, so it is not reported as missing."""
    forget_missing(keys.missing_keys, module._adapter_keys)


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(str, allowed))}.")
