"""What a million rows cost: to encode them once, then the start, memory and reads of a run.

    python benchmarks/million_rows.py [--rows 1000000] [--tokens 300] [--workers N] > rows.json

The rows are random tokens, so the measurement has no chat template and no tokenizer of a model.
Each part runs in a process of its own: ``encode`` writes the rows; ``start`` opens them as a run
does (fingerprint, digest, lengths, shared rows, token counts); ``epoch`` also draws the order of an
epoch and reads batches of random rows. Each is measured with a tenth of the rows too: bytes a row
are the difference of the resident memory over the difference of the rows. Pages that a process maps
from files are resident as well, and are listed beside its own memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedTokenizerFast

from kdcore.data.encoded.encode import encoded_rows
from kdcore.data.encoded.examples import Examples
from kdcore.data.rows import (
    RowDataset,
    collate,
    digest_of,
    learned_tokens,
    lengths_of,
    note_shared_rows,
)
from kdcore.method.records import Row
from kdcore.runs.progress import Silent

VOCABULARY = 30_000
BATCH = 8
BATCHES = 4000
PARTS = ("encode", "start", "epoch")


class RandomRows:
    """A source of random rows, a tenth of each of which is the prompt."""

    def __init__(self, rows: int, tokens: int) -> None:
        self._rows, self._tokens = rows, tokens

    def read(self) -> Examples[int]:
        """The numbers of the rows."""
        return Examples(self._rows, list)

    def encode(self, example: int, tokenizer: Any, max_length: int) -> Row:
        """Draw the tokens of a row."""
        drawn = np.random.default_rng(example).integers(0, VOCABULARY, self._tokens + 1)
        ids = torch.from_numpy(drawn)
        mask = torch.arange(self._tokens) >= self._tokens // 10
        inputs = {"input_ids": ids[:-1], "attention_mask": torch.ones_like(ids[:-1])}
        return Row(inputs, ids[1:], mask, f"row {example}")

    def fingerprint(self) -> str:
        """The rows depend on their number and length."""
        return f"{self._rows} rows of {self._tokens}"


def tokenizer() -> Any:
    """A tokenizer that no row needs, but every fingerprint."""
    core = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=core)


def resident() -> dict[str, int]:
    """The bytes of this process's own memory and of mapped files that are resident."""
    text = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    kib = {"own": "RssAnon", "mapped": "RssFile"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in kib.items()}


def measure(part: str, size: tuple[int, int], workers: int | None) -> dict[str, Any]:
    """Do one part in this process."""
    source, known = RandomRows(*size), tokenizer()
    before, begun = resident(), time.perf_counter()
    rows, _ = encoded_rows(source, known, 2**20, Silent(), workers=workers)
    found: dict[str, Any] = {}
    if part != "encode":
        digest_of(rows)
        lengths_of(rows).max()
        learned_tokens(rows, VOCABULARY)
        note_shared_rows(RowDataset(rows), RowDataset(rows[:BATCH]), Silent())
    found["seconds"] = round(time.perf_counter() - begun, 3)
    if part == "epoch":
        pad = {"input_ids": 2, "attention_mask": 0}
        loader: DataLoader[Any] = DataLoader(
            RowDataset(rows),
            BATCH,
            sampler=RandomSampler(RowDataset(rows)),
            collate_fn=lambda batch: collate(batch, pad),
        )
        begun = time.perf_counter()
        for number, _ in enumerate(loader, start=1):
            if number == min(BATCHES, len(loader)):
                after = resident()
                break
        found["us_a_row"] = round((time.perf_counter() - begun) / number / BATCH * 1e6, 1)
    else:
        after = resident()
    return found | {"memory": {name: after[name] - before[name] for name in after}}


def apart(part: str, size: tuple[int, int], workers: int | None) -> dict[str, Any]:
    """Do one part in a process of its own."""
    rows, tokens = map(str, size)
    command = [sys.executable, __file__, "--part", part, "--rows", rows, "--tokens", tokens]
    command += [] if workers is None else ["--workers", str(workers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure each part for two numbers of rows, and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part:
        print(json.dumps(measure(asked.part, (asked.rows, asked.tokens), asked.workers)))
        return
    found: dict[str, dict[int, Any]] = {part: {} for part in PARTS}
    sizes = asked.rows // 10, asked.rows
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KDCORE_CACHE"] = folder
        for rows in sizes:
            for part in PARTS:
                found[part][rows] = apart(part, (rows, asked.tokens), asked.workers)
                print(rows, part, found[part][rows], file=sys.stderr)
        on_disk = sum(each.stat().st_size for each in Path(folder).rglob("rows/*/*"))
    bytes_a_row = {
        part: {
            name: round(
                (each[sizes[1]]["memory"][name] - each[sizes[0]]["memory"][name])
                / (sizes[1] - sizes[0]),
                1,
            )
            for name in ("own", "mapped")
        }
        for part, each in found.items()
    }
    facts = {"rows": asked.rows, "tokens": asked.tokens, "cpus": os.cpu_count()}
    on_disk_a_row = round(on_disk / sum(sizes), 1)
    print(
        json.dumps(
            facts | {"parts": found, "bytes_a_row": bytes_a_row, "disk_a_row": on_disk_a_row},
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
