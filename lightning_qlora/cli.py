"""The command line: LightningCLI with a quantised default, plus one subcommand per tool."""

from __future__ import annotations

import inspect as python_inspect
import itertools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import lightning as L
import torch
from docstring_parser import parse as parse_docstring
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelSummary
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft import LoftQConfig
from typing_extensions import override

from lightning_qlora.callbacks import AdapterCheckpoint, PerformanceMonitor, PredictionWriter, RunGuard, RunSummary
from lightning_qlora.data import PreferenceDataModule, SFTDataModule
from lightning_qlora.environment import WITHOUT_TOKENIZER_THREADS
from lightning_qlora.model import compute_dtype
from lightning_qlora.modules import CausalLMModule
from lightning_qlora.modules.precision import refuse_bitsandbytes_precision
from lightning_qlora.ranks import RankError
from lightning_qlora.redaction import scrub
from lightning_qlora.strategies import default_strategy

__all__ = ["QLoRACLI", "main"]

TRACEBACK_VARIABLE = "LIGHTNING_QLORA_TRACEBACK"

# What a subcommand does beside its own work unless the configuration brings a callback of that kind. AdapterCheckpoint
# is also what finds ckpt_path: last, and Lightning warns when a callback that was in training is missing later.
_DEFAULT_CALLBACKS: dict[str, tuple[type[Callback], ...]] = {
    "fit": (AdapterCheckpoint, RunGuard, PerformanceMonitor, RunSummary),
    "dry_run": (AdapterCheckpoint, RunGuard, PerformanceMonitor, RunSummary),
    "validate": (AdapterCheckpoint, RunGuard),
    "test": (AdapterCheckpoint, RunGuard),
    "predict": (AdapterCheckpoint, RunGuard, PredictionWriter),
}

# jsonargparse finds a class by its short name (--data=PreferenceDataModule) among those that are imported. The rooms of
# modules, losses and callbacks import all of theirs; that of the data waits until it is asked, for its workers' sake.
_DATA_BY_NAME = (SFTDataModule, PreferenceDataModule)

# Callbacks of Lightning that a user may give instead.
_REPLACEMENTS: dict[type[Callback], tuple[type[Callback], ...]] = {RunSummary: (ModelSummary,)}


class _ArgumentParser(LightningArgumentParser):
    """Says what is wrong in one message; LightningCLI prints the hundred options of the usage first."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)  # raises: the parsers of nested classes try several readings of a value
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        self.exit(2, f"error: {message}\nAll options: {program} --help\n")


class _SaveConfig(SaveConfigCallback):
    """Writes the configuration of the run beside its logs, without the secrets in it."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any) -> None:
        super().__init__(parser, _without_secrets(config), *args, **kwargs)


def _without_secrets(value: Any, name: str = "") -> Any:
    if isinstance(value, Namespace):
        copy = Namespace()  # type: ignore[no-untyped-call]
        for key, item in vars(value).items():
            copy[key] = _without_secrets(item, key)
        return copy
    if isinstance(value, list):
        return [_without_secrets(item, name) for item in value]
    return scrub({name: value})[name]


