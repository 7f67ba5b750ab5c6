"""Rows on disk are those that were encoded, bit by bit, and are found by what they depend on."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcore.data.alignment.paired_rows import PairedSource
from kdcore.data.alignment.prompted_rows import PromptedSource
from kdcore.data.encoded import encode as encoding
from kdcore.data.encoded.cache import KIND, MANIFEST
from kdcore.data.encoded.encode import encoded_rows, fingerprint
from kdcore.data.encoded.rows import EncodedRows
from kdcore.data.encoded.table import to_batch
from kdcore.data.rows import (
    RowDataset,
    content_keys,
    digest_of,
    learned_tokens,
    lengths_of,
    note_shared_rows,
    row_keys,
)
from kdcore.data.store import row_key
from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.models.folder.kept_files import entries
from kdcore.runs.progress import Silent
from kdcore.runs.today import pinned
from kdcore_baselines.sources.components import ChatParams
from kdcore_baselines.sources.files import ChatSource
from tests.fixtures.processes.forked import exit_code, forks
from tests.tiny.tiny_chat_models import tiny_tokenizer

KINDS = {
    "tokens": torch.tensor([1, 2, 70_000]),
    "wide": torch.tensor([2**40, -(2**40)]),
    "none": torch.empty(0, dtype=torch.int64),
    "number": torch.tensor(3.5, dtype=torch.float64),
    "image": torch.randn(2, 3, 4),
    "half": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.float16),
    "brain": torch.tensor([1.5, float("inf"), -0.0], dtype=torch.bfloat16),
    "flags": torch.tensor([[True], [False]]),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
}


class Encodes:
    """A source whose examples are rows."""

    def __init__(self, rows: Sequence[Row], name: str = "rows") -> None:
        self.rows, self.name, self.reads = rows, name, 0

    def read(self) -> Sequence[Row]:
        self.reads += 1
        return self.rows

    def encode(self, example: Row, tokenizer: Any, max_length: int) -> Row:
        return example

    def fingerprint(self) -> str | None:
        return self.name


def row(place: int, size: int, *, learned: bool = True, notes: tuple[str, ...] = ()) -> Row:
    ids = torch.arange(place, place + size)
    mask = (ids % 3 == place % 3) & learned
    attended = torch.ones_like(ids)
    return Row({"input_ids": ids, "attention_mask": attended}, ids + 1, mask, f"r{place}", notes)


def same(one: Row, other: Row) -> None:
    assert (
        one.id == other.id and one.notes == other.notes and list(one.inputs) == list(other.inputs)
    )
    pairs = [(one.inputs[name], other.inputs[name]) for name in one.inputs]
    for a, b in [*pairs, (one.labels, other.labels), (one.mask, other.mask)]:
        assert (a.dtype == b.dtype and a.shape == b.shape and a.equal(b)) or a.isnan().any()
        left, right = a.reshape(-1), b.reshape(-1)
        assert len(left) == 0 or left.view(torch.uint8).equal(right.view(torch.uint8))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoding, "CHUNK", 4)
    return tmp_path / "cache"


def encode(source: Any, length: int = 9, **how: Any) -> EncodedRows:
    rows, _ = encoded_rows(source, tiny_tokenizer(), length, Silent(), **how)
    assert isinstance(rows, EncodedRows)
    return rows


def test_tensors_of_every_kind_survive_bit_by_bit() -> None:
    mask = torch.tensor([True, False])
    made = [Row(KINDS, torch.tensor([0.5, -1.0]), mask, f"ä{n}", ("a note",) * n) for n in range(3)]
    for one, other in zip(encode(Encodes(made)), made, strict=True):
        same(one, other)


def in_a_process(work: Callable[[], None], cache: Path) -> None:
    """Run it in a process that has one thread, as that of a command has when it encodes.

    Those of the suite have threads of their own, and what they fork may wait for one of them.
    """
    process = forks().Process(target=with_small_chunks, args=(work, str(cache)))
    process.start()
    assert exit_code(process) == 0


def with_small_chunks(work: Callable[[], None], cache: str) -> None:
    os.environ["KDCORE_CACHE"] = cache
    encoding.CHUNK = 4
    encoding._WORTH_A_PROCESS = 1
    work()


def test_rows_are_those_of_memory() -> None:
    rows_are_those_of_memory(1)


def test_rows_of_two_processes_are_those_of_memory(cache: Path) -> None:
    in_a_process(partial(rows_are_those_of_memory, 2), cache)


def rows_are_those_of_memory(workers: int) -> None:
    """Dropped rows are gone, in any number of processes; a wider number begins another file."""
    made = [row(n, 3 + n % 7, learned=n % 5 > 0, notes=("odd",) * (n % 2)) for n in range(40)]
    made += [row(2**20, 4), row(2**40, 2), row(1, 9)]
    kept = [each for each in made if each.mask.any()]
    source, before = Encodes(made), torch.get_rng_state()
    rows = encode(source, workers=workers)
    assert torch.get_rng_state().equal(before)
    assert len(list(rows.folder.glob("*.arrow"))) == 2
    assert len(rows) == len(kept) and rows[-1].id == "r1"
    for one, other in zip(rows, kept, strict=True):
        same(one, other)
    assert [each.id for each in rows[2:7:2]] == [each.id for each in kept[2:7:2]]
    assert rows.summary.examples == 43 and rows.summary.dropped.number == 8
    assert rows.summary.dropped.first == ["r0", "r5", "r10"]
    assert rows.summary.notes["odd"].number == 20 and rows.summary.full.number == 5
    assert rows.digest == digest_of(kept)
    assert lengths_of(rows).tolist() == lengths_of(kept).tolist()
    assert np.array_equal(content_keys(rows), content_keys(kept))
    assert list(row_keys(rows)) == [row_key(each) for each in kept]
    assert source.reads == 1
    again = encode(source)
    assert source.reads == 1 and again.digest == rows.digest


def test_large_rows_are_encoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process holds several copies of the rows that it encodes at a time."""
    made = [row(n, 8) for n in range(7)]
    assert bounds(encode(Encodes(made))) == [4, 3]
    monkeypatch.setattr(encoding, "_CHUNK_BYTES", 300)  # a row has 2 x 8 numbers of 8 bytes
    few = encode(Encodes(made, "others"))
    assert bounds(few) == [2, 2, 2, 1] and few.digest == digest_of(made)


