"""A drafter's rows: from every committed position on, the D tokens that it is to propose."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def at_anchors(
    padded: Mapping[str, Tensor], depth: int, vocabulary: Tensor | None
) -> dict[str, Tensor]:
    """What `kdcore.data.rows.collate` gave, with anchors for rows.

    padded: its labels and mask [B, T]. depth: D. vocabulary: [V'] int64, the tokens that the
        drafter can propose, or None for all.
    Anchor r of a sequence is row ``b * T + r``, whose position i - 1 (level i) predicts the token
    at r + 1 + i. Returns the same inputs and index, with labels [B * T, D], which count within the
    vocabulary and are -1 for a token outside, and mask [B * T, D], the learned tokens.
    """
    labels, mask = (_following(padded[name], depth) for name in ("labels", "mask"))
    if vocabulary is not None:
        place = torch.searchsorted(vocabulary, labels).clamp(max=len(vocabulary) - 1)
        labels = torch.where(vocabulary[place] == labels, place, -1)
    return {**padded, "labels": labels, "mask": mask}


def known(padded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The anchors without the positions whose token the drafter cannot propose."""
    return {**padded, "mask": padded["mask"] & (padded["labels"] >= 0)}


def _following(each: Tensor, depth: int) -> Tensor:
    """[B * T, D] the entries 1 to D places further on, 0 beyond the end, of [B, T]."""
    shifted = F.pad(each, (0, depth))[:, 1:]
    return shifted.unfold(1, depth, 1).flatten(0, 1).contiguous()
