"""The same questions, answered by the base, by adapters on it and by merged models: who is better, and how surely."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_qlora.evaluation import Question, read_questions, stop_tokens
from lightning_qlora.evaluation.files import write_whole
from lightning_qlora.tools.comparison import (
    Comparison,
    Decoding,
    Limits,
    Participant,
    Previous,
    ask_adapters,
    ask_merged,
    compare_participants,
    describe_missed,
    draw_comparison,
    judge_limits,
    preference_pairs,
    read_previous,
    render_page,
    to_record,
    training_rows,
)
from lightning_qlora.tools.comparison.asking import BASE
from lightning_qlora.tools.inspection.terminal import Color, use_color, write
from lightning_qlora.tools.loading import (
    AdapterPaths,
    QuantizationName,
    find_adapters,
    load_for_answers,
    name_folders,
    refuse_changed_base,
    sampling_options,
    trained_base,
)

__all__ = ["compare"]


def compare(
    questions: str,
    adapters: AdapterPaths = None,
    *,
    merged: str | list[str] | dict[str, str] | None = None,
    base: str | None = None,
    revision: str | None = None,
    quantization: QuantizationName = "auto",
    baseline: str = BASE,
    against: str | None = None,
    output: str | None = "comparison",
    failures: str | None = None,
    pairs: str | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 16,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    max_rows: int = 6,
    color: Color = "auto",
    min_exact: float | None = None,
    min_exact_of: dict[str, float] | None = None,
    min_valid: float | None = None,
    min_fields: float | None = None,
    min_rouge_l: float | None = None,
    min_chrf: float | None = None,
    max_perplexity: float | None = None,
    max_broken: int | None = None,
    fail_on_regression: bool = False,
    template_kwargs: dict[str, Any] | None = None,
    allow_mismatch: list[str] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Ask the base, each adapter and merged models the same questions, and say who is better and how surely.

    One base in memory serves all adapters. The last one given is the candidate: limits and failures are about it. It
    ends with an error if a limit is missed, after everything is written, so it can guard a pipeline.

    Args:
        questions: A JSONL file of questions with optional reference, check and tags, as for AnswerComparison.
        adapters: A PEFT folder, or a run's folder of checkpoints for the newest one; or several, as a list, or as
            NAME: FOLDER.
        merged: A folder of a merged model, or several, asked with the same prompts as they are stored.
        base: Replaces the base that the adapters name; needed without any.
        revision: Branch, tag or commit of a base that is a Hugging Face id.
        quantization: How the base is stored; auto takes what the adapters were trained on, else nf4.
        baseline: Whom the candidate is held against: base, or an adapter's name.
        against: An earlier comparison.json, to see what its candidate's failures have become.
        output: The folder for comparison.json and the page comparison.html; null writes neither.
        failures: Write the candidate's wrong answers to this JSONL file as rows to train on, with the reference as
            the answer; those that a person must correct first go beside it as NAME.uncorrected.jsonl.
        pairs: Write them to this JSONL file as preference pairs: the reference chosen, the wrong answer rejected.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Questions answered together.
        temperature: 0 always takes the most likely token; above it, tokens are drawn at this temperature.
        top_p: Draw from the most likely tokens that make up this share of the probability; 1 for all.
        top_k: Draw from this many most likely tokens; 0 for all.
        repetition_penalty: Above 1, tokens that have occurred become less likely.
        seed: Of the random draws, the same for each model.
        max_rows: How many questions are shown side by side in the terminal; the page has all.
        color: Whether the terminal is coloured. Nothing is said by colour alone.
        min_exact: Fail if a smaller share of the answers is exactly right; from 0 to 1.
        min_exact_of: The same for the questions of a tag, as TAG: SHARE.
        min_valid: Fail if a smaller share of the answers is valid; from 0 to 1.
        min_fields: Fail if a smaller share of the fields is right; from 0 to 1.
        min_rouge_l: Fail if the mean ROUGE-L is smaller; from 0 to 1.
        min_chrf: Fail if the mean chrF is smaller; from 0 to 1.
        max_perplexity: Fail if the perplexity of the references is larger.
        max_broken: Fail if more questions that the baseline, or the earlier candidate, got right are wrong now.
        fail_on_regression: Fail if it is significantly worse than one of them (corrected p below 0.05).
        template_kwargs: Extra variables for the chat template, such as enable_thinking: false.
        allow_mismatch: What may differ from the training when an adapter is loaded: base, quantization, tokenizer,
            chat_template.
        trust_remote_code: Whether Python code from the base's repository may run.

    Raises:
        ValueError: If a limit is missed, or an option, a question or a folder cannot be used.
    """
    _check_counts(max_new_tokens=(max_new_tokens, 1), batch_size=(batch_size, 1), max_rows=(max_rows, 0))
    rates = {"exact": min_exact, "valid": min_valid, "fields": min_fields, "rouge_l": min_rouge_l, "chrf": min_chrf}
    limits = Limits(rates, min_exact_of or {}, max_perplexity, max_broken, fail_on_regression)
    decoding = Decoding(
        max_new_tokens, batch_size, seed, sampling_options(temperature, top_p, top_k, repetition_penalty)
    )
    asked = read_questions(questions)
    limits.check(asked)
    previous = None if against is None else read_previous(against)
    folders, models = find_adapters(adapters), _find_merged(merged)
    refuse_changed_base(folders)
    names = [BASE, *folders, *models]
    _check_names(names, baseline)
    if len(names) == 1 and previous is None and (fail_on_regression or max_broken is not None):
        raise ValueError("Nobody to hold the candidate against: give an adapter, or an earlier comparison by against.")
    base, revision = trained_base(list(folders.values()), base, revision)
    loading = {
        "revision": revision,
        "quantization": quantization,
        "template_kwargs": template_kwargs,
        "allow_mismatch": allow_mismatch or (),
        "trust_remote_code": trust_remote_code,
    }
    participants = _ask_all(asked, folders, models, base, decoding, loading)
    settings = {"questions": questions, "base": base, **loading, **decoding._asdict()}
    notes: list[str] = []
    if previous is not None:
        participants.insert(1, _earlier(previous, asked, settings, notes))
    found = compare_participants(
        asked, participants, baseline=baseline, candidate=names[-1], settings=settings, notes=notes
    )
    found = found.with_limits(judge_limits(found, limits))
    write("\n" + draw_comparison(found, max_rows=max_rows, color=use_color(color, sys.stdout)), sys.stdout)
    for written in _write_all(found, output, failures, pairs):
        print(written)
    if found.missed:
        raise ValueError(describe_missed(found))


