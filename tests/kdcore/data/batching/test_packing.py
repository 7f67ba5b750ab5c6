"""Packing and length grouping: every row once, little padding, the same order for one seed."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from kdcore.data.batching.grouping import LengthGroups
from kdcore.data.batching.packing import PackedRows, Packing, packed
from kdcore.data.rows import batch_of, collate, padding_share
from kdcore.method.records import Row

PAD = {"input_ids": 5, "attention_mask": 0}


def row(length: int, number: int = 0) -> Row:
    tokens = torch.arange(length) + 10 * number
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return Row(inputs, tokens + 1, torch.arange(length) % 2 == 1, f"row {number}")


def drawn(kind: str, count: int = 5000) -> Any:
    generator = np.random.default_rng(3)
    found = {
        "short": generator.integers(1, 60, count),
        "of a chat": generator.lognormal(4.5, 0.8, count),
        "all but a few short": np.where(np.arange(count) % 50, 9, 512),
    }[kind]
    return np.clip(found, 1, 512).astype(np.int32)


@pytest.mark.parametrize("kind", ["short", "of a chat", "all but a few short"])
def test_every_row_is_packed_once_and_little_is_padding(kind: str) -> None:
    lengths = drawn(kind)
    packs = packed(lengths, 512)
    assert sorted(chain.from_iterable(packs)) == list(range(len(lengths)))
    filled = [int(lengths[pack].sum()) for pack in packs]
    assert max(filled) <= 512
    assert sum(filled) / (512 * len(packs)) > 0.95


def test_a_row_takes_the_smallest_room_that_holds_it() -> None:
    # 6 opens a sequence, 5 another; 4 fills the first, 3 goes to the second with 2
    assert packed(np.array([2, 3, 4, 5, 6], np.int32), 10) == [[4, 2], [3, 1, 0]]


def test_the_same_seed_packs_the_same_rows() -> None:
    rows = [row(length, n) for n, length in enumerate(drawn("short", 300))]
    one, same, other = (PackedRows(rows, 64, seed) for seed in (1, 1, 2))
    content = [[[place for place, _ in pack] for pack in packs] for packs in (one, same, other)]
    assert content[0] == content[1] != content[2]
    in_order = PackedRows(rows, 64, None)
    assert len(one[0]) == len(one[-len(one)])
    first = sorted(place for number in range(len(in_order)) for place, _ in in_order[number])
    assert first == list(range(300))


@pytest.mark.parametrize("flat", [False, True])
def test_a_packed_batch_has_its_rows_inputs_and_what_is_learned_of_them(flat: bool) -> None:
    rows = [(n, row(length, n)) for n, length in enumerate([3, 4, 5, 1])]
    made = Packing(PAD, flat)([rows[:2], rows[2:]])
    expected: dict[str, list[list[int]]] = {
        "input_ids": [[0, 1, 2, 10, 11, 12, 13], [20, 21, 22, 23, 24, 30, 5]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 0]],
    }
    if flat:
        expected = {name: [a + b[:-1]] for name, (a, b) in expected.items()}
    assert {name: made[name].tolist() for name in expected} == expected
    assert "attention_mask" not in made
    alone = collate(rows, PAD)
    for name in ("labels", "mask", "index"):
        assert torch.equal(made[name], alone[name])
    assert made["lengths"].tolist() == [3, 4, 5, 1]
    batch, plain = batch_of(made), batch_of(alone)
    read = batch.inputs["input_ids"].flatten()[batch.positions_in_inputs]
    assert torch.equal(read, plain.inputs["input_ids"].flatten()[plain.positions])


@pytest.mark.parametrize("rows", [2, 16, 1003])
def test_length_groups_have_every_row_once_and_another_order_in_each_epoch(rows: int) -> None:
    lengths = drawn("of a chat", rows)
    order = LengthGroups(lengths, 8, seed=1)
    first, again = list(order), list(LengthGroups(lengths, 8, seed=1))
    order.set_epoch(1)
    assert sorted(first) == list(range(rows)) and first == again
    if rows > 8:
        assert list(order) != first
    if rows > 100:
        assert lengths[first[0]] == lengths[np.array(first[: rows // 8 * 8])].max()
        batches = [lengths[first[i : i + 8]] for i in range(0, rows, 8)]
        plain = [lengths[i : i + 8] for i in range(0, rows, 8)]
        assert padding_share(batches) < padding_share(plain) / 4
