"""Training rows of a drafter: at each committed position, the next D tokens to propose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def at_anchors(
    padded: Mapping[str, Tensor], depth: int, vocabulary: Tensor | None
) -> dict[str, Tensor]:
    """Replace the rows of a padded batch by its anchors.

    Anchor r of sequence b is row ``b * T + r``; its position i - 1 (level i) predicts the token at
    r + 1 + i.

    Args:
        padded: A batch from `kdcore.data.rows.collate`, with labels and mask [B, T].
        depth: Number of levels D.
        vocabulary: [V'] int64, ascending, the tokens that the drafter can propose; None for all.

    Returns:
        The same inputs and index, with labels [B * T, D] (indices into the vocabulary, -1 for a
        token outside it) and mask [B * T, D] (the learned tokens).
    """
    labels, mask = (_following(padded[name], depth) for name in ("labels", "mask"))
    if vocabulary is not None:
        place = torch.searchsorted(vocabulary, labels).clamp(max=len(vocabulary) - 1)
        labels = torch.where(vocabulary[place] == labels, place, -1)
    return {**padded, "labels": labels, "mask": mask}


@dataclass(frozen=True, slots=True)
class AnchorCollation:
    """Collates rows as the anchors that a drafter learns from.

    Attributes:
        collate: Makes a batch of rows, see `kdcore.data.rows.collate`.
        depth: Number of levels D.
        vocabulary: See `at_anchors`.
    """

    collate: Callable[[Sequence[Any]], dict[str, Tensor]]
    depth: int
    vocabulary: Tensor | None

    def __call__(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return the batch of rows, with the labels and the mask of their anchors."""
        return known(at_anchors(self.collate(rows), self.depth, self.vocabulary))


def known(padded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mask out the positions whose token the drafter cannot propose.

    Args:
        padded: A batch from `at_anchors`.

    Returns:
        The same batch with a smaller mask.
    """
    return {**padded, "mask": padded["mask"] & (padded["labels"] >= 0)}


def _following(each: Tensor, depth: int) -> Tensor:
    """[B * T, D] the next D entries after each position of [B, T]; 0 beyond the end."""
    shifted = F.pad(each, (0, depth))[:, 1:]
    return shifted.unfold(1, depth, 1).flatten(0, 1).contiguous()
