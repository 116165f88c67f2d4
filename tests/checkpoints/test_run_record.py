"""What a checkpoint says of the data it was trained on."""

import json

from tiny import tiny_tokenizer
from tiny_models import save_tiny_model
from tiny_training import tiny_sft_module, tiny_trainer

from lightning_qlora.checkpoints.run_record import describe_run
from lightning_qlora.data import SFTDataModule


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
