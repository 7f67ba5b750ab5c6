"""Rows of any length become batches that say where each came from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from kdcore.data.rows import (
    RowDataset,
    collate,
    encode_rows,
    note_cut_rows,
    note_shared_rows,
    padding,
)
from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.runs.progress import Silent
from tests.tiny.tiny_chat_models import tiny_tokenizer

PAD = {"input_ids": 7, "attention_mask": 0}


def row(length: int, start: int = 10) -> Row:
    ids = torch.arange(start, start + length)
    return Row(
        inputs={"input_ids": ids, "attention_mask": torch.ones(length, dtype=torch.int64)},
        labels=ids + 1,
        mask=torch.arange(length) % 2 == 0,
        id=f"row-{start}",
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_batch_is_its_rows_and_padding(lengths: list[int]) -> None:
    rows = [(place + 3, row(length)) for place, length in enumerate(lengths)]
    batch = collate(rows, PAD)
    assert list(batch) == ["input_ids", "attention_mask", "labels", "mask", "index"]
    assert batch["index"].tolist() == [place for place, _ in rows]
    assert batch["mask"].dtype == torch.bool and batch["labels"].dtype == torch.int64
    for b, (_, one) in enumerate(rows):
        size = len(one.labels)
        for name, padded in (("input_ids", 7), ("attention_mask", 0)):
            assert torch.equal(batch[name][b, :size], one.inputs[name])
            assert (batch[name][b, size:] == padded).all()
        assert torch.equal(batch["labels"][b, :size], one.labels)
        assert (batch["labels"][b, size:] == 0).all()
        assert torch.equal(batch["mask"][b, :size], one.mask)
        assert not batch["mask"][b, size:].any()


def test_inputs_of_one_shape_are_stacked() -> None:
    rows = [
        (place, Row({"pixel_values": torch.full((1, 8, 8), float(place))}, torch.tensor([place]),
                    torch.tensor([True]), str(place)))
        for place in range(3)
    ]  # fmt: skip
    batch = collate(rows, PAD)
    assert batch["pixel_values"].shape == (3, 1, 8, 8)
    assert batch["labels"].tolist() == [[0], [1], [2]]


def test_a_loader_reads_rows_by_their_places() -> None:
    data = RowDataset([row(2, 10), row(3, 20), row(1, 30)])
    loader = DataLoader(data, batch_size=2, collate_fn=lambda rows: collate(rows, PAD))
    assert [batch["index"].tolist() for batch in loader] == [[0, 1], [2]]


def test_padding_falls_back_on_the_end_token() -> None:
    tokenizer = tiny_tokenizer()
    assert padding(tokenizer)["input_ids"] == tokenizer.pad_token_id == 0
    tokenizer.pad_token = None
    assert padding(tokenizer)["input_ids"] == tokenizer.eos_token_id == 2


class Encodes:
    """A source whose examples are the numbers of tokens that they learn."""

    def __init__(self, *examples: int) -> None:
        self.examples = examples

    def read(self) -> tuple[int, ...]:
        return self.examples

    def encode(self, example: int, tokenizer: object, max_length: int) -> Row:
        ids = torch.arange(5)
        return Row({"input_ids": ids}, ids, ids < example, f"row-{example}")


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def test_rows_that_learn_nothing_are_dropped_and_counted() -> None:
    notes = Notes()
    rows, _ = encode_rows(Encodes(1, 0, 2), None, 9, notes)
    assert [row.id for row in rows] == ["row-1", "row-2"]
    assert notes.lines == ["dropped 1 of 3 rows without a token to learn within 9 tokens: row-0"]
    with pytest.raises(UserError, match="none of the 2 rows has a token to learn within 9 tokens"):
        encode_rows(Encodes(0, 0), None, 9, notes)


def test_rows_that_reach_the_limit_are_counted() -> None:
    notes = Notes()
    note_cut_rows(encode_rows(Encodes(1, 2), None, 9, notes)[1], 9, notes)
    assert not notes.lines
    note_cut_rows(encode_rows(Encodes(1, 2), None, 5, notes)[1], 5, notes)
    (line,) = notes.lines
    assert line.startswith("2 of 2 rows reach data.max_length, 5 tokens") and "row-1" in line


def test_a_tokenizer_without_a_token_to_pad_with() -> None:
    """The mask hides whatever fills a row."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    assert padding(tokenizer)["input_ids"] == 0


def test_held_out_rows_that_are_trained_on_are_told() -> None:
    told: list[str] = []

    class Listening(Silent):
        def note(self, text: str) -> None:
            told.append(text)

    train = RowDataset([row(3), row(4), row(5, start=20)])
    note_shared_rows(train, RowDataset([row(6), row(5)]), Listening())
    assert told == []
    note_shared_rows(train, RowDataset([row(6), row(4), row(5, start=20)]), Listening())
    (note,) = told
    assert note.startswith("2 of 3 held-out rows") and "row-10, row-20" in note
