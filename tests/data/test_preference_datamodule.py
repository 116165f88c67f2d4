"""Pairs and judged answers from files to batches."""

from __future__ import annotations

import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import tiny_tokenizer
from tiny_chats import fit, make_data, write_chats
from tiny_pairs import pair_data, write_judged, write_pairs

from lightning_qlora.data import DataSource, PreferenceDataModule
from lightning_qlora.schema import ChatDataModule, PreferenceData

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "pairs.jsonl", COUNT)
    write_pairs(folder / "more.jsonl", 7, first=1000)
    write_judged(folder / "judged.jsonl", COUNT)
    write_chats(folder / "chats.jsonl", 12)
    return folder


def data(folder: Path, name: str = "pairs.jsonl", **options: Any) -> PreferenceDataModule:
    module = pair_data(folder / name, folder / "cache", **options)
    module.prepare_data()
    module.setup()
    return module


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(batch: Any, module: PreferenceDataModule) -> list[str]:
    """The supervised text of each document."""
    texts = torch.split(batch["targets"], list(batch["num_targets"]))
    return [module.tokenizer.decode(text).removesuffix("<|im_end|>") for text in texts]


def answers(folder: Path) -> list[str]:
    rows = records(folder / "pairs.jsonl")
    return [row[side][0]["content"] for row in rows for side in ("chosen", "rejected")]


LAYOUTS = [{}, {"share_prompts": True}, {"packing": False}, {"pad_to_multiple_of": 16, "share_prompts": True}]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_each_pair_is_in_one_batch_side_by_side_once_an_epoch(folder, options):
    module = data(folder, **options)
    expected = answers(folder)
    seen = []
    for batch in module.train_dataloader():
        assert torch.equal(batch["rejected"], batch["chosen"] + 1)
        assert batch["mismatched"].tolist() == []
        assert batch["reference_log_probs"] is None
        rows = [row for row in batch["row_ids"] if row >= 0]
        assert [row % 2 for row in rows] == [0, 1] * (len(rows) // 2)
        assert said(batch, module)[: len(rows)] == [expected[row] for row in rows]
        assert [str(place) for place in module.origins(batch["row_ids"])] == [
            f"{folder / 'pairs.jsonl'}:{row // 2 + 1}" for row in rows[::2]
        ]
        if module.packing:
            assert batch["input_ids"].numel() <= 3 * 192
            assert sum(batch["document_lengths"]) == batch["input_ids"].numel()
        else:
            assert len(batch["chosen"]) <= 3
        seen += rows
    assert sorted(seen) == list(range(2 * COUNT))


def test_answers_the_protocols(folder):
    module = data(folder, validation=str(folder / "more.jsonl"))
    assert isinstance(module, ChatDataModule)
    assert isinstance(module, PreferenceData)
    assert module.preference_stages == ("train", "validation")
    assert module.num_documents("train") == 2 * COUNT
    assert module.report.rows_read == module.report.rows_kept == COUNT
    chosen = [len(module.tokenizer(text).input_ids) + 1 for text in answers(folder)[::2]]
    assert module.mean_chosen_tokens() == pytest.approx(np.mean(chosen))


def test_judged_answers_come_with_a_mismatched_one(folder):
    module = data(folder, "judged.jsonl", unpaired=True)
    rows = records(folder / "judged.jsonl")
    good, bad, seen = [], [], []
    for batch in module.train_dataloader():
        texts, ids = said(batch, module), batch["row_ids"]
        good += [ids[number] for number in batch["chosen"].tolist()]
        bad += [ids[number] for number in batch["rejected"].tolist()]
        for number in batch["mismatched"].tolist():
            own = ids[number] - COUNT
            assert ids[number - 1] == own
            other = [row["completion"][0]["content"] for row in rows].index(texts[number])
            assert rows[other]["prompt"] != rows[own]["prompt"]
            assert module.origins([ids[number]]) == module.origins([own])
            seen.append(own)
    assert sorted(good) == [number for number, row in enumerate(rows) if row["label"]]
    assert sorted(bad) == [number for number, row in enumerate(rows) if not row["label"]]
    assert sorted(seen) == list(range(COUNT))
    lengths = module.report.answers
    assert (lengths.num_chosen, lengths.num_rejected, lengths.num_pairs) == (len(good), len(bad), 0)


def test_the_format_of_a_source_asks_for_judged_answers(folder):
    source = DataSource(str(folder / "judged.jsonl"), format="unpaired")
    settings: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "cache_dir": str(folder / "cache"), "max_length": 192}
    assert PreferenceDataModule(source, **settings).unpaired
    assert not PreferenceDataModule(str(folder / "pairs.jsonl"), **settings).unpaired


def test_pairs_are_one_good_and_one_bad_answer_to_kto(folder):
    module = data(folder, unpaired=True, share_prompts=True, tokens_per_batch=None)
    for batch in module.train_dataloader():
        assert len(batch["chosen"]) == len(batch["rejected"]) == len(batch["mismatched"])
        assert [n > 0 for n in batch["shared_prompts"]] == [False, True, True] * len(batch["chosen"])
        assert batch["input_ids"].numel() <= 3 * 192


