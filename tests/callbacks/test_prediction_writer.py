"""The answers of predict, as files: every row, in order, whatever its text and wherever it comes from."""

import json
from types import SimpleNamespace

import lightning as L
import pytest
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_qlora.callbacks import PredictionWriter

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices")


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Echo(L.LightningModule):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return [{"question": text, "answer": text} for text in batch]


def loader(rows):
    return DataLoader(rows, batch_size=2, collate_fn=list)


def written(folder):
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["answer"] for line in lines if line]


def predict(folder, *loaders):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=[PredictionWriter()], **options)
    trainer.predict(Echo(), list(loaders))
    assert [path.name for path in folder.iterdir()] == ["predictions.jsonl"]
    return written(folder)


@pytest.mark.parametrize("kind", [Rows, Stream])
def test_any_line_separator_may_be_in_a_text(tmp_path, kind):
    texts = [f"one{separator}two" for separator in "\n\r\x0b\x0c\x1c\x85\u2028\u2029"]
    assert predict(tmp_path, loader(kind(texts))) == texts


@pytest.mark.parametrize("kinds", [(Stream,), (Rows, Stream), (Stream, Rows), (Stream, Stream)])
def test_every_row_is_written_in_order(tmp_path, kinds):
    texts = [[f"{kind.__name__} {i} {j}" for j in range(5 + i)] for i, kind in enumerate(kinds)]
    loaders = [loader(kind(rows)) for kind, rows in zip(kinds, texts, strict=True)]
    assert predict(tmp_path, *loaders) == [row for rows in texts for row in rows]


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        # A sampler gives the ranks equally many rows, and the first row to two of them.
        ([[[0, 2], [4]], [[1, 3], [0]]], ["1.2", "1.0", "0.1", "1.1", "0.2"]),
        ([[[], []], [[], []]], ["0.0", "1.0", "0.1", "1.1", "0.2", "1.2"]),
    ],
    ids=["known", "unknown"],
)
def test_two_ranks(tmp_path, indices, expected):
    strategy = SimpleNamespace(barrier=lambda name: None)
    ranks = []
    for rank in (1, 0):
        place = {"global_rank": rank, "world_size": 2, "is_global_zero": rank == 0}
        trainer = SimpleNamespace(strategy=strategy, default_root_dir=tmp_path, global_step=0, **place)
        writer = PredictionWriter()
        writer.setup(trainer, None, "predict")
        for i, count in enumerate((2, 1)):
            rows = [{"answer": f"{rank}.{2 * i + j}"} for j in range(count)]
            writer.write_on_batch_end(trainer, None, rows, indices[rank][i], None, i, 0)
        ranks.append((writer, trainer))
    for writer, trainer in ranks:
        writer.on_predict_end(trainer, None)
    assert written(tmp_path) == expected
