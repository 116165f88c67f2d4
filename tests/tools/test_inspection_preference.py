"""What an inspection finds in pairs of answers, and in answers judged by themselves."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_pairs import pair_data, write_judged, write_pairs

from lightning_qlora.tools.inspection import gather, print_inspection, render_page
from lightning_qlora.tools.inspection.figures import describe_stage, describe_template

COUNT = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    write_pairs(folder / "pairs.jsonl", COUNT)
    write_judged(folder / "judged.jsonl", COUNT)
    return folder


def data(folder: Path, name: str = "pairs.jsonl", **options: Any):
    return pair_data(folder / name, folder / "cache", **{"tokens_per_batch": None, **options})


LAYOUTS = [{}, {"share_prompts": True}, {"packing": False}, {"unpaired": True, "share_prompts": True}]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_a_pair_is_one_row_in_all_figures(folder, options):
    module = data(folder, **options)
    stage = gather(module, what_if=[40, 64, 10_000]).stages[0]
    assert stage.report.rows_read == stage.num_rows == stage.num_distinct_rows == COUNT
    assert stage.num_duplicates == 0
    assert sum(stage.lengths.values()) == sum(stage.supervised_share) == COUNT
    assert stage.num_supervised_tokens == stage.report.num_supervised_tokens
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert stage.batches.num_batches == len(batches) == sum(stage.batches.fill)
    if module.packing:
        assert stage.num_tokens == stage.batches.num_tokens == sum(batch["input_ids"].numel() for batch in batches)
    else:
        assert stage.batches.capacity == sum(batch["input_ids"].numel() for batch in batches)
    for limit in stage.what_if:
        assert limit.fits + limit.shortened + limit.refused == COUNT
        other = data(folder, **options, max_length=limit.max_length, max_invalid_fraction=1.0)
        if limit.refused == COUNT:
            continue
        other.setup("fit")
        assert other.report.rows_kept == limit.fits + limit.shortened
        assert other.report.num_tokens == limit.num_tokens


def test_length_bias(folder):
    found = gather(data(folder, validation_fraction=0.3))
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    tokenizer = data(folder).tokenizer
    lengths = np.asarray(
        [[len(tokenizer(row[side][0]["content"]).input_ids) + 1 for side in ("chosen", "rejected")] for row in rows]
    )
    train, validation = (stage.answers for stage in found.stages)
    assert train.num_pairs + validation.num_pairs == COUNT
    assert train.chosen_tokens + validation.chosen_tokens == lengths[:, 0].sum()
    assert train.rejected_tokens + validation.rejected_tokens == lengths[:, 1].sum()
    assert train.chosen_longer + validation.chosen_longer == (lengths[:, 0] > lengths[:, 1]).sum()
    assert train.rejected_longer + validation.rejected_longer == (lengths[:, 0] < lengths[:, 1]).sum()
    said = dict(describe_stage(found.stages[0]))["Answers"]
    assert f"{train.chosen_tokens / train.num_pairs:,.1f} tokens on average" in said
    assert f"{100 * train.chosen_longer / train.num_pairs:.1f} %" in said
    assert found.to_dict()["stages"][0]["answers"]["mean_chosen_tokens"] == train.mean_chosen_tokens
    whole = gather(data(folder)).stages[0]
    assert whole.answers == whole.report.answers
    json.dumps(found.to_dict())


def test_judged_answers(folder):
    found = gather(data(folder, "judged.jsonl", unpaired=True), samples=COUNT)
    labels = [json.loads(line)["label"] for line in (folder / "judged.jsonl").read_text().splitlines()]
    answers = found.stages[0].answers
    assert (answers.num_chosen, answers.num_rejected) == (sum(labels), COUNT - sum(labels))
    said = dict(describe_stage(found.stages[0]))["Answers"]
    assert said.startswith(f"{sum(labels)} desirable and {COUNT - sum(labels)} undesirable, of ")
    by_place = {sample.place: sample.answer for sample in found.samples}
    for line, label in enumerate(labels, 1):
        assert by_place[f"{folder / 'judged.jsonl'}:{line}"] == ("desirable" if label else "undesirable")
    assert "answers" in dict(describe_template(found))["Supervised"]


def test_both_answers_are_shown(folder):
    found = gather(data(folder), samples=2, show=["pairs.jsonl:7"])
    row = json.loads((folder / "pairs.jsonl").read_text().splitlines()[6])
    sample = found.samples[0]
    assert (sample.asked, sample.answer) == (True, "chosen")
    learned = "".join(segment.text for segment in sample.segments if segment.supervised)
    assert learned == row["chosen"][0]["content"] + "<|im_end|>"
    assert "".join(segment.text for segment in sample.rejected if segment.supervised) == (
        row["rejected"][0]["content"] + "<|im_end|>"
    )
    text = io.StringIO()
    print_inspection(found, color="never", stream=text)
    assert f"  + {row['chosen'][0]['content']}[[<|im_end|>]]" in text.getvalue()
    assert f"  - {row['rejected'][0]['content']}" in text.getvalue()
    page = re.sub(r"<[^>]+>", "", render_page(found))
    assert row["rejected"][0]["content"] in page
    assert "rejected, behind the same prompt" in page


def test_refused_pairs_are_shown_with_the_reason(folder, tmp_path):
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join([json.dumps({**row, "rejected": row["chosen"]}), *lines[1:5]]))
    found = gather(pair_data(path, tmp_path / "cache"), show=[f"{path}:1"])
    assert found.samples[0].refused.startswith("same-answers: ")
    assert found.stages[0].report.refused == {"same-answers": 1}


def test_leakage_by_prompt(folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    swapped = {**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    path = tmp_path / "validation.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (swapped, rows[1])))
    leakage = gather(data(folder, validation=str(path))).leakage[0]
    assert (leakage.num_rows, leakage.num_exact, leakage.num_same_question) == (2, 1, 2)


def test_other_data_modules_are_refused():
    with pytest.raises(MisconfigurationException, match="SFTDataModule and PreferenceDataModule"):
        gather(L.LightningDataModule())
