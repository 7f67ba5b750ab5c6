"""Hidden states and attention maps of two models, compared by matchers.

A map [heads, L] of a query is its score for each of the L keys. All maps of a batch together have
the size of its attention matrices. So a forward pass keeps the queries and keys of the layers that
are compared, which its own attention keeps too, and the maps of a chunk exist while their distance
and its gradient are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kdcore.errors import UserError
from kdcore.method.known_gradients import known
from kdcore.method.protocols import Matcher
from kdcore.method.records import LOG_ZERO, of_shape


def reads_attention(matcher: Any) -> bool:
    """Whether a `kdcore.method.protocols.Matcher` compares attention, not hidden states."""
    return bool(getattr(matcher, "attention", False))


def reads_values(matcher: Any) -> bool:
    """Whether a matcher that compares attention compares the maps of the values."""
    return bool(getattr(matcher, "values", False))


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Queries and keys of one layer, of P sequences of L positions.

    Attributes:
        query: [P, heads, L, W] queries, part of the body's graph.
        key: [P, key heads, L, W] keys, likewise; each is shared by heads / key heads queries.
        mask: [P or 1, 1, L, L] the keys that each query sees, bool or additive; None for all keys.
        causal: Whether, without a mask, a query sees no key after it.
        scaling: Factor of the products.
        value: [P, key heads, L, W'] values, part of the body's graph; None where nobody needs them.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    scaling: float
    value: Tensor | None = None

    @property
    def of_values(self) -> LayerAttention:
        """The layer with its values in place of queries and keys: MiniLM's value relations."""
        assert self.value is not None  # the tap of a model keeps them
        width = self.value.shape[-1]
        return replace(self, query=self.value, key=self.value, scaling=width**-0.5)

    def leaves(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Queries [heads, L, W] and keys [key heads, L, W] of a sequence, without their graph."""
        query, key = self.query[sequence], self.key[sequence]
        return query.detach().requires_grad_(), key.detach().requires_grad_()

    def scores(self, query: Tensor, key: Tensor, places: Tensor) -> Tensor:
        """[C, heads, L] float32, the products of some queries of a sequence with all its keys."""
        heads, _, width = query.shape
        products = query[:, places].reshape(len(key), -1, width) @ key.mT
        return self.scaling * products.view(heads, len(places), -1).transpose(0, 1).float()

    def seen(self, sequence: int, places: Tensor) -> Tensor:
        """[C, L] bool, the keys that queries of a sequence see."""
        if self.mask is not None:
            mask = self.mask[min(sequence, len(self.mask) - 1), 0, places]
            return mask if mask.dtype == torch.bool else mask > LOG_ZERO
        keys = torch.arange(self.key.shape[2], device=places.device)
        return keys <= places[:, None] if self.causal else keys.expand(len(places), -1) >= 0


@dataclass(frozen=True, slots=True)
class Queries:
    """The M positions that are compared, sequence after sequence: the queries of their maps.

    Attributes:
        counts: Number of positions of each of the P sequences.
        places: [M] int64, the index of each in its sequence.
        rows: [N] int64, the sequence of each learned position, whose distance is the mean over all
            positions of the sequence; None where the learned positions are those compared.
    """

    counts: tuple[int, ...]
    places: Tensor
    rows: Tensor | None = None

    def shares(self, weights: Tensor) -> tuple[Tensor, ...]:
        """Spread the weights of the learned positions over those that are compared.

        Args:
            weights: [N] the weights of the learned positions in a sum of distances.

        Returns:
            The weights [C] of the positions of each sequence in the same sum.
        """
        if self.rows is None:
            return torch.split(weights, list(self.counts))
        sums = weights.new_zeros(len(self.counts)).index_add(0, self.rows, weights)
        parts = zip(sums, self.counts, strict=True)
        return tuple((each / count).expand(count) for each, count in parts)

    def pieces(self, length: int, weights: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Cut the queries into pieces of one sequence.

        Args:
            length: Number of queries of a piece at most.
            weights: [N] the weights of the learned positions in a sum of distances.

        Yields:
            The number of the sequence, the places [C] of the queries, and their weights [C] in the
            same sum.
        """
        own = torch.split(self.places, list(self.counts))
        for sequence, (places, share) in enumerate(zip(own, self.shares(weights), strict=True)):
            for start in range(0, len(places), length):
                part = slice(start, start + length)
                yield sequence, places[part], share[part]


@dataclass(frozen=True, slots=True)
class PassLayers:
    """Some layers of a forward pass, see `kdcore.method.logits.ComparedLayers`.

    Attributes:
        states: Number of a hidden state -> [M, H], part of the body's graph.
        queries: The M positions of these states, which are the queries of the maps.
        attention: Number of a layer, from 1 -> its attention.
    """

    states: Mapping[int, Tensor]
    queries: Queries
    attention: Mapping[int, LayerAttention] = field(default_factory=dict)

    def at(self, place: Tensor) -> PassLayers:
        """The hidden states of other positions; attention has no counterpart there.

        Args:
            place: [N] int64, the index among the M positions of each.
        """
        states = {number: each[place] for number, each in self.states.items()}
        return PassLayers(states, self.queries)

    def distance(
        self, matcher: Matcher, teacher: PassLayers, weights: Tensor, length: int
    ) -> Tensor:
        """Compare these layers of the student with the teacher's.

        Args:
            matcher: What compares them.
            teacher: The teacher's layers over the same rows.
            weights: [N] the weights of the learned positions.
            length: Number of queries whose maps exist at a time.

        Returns:
            The weighted sum of the distances, with a graph to the body and the matcher's weights.

        Raises:
            UserError: The two models have other numbers of positions, or the matcher does not
                return a distance for each.
        """
        if reads_attention(matcher):
            return self._of_maps(matcher, teacher, weights, length)
        ours = [self.states[i] for i, _ in matcher.pairs]
        theirs = [teacher.states[j].detach().to(weights.device) for _, j in matcher.pairs]
        refuse_other_positions("hidden states", len(ours[0]), len(theirs[0]))
        shares = torch.cat(self.queries.shares(weights))
        return (shares * _distances(matcher, ours, theirs, shares).to(weights.dtype)).sum()

    def _of_maps(self, matcher: Any, teacher: PassLayers, weights: Tensor, length: int) -> Tensor:
        """The distance of maps, a chunk of queries at a time: its gradients are known already."""
        layers = {i: _compared(matcher, self.attention[i]) for i, _ in matcher.pairs}
        read = [each for layer in layers.values() for each in (layer.query, layer.key)]
        learned = [each for each in matcher.parameters() if each.requires_grad]
        of_read, of_learned = ([torch.zeros_like(t) for t in each] for each in (read, learned))
        total = weights.new_zeros(())
        for sequence, places, share in self.queries.pieces(length, weights):
            leaves = {i: layer.leaves(sequence) for i, layer in layers.items()}
            with torch.enable_grad():
                maps = (
                    _maps(
                        layers[i],
                        leaves[i],
                        _compared(matcher, teacher.attention[j]),
                        sequence,
                        places,
                    )
                    for i, j in matcher.pairs
                )
                ours, theirs = zip(*maps, strict=True)
                loss = (share * _distances(matcher, ours, theirs, share)).sum()
            inputs = [*chain(*leaves.values()), *learned]
            found = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
            here = [each[sequence] for each in of_read]
            for whole, part in zip([*here, *of_learned], found, strict=True):
                whole += part
            total += loss.detach()
        return known(total, [*of_read, *of_learned], [*read, *learned])


def _distances(
    matcher: Matcher, student: Sequence[Tensor], teacher: Sequence[Tensor], like: Tensor
) -> Tensor:
    return of_shape(
        matcher(student, teacher), like.shape, f"the matcher {type(matcher).__name__}", "distances"
    )


def refuse_other_positions(what: str, student: int, teacher: int) -> None:
    """Check that two models have as many positions.

    Args:
        what: What the message counts.
        student: The student's number.
        teacher: The teacher's number.

    Raises:
        UserError: They differ, as for image models with patches of other sizes.
    """
    if student != teacher:
        raise UserError(
            f"a matcher compares {student} {what} of the student with {teacher} of the teacher",
            "choose models that cut their inputs into the same positions, or remove the matcher",
            "method.matchers",
        )


def _compared(matcher: Any, layer: LayerAttention) -> LayerAttention:
    return layer.of_values if reads_values(matcher) else layer


def _maps(
    student: LayerAttention,
    leaves: tuple[Tensor, Tensor],
    teacher: LayerAttention,
    sequence: int,
    places: Tensor,
) -> tuple[Tensor, Tensor]:
    """Maps [C, heads, L] of both, with `LOG_ZERO` for a key that one of them does not see."""
    refuse_other_positions("keys", student.key.shape[2], teacher.key.shape[2])
    ours, there = student.scores(*leaves, places), places.to(teacher.key.device)
    with torch.no_grad():
        theirs = teacher.scores(teacher.query[sequence], teacher.key[sequence], there)
        seen = student.seen(sequence, places) & teacher.seen(sequence, there).to(places.device)
    hidden = ~seen[:, None]
    return ours.masked_fill(hidden, LOG_ZERO), theirs.to(ours).masked_fill(hidden, LOG_ZERO)