class QLoRACLI(LightningCLI):
    """LightningCLI for QLoRA: any LightningModule and LightningDataModule of the package, SFT by default.

    Args:
        args: Command line arguments; ``None`` for those of the process.
        run: Whether to run the subcommand, as in LightningCLI.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        self._tools = _tools_that_may_run(sys.argv[1:] if args is None else args)
        super().__init__(
            CausalLMModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # it would build the optimizer before configure_model made parameters
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},  # a requeued job comes back to the same folder
            seed_everything_default=0,
            parser_class=_ArgumentParser,
            args=args,
            run=run,
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # jsonargparse 4.53 checks what a model of another class than the default keeps of its options, and cannot read
        # again what it has checked, unless a plain dataclass such as this one is bound like a class.
        set_parsing_settings(subclasses_enabled=[LoftQConfig])
        quantization = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        }
        # The default as options rather than as the short name "nf4", so that each can be overridden by itself.
        model = {
            "class_path": "lightning_qlora.modules.SFTModule",
            "init_args": {"quantization": {"class_path": "transformers.BitsAndBytesConfig", "init_args": quantization}},
        }
        parser.set_defaults({"model": model, "data": {"class_path": "lightning_qlora.data.SFTDataModule"}})
        parser.link_arguments("model.init_args.model_name", "data.init_args.tokenizer")
        parser.link_arguments("model.init_args.revision", "data.init_args.revision")

    # Tools are subcommands too. The hooks below are LightningCLI's private ones: its public route to a subcommand is
    # a method of a Trainer subclass, which would make Trainers of other teams unusable.

    @override
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for name, tool in self._tools.items():
            description = parse_docstring(tool.__doc__ or "").short_description
            subparser = self.init_parser(description=description)
            objects = _objects_of_the_run(tool)
            if objects:
                self._add_arguments(subparser)
            self._subcommand_method_arguments[name] = subparser.add_function_arguments(tool, skip={*objects})
            for action in subparser._actions:
                is_flag = getattr(action, "_typehint", None) is bool
                if is_flag and action.dest in self._subcommand_method_arguments[name]:
                    action.nargs, action.const = "?", True  # `--json` alone, as well as `--json=true`
            self._subcommand_parsers[name] = subparser
            assert parser._subcommands_action is not None
            parser._subcommands_action.add_subcommand(name, subparser, help=description)

    @override
    def _parse_ckpt_path(self) -> None:
        """A checkpoint's hyperparameters do not override those asked for (pytorch-lightning#21455)."""

    @override
    def _set_seed(self) -> None:
        if self._get(self.config, "seed_everything") is not None:
            super()._set_seed()

    @override
    def instantiate_classes(self) -> None:
        with warnings.catch_warnings():
            # jsonargparse passes every option of LoraConfig, also the default one for LoftQ.
            warnings.filterwarnings("ignore", message="`loftq_config` specified but will be ignored")
            if self.subcommand in self._tools and not _objects_of_the_run(self._tools[self.subcommand]):
                self.config_init = self.parser.instantiate_classes(self.config)
            else:
                super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        plugins = config.plugins if isinstance(config.plugins, list) else [config.plugins]
        refuse_bitsandbytes_precision(*plugins)  # before Lightning refuses it on CPUs with no word of what to do
        choices = {
            "precision": config.precision or _default_precision(config.accelerator, config.plugins),
            "logger": config.logger if config.barebones else _default_logger(config.logger, config.default_root_dir),
            "callbacks": self._with_default_callbacks(config.callbacks),
            "strategy": default_strategy(
                config.strategy, accelerator=config.accelerator, devices=config.devices, num_nodes=config.num_nodes
            ),
        }
        self._refuse_untrained(choices["callbacks"])
        if config.max_epochs is None and config.max_steps == -1 and config.max_time is None:
            choices["max_epochs"] = 3
        if config.enable_model_summary is None and any(isinstance(c, RunSummary) for c in choices["callbacks"]):
            choices["enable_model_summary"] = False
        if self.subcommand in self._tools:
            choices |= _settings_of_tool(self.subcommand, config)
        return super().instantiate_trainer(**{**choices, **kwargs})

    def _with_default_callbacks(self, given: Callback | list[Callback] | None) -> list[Callback]:
        """Add what the configuration does not bring itself."""
        callbacks = [given] if isinstance(given, Callback) else list(given or ())
        defaults = _DEFAULT_CALLBACKS.get(str(self.subcommand), ())
        trainer = self._get(self.config_init, "trainer")
        if trainer.barebones:  # only what makes the answers is not in the way of speed
            defaults = tuple(kind for kind in defaults if kind is PredictionWriter)
        if trainer.enable_checkpointing is False:
            defaults = tuple(kind for kind in defaults if kind is not AdapterCheckpoint)
        for kind in defaults:
            if not any(isinstance(callback, (kind, *_REPLACEMENTS.get(kind, ()))) for callback in callbacks):
                callbacks.append(kind())
        return callbacks

    def _refuse_untrained(self, callbacks: list[Callback]) -> None:
        """Refuse to evaluate the last checkpoint where no callback finds it: Lightning would evaluate the bare base."""
        if self.subcommand not in ("validate", "test", "predict"):
            return
        finds_last = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        if self._get(self.config_init, "ckpt_path") == "last" and not finds_last:
            raise MisconfigurationException(
                "ckpt_path is 'last', which AdapterCheckpoint finds, and trainer.enable_checkpointing=false or "
                "trainer.barebones=true leaves that out. Write the folder of the run as ckpt_path."
            )

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand not in self._tools:
            super()._run_subcommand(subcommand)
            return
        tool = self._tools[subcommand]
        names = self._subcommand_method_arguments[subcommand]
        arguments = {name: self.config_init[subcommand][name] for name in names}
        available = {
            "model": getattr(self, "model", None),
            "datamodule": getattr(self, "datamodule", None),
            "trainer": getattr(self, "trainer", None),
        }
        tool(**arguments, **{name: available[name] for name in _objects_of_the_run(tool)})


