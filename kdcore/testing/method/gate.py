"""The conformance suite of gates, plain and ranked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcore.method.protocols import RankedGate
from kdcore.method.records import LogitBatch
from kdcore.testing.method.batches import (
    DTYPES,
    chunks_of,
    example,
    excluding,
    extremes,
    laid_flat,
    padded,
    rows_of,
)
from kdcore.testing.suite import STEPS, Suite, alike, finite, same, same_global_random


class GateSuite(Suite):
    """The checks of a `Gate` and of a `RankedGate`.

    A plain gate is treated as a ranked one whose second pass returns its input. A gate that
    compares the positions of one row is called as if all positions were of one row.
    """

    kind = "gate"

    def test_weights_have_the_shape_of_the_positions(self) -> None:
        """One floating-point weight for each position, at any time of the training."""
        for dtype in DTYPES:
            for progress in (0.0, 0.5, 1.0):
                batch = example(progress=progress, dtype=dtype)
                first, second = passes(self.component(), progress)
                scores = first(batch)
                assert scores.shape == batch.mask.shape, f"gave {tuple(scores.shape)}, not [B, T]"
                weights = second(scores.flatten())
                assert weights.shape == scores.flatten().shape, "the second pass must keep [N]"
                assert weights.is_floating_point(), f"weights are {weights.dtype}"

    def test_weights_are_between_floor_and_one(self) -> None:
        """Otherwise the logged acceptance rate is not in [0, 1], and gates do not multiply.

        A weight may be below its floor only by rounding.
        """
        for dtype in DTYPES:
            cases = {"an ordinary batch": example(dtype=dtype), **extremes(dtype)}
            for case, batch in cases.items():
                gate = self.component()
                weights = weigh(gate, [batch])
                low = getattr(gate, "floor", 0.0)
                slack = torch.finfo(weights.dtype).eps
                outside = (weights < max(0.0, low - slack)) | (weights > 1)
                assert not outside.any(), f"{case}: {weights[outside][0]} is not in [{low}, 1]"

    def test_weights_are_detached(self) -> None:
        """The loss must not send a gradient through the weights, even with grad mode on."""
        first, second = passes(self.component())
        with torch.enable_grad():
            weights = second(first(example()).flatten())
        assert not weights.requires_grad, "gradient flows through the weights: detach them"

    def test_weights_are_finite_at_extreme_logits(self) -> None:
        """Masked positions count too: a NaN there would survive a product with zero."""
        for dtype in DTYPES:
            for case, batch in extremes(dtype).items():
                first, _ = passes(self.component())
                finite(first(batch), f"{case}, {dtype}")
                finite(weigh(self.component(), [batch]), f"{case}, {dtype}")

    def test_rows_do_not_see_each_other(self) -> None:
        """The weights of a batch equal the weights of its single rows, bit for bit."""
        together = weigh(self.component(), [example()])
        apart = weigh(self.component(), rows_of(example()))
        same(together, apart, "a row depends on the other rows")

    def test_positions_do_not_see_each_other(self) -> None:
        """The weights of all positions equal the weights of chunks, up to rounding.

        Random numbers must therefore be drawn in the order of positions: `torch.rand` and
        `torch.multinomial` do so, `torch.randn` does not.
        """
        together = weigh(self.component(), [laid_flat(example())])
        apart = weigh(self.component(), chunks_of(laid_flat(example())))
        alike(together, apart, "a position depends on the others in its chunk")

    def test_padding_changes_nothing(self) -> None:
        """A row keeps its weights when positions outside the mask are appended."""
        alone = weigh(self.component(), [example(rows=1)])
        longer = weigh(self.component(), [padded(example(rows=1))])
        same(alone, longer, "padding changes the weights")

    def test_the_ranking_ignores_order(self) -> None:
        """A permutation of distinct scores permutes the weights."""
        first, second = passes(self.component())
        scores = torch.tensor(sorted(set(first(example()).flatten().tolist())))
        order = torch.arange(len(scores) - 1, -1, -1)
        same(second(scores)[order], second(scores[order]), "weights depend on the scores' order")

    def test_the_ranking_works_on_one_score_and_on_none(self) -> None:
        """A micro-batch may have a single learned position, or none."""
        first, second = passes(self.component())
        scores = first(example()).flatten()
        for few in (1, 0):
            weights = second(scores[:few])
            assert weights.shape == (few,), f"{few} scores gave weights {tuple(weights.shape)}"

    def test_the_temperatures_are_positive_and_follow_the_positions(self) -> None:
        """A ranked gate may set the temperature of each position: any finite factor above 0."""
        gate = self.component()
        temperatures = getattr(gate, "temperatures", None)
        if temperatures is None:
            return
        first, second = passes(gate)
        for case, batch in {"an ordinary batch": example(), **extremes()}.items():
            scores = first(batch).detach().flatten()
            weights = second(scores)
            for count in (len(scores), 1, 0):
                factors = temperatures(scores[:count], weights[:count])
                assert factors.shape == (count,), f"{count} scores gave {tuple(factors.shape)}"
                finite(factors, f"the temperatures where {case}")
                assert (factors > 0).all(), f"{case}: a temperature is not above 0"
                assert not factors.requires_grad, "gradient flows through the temperatures"
        backwards = temperatures(scores.flip(0), weights.flip(0)).flip(0)
        same(temperatures(scores, weights), backwards, "temperatures depend on the scores' order")

    def test_randomness_comes_from_the_batch_alone(self) -> None:
        """The same seed gives the same weights, whatever the state of the global generators."""
        one = weigh(self.component(), [example()], global_seed=1)
        other = weigh(self.component(), [example()], global_seed=2)
        same(one, other, "the gate uses a generator other than batch.generator")

    def test_the_batch_is_left_alone(self) -> None:
        """It does not change the batch, which the next gate and the losses read."""
        batch, untouched = example(), example()
        weigh(self.component(), [batch])
        same(batch.student, untouched.student, "the gate changed the student's logits")
        same(batch.teacher, untouched.teacher, "the gate changed the teacher's logits")
        same(batch.mask, untouched.mask, "the gate changed the mask")
        assert batch.reference is not None and untouched.reference is not None
        same(batch.reference, untouched.reference, "the gate changed the reference's logits")

    def agrees_with(self, reference: Callable[[LogitBatch], Any]) -> None:
        """Assert that the weights equal a formula's, for tests by the author.

        Args:
            reference: The formula, from a batch in float64 to weights [B, T], as a tensor or array.
        """
        for batch in (example(positions=4), excluding(example(seed=1, positions=4))):
            exact = replace(
                batch,
                student=batch.student.detach().double(),
                teacher=batch.teacher.double(),
                reference=None if batch.reference is None else batch.reference.double(),
            )
            expected = torch.as_tensor(reference(exact)).double().flatten()
            torch.testing.assert_close(
                weigh(self.component(), [batch]).double(), expected, rtol=1e-4, atol=1e-5
            )

    def finish(self, component: Any, step: int) -> None:
        """End a step: a ranked gate may remember its scores."""
        super().finish(component, step)
        if hasattr(component, "remember"):
            first, _ = passes(component)
            component.remember(first(example(seed=step)).detach().flatten())

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Compute the weights of the step's batch."""
        return [weigh(component, [example(seed=step, progress=step / STEPS)])]


def passes(
    gate: Any, progress: float = 0.5
) -> tuple[Callable[[LogitBatch], Tensor], Callable[[Tensor], Tensor]]:
    """Return both passes of a gate: scores of positions, and weights from all scores.

    A gate gets the reference's logits only if it names a reference, as in a run.

    Args:
        gate: The gate.
        progress: Share of the training done, for the second pass.
    """
    ranked = isinstance(gate, RankedGate)
    judge = gate.score if ranked else gate
    asks = getattr(gate, "reference", None) is not None

    def first(batch: LogitBatch) -> Tensor:
        found: Tensor = judge(batch if asks else replace(batch, reference=None))
        return found

    def second(scores: Tensor) -> Tensor:
        found: Tensor = gate.weigh(scores, progress) if ranked else scores
        return found

    return first, second


def weigh(gate: Any, pieces: Sequence[LogitBatch], global_seed: int = 0) -> Tensor:
    """Compute the weights [N] of the masked positions of a batch in pieces, as a run does.

    All pieces share one generator, in order.
    """
    first, second = passes(gate, pieces[0].progress)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad(), same_global_random(global_seed):
        scores = [first(replace(piece, generator=generator))[piece.mask] for piece in pieces]
        return second(torch.cat(scores))
