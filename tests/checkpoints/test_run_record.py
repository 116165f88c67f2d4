"""What a checkpoint says of the data it was trained on."""

import json

import pytest
from tiny import tiny_tokenizer
from tiny_models import save_tiny_model
from tiny_training import tiny_sft_module, tiny_trainer

from lightning_qlora.callbacks import AdapterCheckpoint
from lightning_qlora.checkpoints.publishing import LocalStore
from lightning_qlora.checkpoints.run_record import describe_run
from lightning_qlora.data import DataSource, PreferenceDataModule, SFTDataModule


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_rows_and_tokens_of_each_stage_are_counted_and_secrets_left_out(tmp_path, monkeypatch):
    base = save_tiny_model(tmp_path / "base", tokenizer=tiny_tokenizer(), num_hidden_layers=1)
    rows = [chat(f"{i}?", f"{i}!") for i in range(6)]
    train, validation = tmp_path / "train.jsonl", tmp_path / "hunter2hunter2.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in [*rows, chat("empty", "")]))
    validation.write_text(json.dumps(rows[0] | {"id": 1}) + "\n")
    monkeypatch.setenv("DATA_PASSWORD", "hunter2hunter2")
    data = SFTDataModule(
        str(train), str(validation), tokenizer=base, max_length=64, cache_dir=str(tmp_path), max_invalid_fraction=1.0
    )
    trainer = tiny_trainer(tmp_path, max_epochs=1)
    trainer.fit(tiny_sft_module(base), datamodule=data)
    counts = describe_run(trainer)["data"]
    assert (counts["train"]["rows"], counts["train"]["refused"]) == (6, 1)
    assert counts["train"]["tokens"] == data.reports["train"].num_tokens > counts["train"]["supervised_tokens"] > 0
    assert counts["train"]["sources"] == [str(train)]
    assert counts["validation"]["rows"] == 1
    assert "hunter2" not in json.dumps(counts)


@pytest.mark.parametrize(
    ("kind", "own"),
    [(SFTDataModule, {"supervise": "last"}), (PreferenceDataModule, {"share_prompts": True})],
    ids=["SFT", "preferences"],
)
def test_the_options_of_a_data_module_are_plain_data_without_secrets_or_the_tokenizer(kind, own):
    data = kind(
        DataSource("a.jsonl", weight=2.0),
        ["b.jsonl"],
        tokenizer=tiny_tokenizer(),
        max_length=64,
        template_kwargs={"hub_token": "hf_secret", "day": object},
        **own,
    )
    recorded = json.loads(json.dumps(data.hparams))
    assert (recorded["train"]["path"], recorded["train"]["weight"]) == ("a.jsonl", 2.0)
    assert recorded["validation"] == ["b.jsonl"]
    assert recorded["template_kwargs"] == {"hub_token": "<secret>", "day": "<class 'object'>"}
    assert recorded["tokenizer"] == data.tokenizer_name
    assert recorded["max_length"] == 64
    assert {name: recorded[name] for name in own} == own


def test_a_checkpoint_records_them_and_is_read_without_pickle(tmp_path):
    base = save_tiny_model(tmp_path / "base", tokenizer=tiny_tokenizer(), num_hidden_layers=1)
    (tmp_path / "train.jsonl").write_text(json.dumps(chat("1?", "1!")) + "\n")

    def fit(ckpt_path=None, **options):
        source = DataSource(str(tmp_path / "train.jsonl"))
        data = SFTDataModule(source, tokenizer=tiny_tokenizer(), max_length=64, cache_dir=str(tmp_path))
        publish = AdapterCheckpoint(tmp_path / "checkpoints")
        trainer = tiny_trainer(tmp_path, callbacks=[publish], enable_checkpointing=True, **options)
        trainer.fit(tiny_sft_module(base), datamodule=data, ckpt_path=ckpt_path)
        return trainer

    fit(max_epochs=1)
    published = LocalStore(tmp_path / "checkpoints").newest_valid()
    assert published.metadata["config"]["data"]["max_length"] == 64
    assert published.metadata["config"]["module"]["model_name"] == base
    assert fit("last", max_epochs=2).global_step == 2
