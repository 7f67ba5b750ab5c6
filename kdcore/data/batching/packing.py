"""Packing: several rows in one sequence, so that little of a batch is padding.

Attention does not cross from one row to the next: transformers keeps rows apart where the position
ids start again at 0 and there is no attention mask. What follows the forward pass does not know of
packing: labels, mask and index of a batch are those of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from kdcore.data.rows import learned_of, lengths_of
from kdcore.method.generators import generator_at
from kdcore.method.records import Row

WINDOW = 256
"""Sequences' worth of positions among which rows are chosen that fill a sequence."""

Pack = Sequence[tuple[int, Row]]
"""The rows of one sequence, with their indices."""


class PackedRows(Dataset[Pack]):
    """Rows packed into sequences. Each row is in one sequence, which is the same in every epoch.

    The rows are shuffled, and packed within windows of that order, so that rows of all lengths and
    from all places of the data come together.

    Args:
        rows: The rows.
        capacity: Maximum number of positions of a sequence, not less than those of a row.
        seed: Seed of the shuffle; None keeps the order of the rows.
    """

    def __init__(self, rows: Sequence[Row], capacity: int, seed: int | None) -> None:
        self._rows, count = rows, len(rows)
        order: NDArray[np.int64] = np.arange(count)
        if seed is not None:
            drawn = torch.randperm(count, generator=generator_at("cpu", seed, "packing"))
            order = drawn.numpy()
        packs = list(packed(lengths_of(rows)[order], capacity))
        self._ends = np.cumsum([0, *map(len, packs)])
        self._places = order[np.fromiter(chain.from_iterable(packs), np.int64, count)]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> Pack:
        at = range(len(self))[number]
        places = self._places[self._ends[at] : self._ends[at + 1]].tolist()
        return [(place, self._rows[place]) for place in places]


def packed(lengths: NDArray[np.int32], capacity: int) -> list[list[int]]:
    """Pack rows, within each window of their order, by best-fit decreasing.

    Args:
        lengths: [R] the number of positions of each row.
        capacity: Maximum number of positions of a sequence.

    Returns:
        The places of the rows of each sequence.
    """
    before = np.cumsum(lengths, dtype=np.int64) - lengths
    bounds = np.flatnonzero(np.diff(before // (WINDOW * capacity), prepend=-1)).tolist()
    found: list[list[int]] = []
    for start, end in zip(bounds, [*bounds[1:], len(lengths)], strict=True):
        found += ([start + each for each in p] for p in _fitted(lengths[start:end], capacity))
    return found


def _fitted(lengths: NDArray[np.int32], capacity: int) -> list[list[int]]:
    """The rows of a window: each, from the longest, in the fullest sequence with room for it."""
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set if a sequence has room for exactly r more positions
    sizes = lengths.tolist()
    for place in np.argsort(-lengths, kind="stable").tolist():
        enough = rooms >> sizes[place]
        if enough:
            room = sizes[place] + (enough & -enough).bit_length() - 1
            pack = with_room[room].pop()
            rooms ^= 0 if with_room[room] else 1 << room
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(place)
        left = room - sizes[place]
        with_room.setdefault(left, []).append(pack)
        rooms |= 1 << left
    return packs


@dataclass(frozen=True, slots=True)
class Packing:
    """Collates packed rows.

    Attributes:
        pad: Padding value of each input, see `kdcore.data.rows.collate`.
        flat: Whether all sequences of a batch are one after the other in a single one without
            padding, which flash attention needs in order to keep rows apart.
    """

    pad: Mapping[str, int]
    flat: bool = False

    def __call__(self, packs: Sequence[Pack]) -> dict[str, Tensor]:
        """Join the rows of each sequence, and pad the sequences to the longest of them.

        Args:
            packs: P sequences of together B rows.

        Returns:
            The inputs [P, L], among them ``position_ids``, which begin at 0 in each row, and
            without ``attention_mask``; ``labels`` [B, T], ``mask`` [B, T] and ``index`` [B] as
            `kdcore.data.rows.collate` gives them; ``starts`` [B], the index of each row's first
            position in the flattened inputs, and ``lengths`` [B].
        """
        rows = list(chain.from_iterable(packs))
        joined = [rows] if self.flat else packs
        names = [name for name in rows[0][1].inputs if name != "attention_mask"]
        inputs = {
            name: _joined(
                [[row.inputs[name] for _, row in pack] for pack in joined], self.pad[name]
            )
            for name in names
        }
        length = inputs["input_ids"].shape[1]
        sizes = [[len(row.labels) for _, row in pack] for pack in joined]
        # padding is a row of its own at the end: each position attends to something
        counted = [[*each, length - sum(each)] for each in sizes]
        inputs["position_ids"] = _joined([[*map(torch.arange, each)] for each in counted], 0)
        starts = [
            number * length + before
            for number, each in enumerate(sizes)
            for before in accumulate(each[:-1], initial=0)
        ]
        of_rows = {"starts": torch.tensor(starts), "lengths": torch.tensor([*chain(*sizes)])}
        return inputs | learned_of(rows) | of_rows


def _joined(packs: Sequence[Sequence[Tensor]], fill: int) -> Tensor:
    """Tensors [P, L] from the parts of each sequence."""
    return pad_sequence([torch.cat(list(p)) for p in packs], batch_first=True, padding_value=fill)