def bounds(rows: EncodedRows) -> list[int]:
    """The number of rows in each batch."""
    batches: list[int] = json.loads((rows.folder / MANIFEST).read_text())["batches"]
    return batches


def test_what_the_writer_keeps_is_not_a_part_of_a_batch(tmp_path: Path) -> None:
    batch = to_batch([row(place, 5) for place in range(4)])
    with encoding._Writer(tmp_path) as writer:
        writer.add(batch)
    for kept in (*writer.lengths, *writer.contents):
        assert kept.base is None, "a view would keep the memory of all rows"


def test_counts_of_tokens_are_those_of_memory() -> None:
    made = [row(n, 9) for n in range(9)]
    assert learned_tokens(encode(Encodes(made)), 30).equal(learned_tokens(made, 30))


def test_shared_rows_are_found() -> None:
    told: list[str] = []

    class Listening(Silent):
        def note(self, text: str) -> None:
            told.append(text)

    rows = encode(Encodes([row(n, 5) for n in range(20)]))
    note_shared_rows(RowDataset(rows), RowDataset([row(30, 5), row(7, 5)]), Listening())
    assert len(told) == 1 and told[0].startswith("1 of 2 held-out rows") and "r7" in told[0]


def test_pages_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are the same afterwards."""
    monkeypatch.setattr("kdcore.data.encoded.rows.HELD", 1)
    made = [row(n, 5) for n in range(20)]
    for one, other in zip(encode(Encodes(made)), made, strict=True):
        same(one, other)


def test_rows_can_be_sent_to_another_process() -> None:
    """A copy is made as one in another process is: from what pickle sends, which names a folder."""
    rows = encode(Encodes([row(n, 5) for n in range(20)]))
    sent = copy.copy(rows)
    assert sent is not rows and [one.id for one in sent] == [one.id for one in rows]


def test_rows_without_a_fingerprint_stay_in_memory(cache: Path) -> None:
    source = Encodes([row(0, 3)])
    monkey: Any = source
    monkey.fingerprint = lambda: None
    rows, summary = encoded_rows(source, tiny_tokenizer(), 9, Silent())
    assert isinstance(rows, list) and summary.examples == 1 and not cache.exists()


class Refuses(Encodes):
    def encode(self, example: Row, tokenizer: Any, max_length: int) -> Row:
        if example.id == "r5":
            raise UserError("r5 is wrong", "fix it")
        return example


def test_mistakes_are_told_by_workers(cache: Path) -> None:
    """No half of a folder is found afterwards."""
    in_a_process(tell_a_mistake, cache)
    assert not list(cache.glob("rows/*/manifest.json"))
    assert len(encode(Encodes([row(n, 3) for n in range(9)]))) == 9


def tell_a_mistake() -> None:
    with pytest.raises(UserError, match="r5 is wrong"):
        encode(Refuses([row(n, 3) for n in range(9)]), workers=2)


def test_rows_of_different_inputs_are_refused() -> None:
    other = Row({"input_ids": torch.tensor([1])}, torch.tensor([1]), torch.tensor([True]), "r9")
    with pytest.raises(UserError, match="r9 has the inputs input_ids, and r0 has input_ids, att"):
        encode(Encodes([row(0, 3), other], "in a chunk"))
    with pytest.raises(UserError, match="the row r9 has other inputs"):
        encode(Encodes([*(row(n, 3) for n in range(4)), other], "between chunks"))


def test_data_that_change_meanwhile_are_refused() -> None:
    class Changes(Encodes):
        def fingerprint(self) -> str | None:
            return f"{self.reads}"

    with pytest.raises(UserError, match="changed while its rows were encoded"):
        encode(Changes([row(0, 3)]))


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KDCORE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write encoded rows") as told:
        encode(Encodes([row(0, 3)]))
    assert "KDCORE_CACHE" in told.value.cure


def chat(path: Path, **params: Any) -> ChatSource:
    return ChatSource(ChatParams(path=path, **params), None)  # type: ignore[arg-type]


def test_a_fingerprint_is_that_of_all_that_rows_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")

    def found(tokenizer: Any, length: int = 9, **params: Any) -> str:
        name = fingerprint(chat(path, **params), tokenizer, length)
        assert name is not None
        return name

    tokenizer, base = tiny_tokenizer(), found(tiny_tokenizer())
    tokenizer("a long text", truncation=True, max_length=2)
    assert found(tokenizer) == base  # a call leaves its truncation in the tokenizer
    others = [found(tokenizer, 8), found(tokenizer, system="s"), found(tokenizer, template="none")]
    tokenizer.chat_template += " "
    others.append(found(tokenizer))
    tokenizer.chat_template += "{{ strftime_now('%d') }}"
    for day in ("2026-01-01", "2026-01-02"):
        with pinned(day):
            others.append(found(tokenizer))
    changed = tiny_tokenizer()
    changed.add_tokens(["one more"])
    others.append(found(changed))
    path.write_text(json.dumps({"prompt": "a", "response": "c!"}) + "\n")
    others.append(found(tiny_tokenizer()))
    for rule in ("MASK_RULE", "NOTES_RULE"):  # notes are stored with the rows
        monkeypatch.setattr(encoding, rule, -1)
        others.append(found(tiny_tokenizer()))
    assert len({base, *others}) == len(others) + 1


class Noted(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def sized(name: str, tokenizer: Any) -> EncodedRows:
    found, _ = encoded_rows(Encodes([row(0, 5000)], name), tokenizer, 9000, Silent())
    assert isinstance(found, EncodedRows)
    return found


def test_rows_that_were_not_used_for_longest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, noted = tiny_tokenizer(), Noted()
    folders: list[Path] = []
    for place, name in enumerate(["old", "read again", "in use", "young"]):
        opened = sized(name, tokenizer)
        folders.append(opened.folder)
        if name == "in use":
            used = opened  # its lock ends with it
        os.utime(opened.folder, (1000 + place, 1000 + place))
    del opened
    sized("read again", tokenizer)
    os.utime(folders[2], (1, 1))
    assert [entry.path for entry in entries(KIND)] == [folders[n] for n in (2, 0, 3, 1)]
    size = entries(KIND)[0].bytes
    monkeypatch.setenv("KDCORE_CACHE_GB", str(3.5 * size / 1e9))
    encoded_rows(Encodes([row(0, 5000)], "new"), tokenizer, 9000, noted)
    assert [folder.exists() for folder in folders] == [False, True, True, False]
    (line,) = noted.notes
    assert "removed" in line and "KDCORE_CACHE_GB" in line
    same(used[0], row(0, 5000))
    assert sized("old", tokenizer).folder == folders[0]  # encoded again


def test_rows_that_are_read_are_not_removed() -> None:
    rows = sized("read", tiny_tokenizer())
    (entry,) = entries(KIND)
    worker = copy.deepcopy(rows)  # as a worker opens it
    del rows
    assert not entry.remove() and entry.path.exists()
    same(worker[0], row(0, 5000))
    del worker
    assert entry.remove() and not entry.path.exists() and not entries(KIND)


def test_a_size_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCORE_CACHE_GB", "much")
    with pytest.raises(UserError, match="KDCORE_CACHE_GB is 'much'"):
        sized("some", tiny_tokenizer())


def test_a_source_for_two_models_tells_what_its_source_left_out(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "rows.jsonl", tiny_tokenizer()
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n')
    plain = chat(path, tidy=True)
    for source in (
        PairedSource(plain, tokenizer, tokenizer, "positions"),
        PromptedSource(plain, "{prompt}"),
    ):
        _, summary = encoded_rows(source, tokenizer, 64, Silent())
        assert summary.left_out.first == ["rows.jsonl:2"]
