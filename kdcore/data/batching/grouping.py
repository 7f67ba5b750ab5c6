"""Length grouping: rows of similar lengths in a batch, so that little of it is padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from kdcore.method.generators import generator_at

WINDOW = 50
"""Maximum number of groups among whose rows those of similar lengths come together."""


class LengthGroups(Sampler[int]):
    """An order of rows in which successive ones have similar lengths; another one in each epoch.

    The rows are shuffled, sorted by length within windows of that order, and cut into groups. The
    groups come in random order, the one with the longest row first, which needs the most memory.
    The order depends on the seed and the epoch alone, so a resumed run has the same.

    Args:
        lengths: [R] the number of positions of each row.
        group: Number of rows of a group: those of a batch, in all processes.
        seed: Seed of the shuffles.
    """

    def __init__(self, lengths: NDArray[np.int32], group: int, seed: int) -> None:
        self._lengths, self._group, self._seed, self._epoch = lengths, group, seed, 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = generator_at("cpu", self._seed, self._epoch, "length groups")
        order = torch.randperm(len(self), generator=generator).numpy()
        # at least four windows: a single one would give the same groups in each epoch
        size = self._group * max(1, min(WINDOW, len(order) // self._group // 4))
        windows = [order[start : start + size] for start in range(0, len(order), size)]
        alike = [window[np.argsort(-self._lengths[window], kind="stable")] for window in windows]
        ordered = np.concatenate(alike)
        whole = len(ordered) // self._group  # rows of an incomplete group stay last
        groups = ordered[: whole * self._group].reshape(whole, self._group)
        shuffled = torch.randperm(whole, generator=generator).numpy()
        if whole:
            longest = int(self._lengths[groups[shuffled, 0]].argmax())
            shuffled[[0, longest]] = shuffled[[longest, 0]]
        yield from groups[shuffled].flatten().tolist()
        yield from ordered[whole * self._group :].tolist()


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell the sampler of a loader its epoch, through all that accelerate wraps it in.

    accelerate reaches through two wrappers only: the third one of a resumed training in several
    processes would keep the order of the first epoch.

    Args:
        loader: A DataLoader.
        epoch: Number of the epoch, from 0.
    """
    inside = loader
    while (inside := getattr(inside, "batch_sampler", None)) is not None:
        sampler: Any = getattr(inside, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
