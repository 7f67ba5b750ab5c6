"""Attention maps of student and teacher, computed from queries and keys a chunk at a time.

A map [heads, L] of a query is its score for each of the L keys. All maps of a batch together have
the size of its attention matrices. So a forward pass keeps the queries and keys of the layers that
are compared, which its own attention keeps too, and the maps of a chunk exist while their distance
and its gradient are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdcore.errors import UserError
from kdcore.method.records import LOG_ZERO


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Queries and keys of one layer, of P sequences of L positions.

    Attributes:
        query: [P, heads, L, W] queries, part of the body's graph.
        key: [P, key heads, L, W] keys, likewise; each is shared by heads / key heads queries.
        mask: [P or 1, 1, L, L] the keys that each query sees, bool or additive; None for all keys.
        causal: Whether, without a mask, a query sees no key after it.
        scaling: Factor of the products.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    scaling: float

    def seen(self, sequence: int, places: Tensor) -> Tensor:
        """[C, L] bool, the keys that queries of a sequence see."""
        if self.mask is not None:
            mask = self.mask[min(sequence, len(self.mask) - 1), 0, places]
            return mask if mask.dtype == torch.bool else mask > LOG_ZERO
        keys = torch.arange(self.key.shape[2], device=places.device)
        return keys <= places[:, None] if self.causal else keys.expand(len(places), -1) >= 0

    def scores(self, sequence: int, places: Tensor) -> Tensor:
        """[C, heads, L] float32, the products of queries of a sequence with all of its keys."""
        query, key = self.query[sequence][:, places], self.key[sequence]
        heads, count, width = query.shape
        products = query.reshape(len(key), -1, width) @ key.mT
        return self.scaling * products.view(heads, count, -1).transpose(0, 1).float()


@dataclass(frozen=True, slots=True)
class Queries:
    """The M queries whose maps are compared, sequence after sequence.

    Attributes:
        counts: Number of queries of each of the P sequences.
        places: [M] int64, the index of each in its sequence.
        rows: [N] int64, the sequence of each learned position, whose distance is the mean over all
            queries of the sequence; None where the learned positions are the queries.
    """

    counts: tuple[int, ...]
    places: Tensor
    rows: Tensor | None = None

    def pieces(self, length: int) -> Iterator[tuple[int, Tensor]]:
        """Cut into the places of at most ``length`` queries of one sequence, after its number."""
        own = torch.split(self.places, list(self.counts))
        for sequence, places in enumerate(own):
            for piece in torch.split(places, length) if len(places) else ():
                yield sequence, piece

    def at_learned_positions(self, distances: Tensor) -> Tensor:
        """[N] from the distances [M] of the queries."""
        if self.rows is None:
            return distances
        means = [each.mean() for each in torch.split(distances, list(self.counts))]
        return torch.stack(means)[self.rows]


@dataclass(frozen=True, slots=True)
class AttentionMaps:
    """The attention of some layers of a forward pass.

    Attributes:
        layers: Number of a layer, from 1 -> its attention.
        queries: The queries whose maps are compared.
    """

    layers: Mapping[int, LayerAttention]
    queries: Queries


def map_distances(
    matcher: Any, student: AttentionMaps, teacher: AttentionMaps, length: int
) -> Tensor:
    """Compare the maps of two models with a matcher.

    Args:
        matcher: A `kdcore.method.protocols.Matcher` of attention.
        student: The student's attention.
        teacher: The teacher's attention over the same sequences.
        length: Number of queries whose maps exist at a time.

    Returns:
        [N] the distance at each learned position, with gradient.

    Raises:
        UserError: The sequences of the two models have different lengths.
    """
    pairs = [(student.layers[i], teacher.layers[j]) for i, j in matcher.pairs]

    def of_piece(sequence: int, places: Tensor) -> Tensor:
        ours, theirs = zip(*(_maps(*pair, sequence, places) for pair in pairs), strict=True)
        found: Tensor = matcher(ours, theirs)
        return found

    found = [student.queries.places.new_zeros(0, dtype=torch.float32)]
    for piece in student.queries.pieces(length):
        # the backward pass computes the maps of a piece again, instead of keeping those of all
        how: Any = {"use_reentrant": False, "preserve_rng_state": False}
        found.append(checkpoint(of_piece, *piece, **how))
    return student.queries.at_learned_positions(torch.cat(found))


def _maps(
    student: LayerAttention, teacher: LayerAttention, sequence: int, places: Tensor
) -> tuple[Tensor, Tensor]:
    """Maps [C, heads, L] of both, with `LOG_ZERO` for a key that one of them does not see."""
    ours = student.scores(sequence, places)
    there = places.to(teacher.key.device)
    if student.key.shape[2] != teacher.key.shape[2]:
        raise UserError(
            f"the attention of the student has {student.key.shape[2]} keys, and that of the "
            f"teacher {teacher.key.shape[2]}",
            "choose models that cut their inputs into the same positions, or remove the matcher",
            "method.matchers",
        )
    with torch.no_grad():
        theirs = teacher.scores(sequence, there).to(ours.device)
        seen = student.seen(sequence, places) & teacher.seen(sequence, there).to(ours.device)
    hidden = ~seen[:, None]
    return ours.masked_fill(hidden, LOG_ZERO), theirs.masked_fill(hidden, LOG_ZERO)
