"""The card of a merged or exported model: what it is, what it was trained on, how well it did, what to mind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["adapter_card", "model_card"]

_LEFT_OUT = {"adapter", "model_kwargs", "max_new_tokens", "revision", "trust_remote_code", "model_name"}


def model_card(name: str, report: Mapping[str, Any], record: Mapping[str, Any], lora: Mapping[str, Any]) -> str:
    """Write the card.

    Args:
        name: Of the model: its folder.
        report: ``merge_report.json``.
        record: What the adapter's manifest says of the run; empty where it has none.
        lora: ``adapter_config.json``.
    """
    parts = [
        _front_matter(
            str(report["base"]["name"]),
            ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- qlora", "- merged"],
        ),
        f"# {name}",
        _what_it_is(report, record, lora),
        _data(record),
        _training(record),
        _metrics(record),
        _fidelity(report),
        _limits(report, record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def adapter_card(name: str, base: str, record: Mapping[str, Any], lora: Mapping[str, Any]) -> str:
    """Write the card of an adapter that is published alone.

    Args:
        name: Of the adapter: its folder.
        base: The base it was trained on.
        record: What its manifest says of the run; empty where it has none.
        lora: ``adapter_config.json``.
    """
    quantization = (record.get("identity") or {}).get("quantization") or {}
    kind = quantization.get("bnb_4bit_quant_type")
    stored = f"4-bit {kind.upper()}" if kind else "unquantised" if record.get("identity") else "unknown precision"
    parts = [
        _front_matter(base, ["library_name: peft", "pipeline_tag: text-generation", "tags:", "- qlora", "- lora"]),
        f"# {name}",
        f"A LoRA adapter ({_kind_of_lora(lora)}) for `{base}`, trained on its weights in {stored}.",
        _data(record),
        _training(record),
        _metrics(record),
        "## Limits\n\n- The limits and the license of the base hold for this adapter too.\n"
        "- It corrects the weights that it was trained on; on a base stored otherwise its answers differ.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _kind_of_lora(lora: Mapping[str, Any]) -> str:
    kinds = [word for word, option in (("DoRA", "use_dora"), ("rsLoRA", "use_rslora")) if lora.get(option)]
    return ", ".join([f"rank {lora.get('r')}, alpha {lora.get('lora_alpha')}", *kinds])


def _front_matter(base: str, lines: list[str]) -> str:
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):  # a hub id, which the hub links
        lines = [f"base_model: {base}", *lines]
    return "\n".join(["---", *lines, "---"])


def _what_it_is(report: Mapping[str, Any], record: Mapping[str, Any], lora: Mapping[str, Any]) -> str:
    base = report["base"]
    revision = f" at revision `{base['revision']}`" if base.get("revision") else ""
    onto = {
        "dequantized": f"the {report['quantization']} weights that the adapter was trained on, dequantised",
        "original": "the base's original weights",
    }[report["onto"]]
    if report["adapter"] is None:
        what = f"`{base['name']}`{revision} with {onto}, stored as {report['dtype']}: the base of an adapter."
    else:
        what = (
            f"`{base['name']}`{revision} with a LoRA adapter ({_kind_of_lora(lora)}) merged onto {onto}, "
            f"stored as {report['dtype']}."
        )
        what += f" The adapter is that of optimizer step {record['step']}." if "step" in record else ""
    return f"{what}\n\nChat template, stop tokens and tokenizer are those of the training."


def _data(record: Mapping[str, Any]) -> str:
    stages: Mapping[str, Any] = record.get("data") or {}
    if not stages:
        return "## Data\n\nThe adapter's folder does not say what it was trained on."
    rows = [
        f"| {stage} | {counts['rows']:,} | {counts['refused']:,} | {counts['tokens']:,} | "
        f"{counts['supervised_tokens']:,} | {', '.join(counts['sources'])} |"
        for stage, counts in stages.items()
    ]
    return "\n".join(
        [
            "## Data",
            "",
            "| stage | rows | refused | tokens | supervised | sources |",
            "|---|---|---|---|---|---|",
            *rows,
        ]
    )


def _training(record: Mapping[str, Any]) -> str:
    options = (record.get("config") or {}).get("module") or {}
    told = {
        key: value
        for key, value in options.items()
        if value is not None and not key.startswith("_") and key not in _LEFT_OUT
    }
    if not told:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
    lines = [f"- {key}: `{value}`" for key, value in told.items()]
    return "\n".join(["## Training", "", *lines, f"- versions: {versions}", f"- ranks: {record.get('world_size', 1)}"])


def _metrics(record: Mapping[str, Any]) -> str:
    metrics: Mapping[str, float] = record.get("metrics") or {}
    if not metrics:
        return ""
    rows = [f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items())]
    return "\n".join(
        ["## Metrics", "", "When the adapter was published:", "", "| metric | value |", "|---|---|", *rows]
    )


def _fidelity(report: Mapping[str, Any]) -> str:
    found = report.get("verification")
    heading = "## Against the trained model\n\n"
    if not found:
        return heading + "Not compared with the 4-bit model and its adapter (`merge --verify` does)."
    return (
        heading
        + f"Compared with the {report['quantization']} base and its adapter at {found['num_tokens']:,} positions of "
        f"{found['num_texts']} texts ({found['texts']}), computed in {found['compute_dtype']}:\n\n"
        "| mean KL (nats) | max KL | top-1 agreement | max \\|logit difference\\| |\n|---|---|---|---|\n"
        f"| {found['mean_kl']:.2e} | {found['max_kl']:.2e} | {found['top1_agreement']:.2%} | "
        f"{found['max_logit_difference']:.2e} |"
    )


def _limits(report: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    lines = ["The limits and the license of the base hold for this model too."]
    if report["onto"] == "dequantized" and report["quantization"] != "unquantised":
        lines.append("Its weights are those of the quantised base: what 4 bits lost is not regained by merging.")
    if not record.get("metrics"):
        lines.append("No metrics were recorded; how well it does its task is not known from this folder.")
    else:
        lines.append("The metrics above are the training run's own; they say nothing of tasks it did not measure.")
    lines.append("Quantising it again changes its answers; measure before serving such a copy.")
    return "\n".join(["## Limits", "", *(f"- {line}" for line in lines)])
