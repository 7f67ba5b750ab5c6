"""Download the public data sets that the examples and the tests read, and nothing else.

    python examples/fetch_data.py data
    export KDCORE_DATA=$PWD/data

The files come from their publishers' repositories, each at a fixed commit, and are brought into the
shapes that the sources `chat` and `labelled_text` read. A file is written only if its digest is the
one stated here. Python's standard library suffices.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

HOST = "https://raw.githubusercontent.com"
EAGLE = "SafeAILab/EAGLE/cb7e0841fe0c206c6ed74a197ad5e2a1f13f5a2b/eagle/data"
GSM8K = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
SELF_INSTRUCT = "yizhongw/self-instruct/0b26ccaa415992100fa32df62d41b994cf928e23"
CLINC150 = "clinc/oos-eval/828f8093932c8fe6ca7936c3d2e52903b1c523de/data/data_full.json"
BANKING77 = (
    "PolyAI-LDN/task-specific-datasets/57ec275d8078af65b7731c2a98be812d844a6d6b/banking_data"
)


@dataclass(frozen=True)
class File:
    """A file to write.

    name: its path in the data folder. sha256: its digest. convert: from the contents of the
    published files to its own. published: their paths on the host.
    """

    name: str
    sha256: str
    convert: Callable[..., str]
    published: tuple[str, ...]


def as_published(text: str) -> str:
    """The file itself."""
    return text


def questions(task: str) -> Callable[[str], str]:
    """Three of every four questions of a speculative decoding task, as `{id, turns, reference}`."""

    def convert(text: str) -> str:
        kept = [row for index, row in enumerate(_rows(text)) if index % 4 != 3]
        return _jsonl(
            {"id": f"{task}-{row['question_id']}"}
            | {key: row[key] for key in ("turns", "reference") if key in row}
            for row in kept
        )

    return convert


def problems_to_validate_on(text: str, asked: str) -> str:
    """The first 800 test problems of GSM8K, less those among the questions of the task set."""
    used = {row["turns"][0] for row in _rows(asked)}
    return _jsonl(row for row in _rows(text)[:800] if row["question"] not in used)


def instructions(text: str) -> str:
    """Three of every four user-oriented tasks of Self-Instruct, each with its one instance."""
    kept = [row for index, row in enumerate(_rows(text)) if index % 4 != 3]
    return _jsonl(
        {"id": row["id"], "instruction": row["instruction"], **row["instances"][0]} for row in kept
    )


def intents(split: str) -> Callable[[str], str]:
    """A split of CLINC150 as `text,label`; of the test split, two of every three rows."""

    def convert(text: str) -> str:
        rows = json.loads(text)[split]
        return _csv(row for index, row in enumerate(rows) if split != "test" or index % 3 != 2)

    return convert


def banking_intents(text: str) -> str:
    """Banking77's `text,category` as `text,label`."""
    return _csv(list(csv.reader(io.StringIO(text, newline="")))[1:], end="\n")


def _rows(text: str) -> list[Any]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _jsonl(rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: Any, end: str = "\r\n") -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows([("text", "label"), *rows])
    return text.getvalue()