def test_worker_processes_give_the_same_documents(folder, tmp_path):
    module = pair_data(folder / "judged.jsonl", tmp_path, unpaired=True, num_proc=2)
    module.setup("fit")
    expected = data(folder, "judged.jsonl", unpaired=True)
    assert module.documents_digest("train") == expected.documents_digest("train")
    assert module.report.to_dict() == expected.report.to_dict()
    batches = [
        expected.train_dataloader(),
        data(folder, "judged.jsonl", unpaired=True, num_workers=1).train_dataloader(),
    ]
    for here, there in zip(*batches, strict=True):
        assert all(torch.equal(here[k], there[k]) for k in ("input_ids", "target_documents", "mismatched"))


def test_a_weight_repeats_pairs_whole(folder):
    source = DataSource(str(folder / "pairs.jsonl"), weight=2.0)
    module = PreferenceDataModule(
        [source], tokenizer=tiny_tokenizer(), cache_dir=str(folder / "cache"), max_length=192, share_prompts=True
    )
    module.setup("fit")
    rows = [row for batch in module.train_dataloader() for row in batch["row_ids"]]
    assert sorted(rows) == sorted(2 * list(range(2 * COUNT)))
    known = [row for batch in module.reference_batches("train") for row in batch["row_ids"]]
    assert sorted(known) == list(range(2 * COUNT))


def test_wrong_kinds_of_rows_are_refused_with_what_to_do(folder):
    with pytest.raises(ValueError, match=r"(?s)12  not-a-pair.*train with SFTDataModule"):
        data(folder, "chats.jsonl")
    with pytest.raises(ValueError, match=r"(?s)24  not-a-pair.*unpaired: true"):
        data(folder, "judged.jsonl")
    with pytest.raises(ValueError, match=r"(?s)12  no-label.*label: true or false"):
        data(folder, "chats.jsonl", unpaired=True)
    supervised = make_data(folder / "pairs.jsonl", folder / "cache")
    with pytest.raises(ValueError, match=r"(?s)24  pair-for-supervised-run.*PreferenceDataModule.*format: preference"):
        supervised.prepare_data()


def test_contradictions_are_refused(folder):
    with pytest.raises(MisconfigurationException, match="below 2 times max_length=192, 384: a row"):
        data(folder, tokens_per_batch=383)
    with pytest.raises(MisconfigurationException, match="share_prompts .* packing: true"):
        data(folder, share_prompts=True, packing=False)


def test_validation_holds_out_whole_rows(folder):
    recorder = fit(pair_data(folder / "pairs.jsonl", folder / "cache", validation_fraction=0.25), max_epochs=1)
    trained = set(itertools.chain.from_iterable(rows for _, _, rows in recorder.seen))
    validated = set(itertools.chain.from_iterable(recorder.evaluated))
    assert len(validated) == 12
    assert trained | validated == set(range(2 * COUNT))
    assert not {row // 2 for row in trained} & {row // 2 for row in validated}


def test_the_options_of_both_data_modules_are_documented():
    for name in inspect.signature(PreferenceDataModule).parameters:
        assert f"        {name}: " in (PreferenceDataModule.__doc__ or "")


# The reference


@pytest.mark.parametrize("options", [{}, {"unpaired": True}, {"share_prompts": True}], ids=str)
def test_reference_log_probs_follow_their_documents(folder, options):
    module = data(folder, **options)
    count = module.num_documents("train")
    log_probs = torch.full((count,), torch.nan)
    for batch in module.reference_batches("train"):
        assert batch["reference_log_probs"] is None
        for row, document in zip(batch["row_ids"], batch["num_targets"], strict=True):
            log_probs[row] = -float(document)
    assert not log_probs.isnan().any()
    module.set_reference_log_probs("train", log_probs)
    for batch in module.train_dataloader():
        assert batch["reference_log_probs"].tolist() == [-float(n) for n in batch["num_targets"]]
        assert batch["reference_log_probs"].dtype == torch.float32
    with pytest.raises(ValueError, match=rf"expected torch.float32 \({count},\)"):
        module.set_reference_log_probs("train", log_probs[:-1])


def test_stages_of_one_source_have_documents_of_their_own(folder):
    module = data(folder, validation_fraction=0.25)
    digests = {stage: module.documents_digest(stage) for stage in module.preference_stages}
    assert list(digests) == ["train", "validation"]
    assert len(set(digests.values())) == 2  # a reference computed for one does not do for the other
    rows = {stage: {row for b in module.reference_batches(stage) for row in b["row_ids"]} for stage in digests}
    assert rows["train"] | rows["validation"] == set(range(2 * COUNT))
    assert not rows["train"] & rows["validation"]


def test_digest_of_the_documents(folder):
    digest = data(folder).documents_digest("train")
    assert digest == data(folder, packing=False).documents_digest("train")
    assert digest != data(folder, max_length=100).documents_digest("train")
    judged = [data(folder, unpaired=True, seed=seed).documents_digest("train") for seed in (0, 1)]
    assert len({digest, *judged}) == 3