def _check_counts(**counts: tuple[int, int]) -> None:
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name} is {value}; write a whole number from {least}.")


def _check_names(names: list[str], baseline: str) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"The names {names} are not distinct. Write the adapters as NAME: FOLDER.")
    if baseline not in names:
        raise ValueError(f"baseline is {baseline!r}; allowed are {names}.")
    if baseline == names[-1] and len(names) > 1:
        raise ValueError(f"The baseline {baseline!r} is also the last given, which is what is judged. Give it earlier.")


def _find_merged(merged: str | list[str] | dict[str, str] | None) -> dict[str, Path]:
    if isinstance(merged, dict):
        found = {name: Path(folder) for name, folder in merged.items()}
    else:
        folders = [Path(folder) for folder in ([merged] if isinstance(merged, str) else merged or ())]
        found = dict(zip(name_folders(folders), folders, strict=True))
    for folder in found.values():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{str(folder)!r} is no model folder: it holds no config.json.")
    return found


def _ask_all(
    questions: list[Question],
    adapters: dict[str, Path],
    merged: dict[str, Path],
    base: str,
    decoding: Decoding,
    loading: dict[str, Any],
) -> list[Participant]:
    """Ask everybody, with one model in memory at a time."""
    model, template = load_for_answers(adapters, base, **loading)
    stop = stop_tokens(model, template)
    participants = ask_adapters(model, template, questions, adapters, base, decoding)
    del model
    gc.collect()
    for name, folder in merged.items():
        options = {key: loading[key] for key in ("allow_mismatch", "trust_remote_code")}
        participants.append(ask_merged(folder, name, template, questions, decoding, stop_token_ids=stop, **options))
        gc.collect()
    return participants


def _earlier(previous: Previous, questions: list[Question], settings: dict[str, Any], notes: list[str]) -> Participant:
    """Let an earlier candidate take part, and note where it answered otherwise than the others."""
    participant, missing = previous.as_participant(questions, f"previous {previous.name}")
    if missing:
        names = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        notes.append(
            f"{participant.name} was not asked {len(missing)} of {len(questions)} questions as they are now: {names}."
        )
    for name in ("base", "max_new_tokens", "sampling", "seed", "quantization", "template_kwargs"):
        then, now = previous.settings.get(name), settings[name]
        if then != now:
            notes.append(f"{participant.name} answered with {name} {then!r}, the others with {now!r}.")
    return participant


def _write_all(found: Comparison, output: str | None, failures: str | None, pairs: str | None) -> Iterable[str]:
    if output is not None:
        folder = Path(output).expanduser()
        record = json.dumps(to_record(found), ensure_ascii=False, indent=1) + "\n"
        write_whole(folder / "comparison.json", record)
        write_whole(folder / "comparison.html", render_page(found))
        yield f"All answers: {folder / 'comparison.html'}, {folder / 'comparison.json'}"
    if failures is not None:
        path = Path(failures).expanduser()
        ready, uncorrected = training_rows(found)
        write_whole(path, _as_lines(ready))
        yield f"{len(ready)} failures to train on: {path}"
        if uncorrected:
            path = path.with_name(f"{path.stem}.uncorrected{path.suffix}")
            write_whole(path, _as_lines(uncorrected))
            yield f"{len(uncorrected)} failures to be corrected first (then remove their train: false): {path}"
    if pairs is not None:
        rows = preference_pairs(found)
        write_whole(Path(pairs).expanduser(), _as_lines(rows))
        yield f"{len(rows)} preference pairs: {pairs}"


def _as_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