FILES = [
    File(
        "bench/mt_bench.jsonl",
        "64e52a27083510622a25ee97aab34a6ceaef6b57962790bf7d6196f7fc9468a0",
        questions("mt_bench"),
        (f"{EAGLE}/mt_bench/question.jsonl",),
    ),
    File(
        "bench/humaneval.jsonl",
        "cc7842214cba9b513e2d9c047c0c1ded91bca601fac462257e2fac6676660140",
        questions("humaneval"),
        (f"{EAGLE}/humaneval/question.jsonl",),
    ),
    File(
        "bench/gsm8k.jsonl",
        "56d4bc4d3e6a7b18d996f619270532adccb5d8d5536e14786054e125fbe19d2a",
        questions("gsm8k"),
        (f"{EAGLE}/gsm8k/question.jsonl",),
    ),
    File(
        "bench/alpaca.jsonl",
        "05f6335ec81d4cbe8793a9ffb9e286d89246695eca85557c9a004572ec2ab986",
        questions("alpaca"),
        (f"{EAGLE}/alpaca/question.jsonl",),
    ),
    File(
        "bench/cnn_dm.jsonl",
        "0910daa5d95dfdd3f25a22fdcf42aed01d80fa56edf47bfa1f41cc1dd13804b1",
        questions("cnn_dm"),
        (f"{EAGLE}/sum/question.jsonl",),
    ),
    File(
        "train/gsm8k_train.jsonl",
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        as_published,
        (f"{GSM8K}/train.jsonl",),
    ),
    File(
        "train/gsm8k_validation.jsonl",
        "eeb07b4f85c2f6437538e1a968138a6559abfb96bcc3b1949f27af416e49a460",
        problems_to_validate_on,
        (f"{GSM8K}/test.jsonl", f"{EAGLE}/gsm8k/question.jsonl"),
    ),
    File(
        "train/self_instruct_seed_tasks.jsonl",
        "7779004fa198fdf27cf70a159363879d8a26c53329e11b436af17b3941875f48",
        as_published,
        (f"{SELF_INSTRUCT}/data/seed_tasks.jsonl",),
    ),
    File(
        "eval/self_inst.jsonl",
        "3463704dc23b300bba491b4596212ef6e7b60ed7721abf9b0b962092f75ff078",
        instructions,
        (f"{SELF_INSTRUCT}/human_eval/user_oriented_instructions.jsonl",),
    ),
    File(
        "intent/clinc150_train.csv",
        "1117c4839b4bee5aa6af9aaaa4cc2c60062f968ccc4576ee0b95f136122164dd",
        intents("train"),
        (CLINC150,),
    ),
    File(
        "intent/clinc150_val.csv",
        "d4c82b4d6b16d1bd1b8aad177df158ccead61d525f72762f3e51869582b14234",
        intents("val"),
        (CLINC150,),
    ),
    File(
        "intent/clinc150_test.csv",
        "39f6d9d5e498674c16a5167affe1ce3df09fd16e2f1d2fbd13fbc26c70df4309",
        intents("test"),
        (CLINC150,),
    ),
    File(
        "intent/banking77_train.csv",
        "0a3ecb72a9ca5f1ed4fcf06031f7a7d0dcf7e0adb484eff722c6025e0c761209",
        banking_intents,
        (f"{BANKING77}/train.csv",),
    ),
    File(
        "intent/banking77_test.csv",
        "e25cc6653cadb19296804ecb1c7c4e3248d7c9f641157486831ecef2733db01a",
        banking_intents,
        (f"{BANKING77}/test.csv",),
    ),
]


@cache  # CLINC150 is one file
def download(path: str) -> str:
    """A published file."""
    with urllib.request.urlopen(f"{HOST}/{path}", timeout=60) as answer:
        return bytes(answer.read()).decode("utf-8")


def fetch(folder: Path, read: Callable[[str], str] = download) -> None:
    """Write the files that the folder lacks.

    Args:
        folder: Where to; it is made.
        read: From a path on the host to the published file.

    Raises:
        OSError: The host cannot be reached, or the folder cannot be written.
        ValueError: A published file is not what it was.
    """
    for file in FILES:
        path = folder / file.name
        if path.exists():
            print(f"{path} already exists")
            continue
        content = file.convert(*map(read, file.published)).encode()
        digest = hashlib.sha256(content).hexdigest()
        if digest != file.sha256:
            raise ValueError(f"{file.published[0]} changed: {file.name} has the digest {digest}")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_bytes(content)
        part.replace(path)
        print(f"{path} written")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the data folder, which KDCORE_DATA then names")
    try:
        fetch(parser.parse_args().folder)
    except (OSError, ValueError) as fault:
        sys.exit(f"error: {fault}")