# The tools are imported only here: they are a third of this package's files, and fit starts without them.


def _tools_that_may_run(args: Any) -> dict[str, Callable[..., Any]]:
    """Return the tools to have as subcommands: none beside a subcommand of the Trainer, otherwise all."""
    if isinstance(args, list) and args and args[0] in LightningCLI.subcommands():
        return {}
    from lightning_qlora.tools import TOOLS

    return TOOLS


def _settings_of_tool(name: str, trainer: Any) -> dict[str, Any]:
    """Return Trainer arguments of a tool: one that plans works on any machine, whatever the run will have."""
    from lightning_qlora.tools import PLANNING_TOOLS
    from lightning_qlora.tools.inspection import planning_settings

    return planning_settings(trainer) if name in PLANNING_TOOLS else {}


def _objects_of_the_run(tool: Callable[..., Any]) -> set[str]:
    """Which of the run's objects a tool asks for; one that asks for none takes only its own options."""
    return {"model", "datamodule", "trainer"} & set(python_inspect.signature(tool).parameters)


def _default_precision(accelerator: object, plugins: object) -> str | None:
    """Mixed precision in the dtype that the hardware computes in; nothing where a plugin may decide."""
    if plugins is not None:
        return None
    on_gpu = torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda")
    dtype = compute_dtype(torch.device("cuda" if on_gpu else "cpu"))
    return {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}.get(dtype, "32-true")


def _default_logger(logger: Any, default_root_dir: Any) -> Any:
    """Log to CSV files unless told otherwise: they need nothing installed and open anywhere."""
    if logger not in (None, True):
        return logger
    return CSVLogger(default_root_dir or os.getcwd(), name="logs", flush_logs_every_n_steps=10)


def _expand_shortcuts(args: list[str]) -> list[str]:
    """Spell out what has a shorter spelling.

    ``--optimizer`` and ``--lr_scheduler`` are LightningCLI's usual names for what the module builds here; runs to plot
    are named as files are elsewhere; fit --dry_run is the subcommand dry_run, which takes the same configuration; a
    shape to estimate stands for a base of that shape.
    """
    if args[:1] == ["estimate"]:
        args = [re.sub("^--shape=", "--model.model_name=shape:", argument) for argument in args]
    if args[:1] == ["fit"] and "--dry_run" in args:
        args = ["dry_run", *(argument for argument in args[1:] if argument != "--dry_run")]
    if args[:1] == ["plot"]:
        runs = list(itertools.takewhile(lambda argument: not argument.startswith("-"), args[1:]))
        args = ["plot", *(f"--runs+={run}" for run in runs), *args[1 + len(runs) :]]
    full = {"--optimizer": "--model.optimizer", "--lr_scheduler": "--model.lr_scheduler"}
    expanded = []
    for argument in args:
        name, equals, value = argument.partition("=")
        head, dot, rest = name.partition(".")
        expanded.append(full.get(head, head) + dot + rest + equals + value)
    return expanded


def main(args: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Mistakes in the configuration or the data end with one message; set ``LIGHTNING_QLORA_TRACEBACK=1`` to see where
    they were found.
    """
    _quiet_libraries()
    arguments = _expand_shortcuts(sys.argv[1:] if args is None else args)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within")
            QLoRACLI(arguments)
    except (ValueError, MisconfigurationException, RankError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        rank_zero_info("")
        print(f"error: {error}\n(set {TRACEBACK_VARIABLE}=1 to see the traceback)", file=sys.stderr)
        return 1
    return 0


def _quiet_libraries() -> None:
    """Drop remarks of libraries that a user of this command cannot act on."""
    (threads,) = WITHOUT_TOKENIZER_THREADS
    if threads not in os.environ:  # tokenizers would say at each fork that it does without them there
        os.environ[threads] = "true"
        os.register_at_fork(after_in_child=lambda: os.environ.update(WITHOUT_TOKENIZER_THREADS))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*does not have many workers which may be a bottleneck.*")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")  # Lightning's own
