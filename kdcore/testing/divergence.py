"""What a divergence must hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdcore.method.records import LOG_ZERO, LogitBatch
from kdcore.testing.batches import (
    DTYPES,
    KEPT,
    chunks_of,
    example,
    excluding,
    extremes,
    laid_flat,
    rows_of,
)
from kdcore.testing.suite import Suite, alike, finite, same


class DivergenceSuite(Suite):
    """The checks of a `Divergence`.

    ``tolerance``: how far from 0 a divergence of equal distributions may be in float32.
    """

    kind = "divergence"
    tolerance: ClassVar[float] = 1e-5

    def test_it_gives_one_number_for_each_position(self) -> None:
        """Nothing is reduced over rows or positions: a gate weighs each position."""
        for dtype in DTYPES:
            batch = example(dtype=dtype)
            found = measure(self.component(), batch)
            assert found.shape == batch.mask.shape, f"gave {tuple(found.shape)}, not [B, T]"
            assert found.is_floating_point(), f"gave {found.dtype}"

    def test_it_is_zero_at_equality_and_never_negative(self) -> None:
        """That is what makes it a divergence."""
        batch = example()
        found = measure(self.component(), batch)
        assert (found >= -self.tolerance).all(), f"negative: {found.min()}"
        logp = batch.teacher.log_softmax(-1)
        found = self.component()(logp, logp.clone())
        assert (found.abs() <= self.tolerance).all(), f"not 0 at equality: {found.abs().max()}"

    def test_gradient_reaches_the_student(self) -> None:
        """At every position. The teacher needs no care: it arrives detached."""
        batch = example()
        (grad,) = torch.autograd.grad(measure(self.component(), batch).sum(), batch.student)
        assert grad.any(-1).all(), "the student receives no gradient at some position"

    def test_rows_do_not_see_each_other(self) -> None:
        """A batch gives what its rows give one at a time, bit for bit."""
        together = measure(self.component(), example())
        apart = torch.cat([measure(self.component(), row) for row in rows_of(example())])
        same(together, apart, "a row depends on the other rows")

    def test_positions_do_not_see_each_other(self) -> None:
        """Positions laid flat give what chunks of them give, wherever memory demands a cut."""
        flat = laid_flat(example())
        together = measure(self.component(), flat)
        apart = torch.cat([measure(self.component(), chunk) for chunk in chunks_of(flat)], 1)
        alike(together, apart, "a position depends on its neighbours")

    def test_excluded_classes_contribute_nothing(self) -> None:
        """Around `LOG_ZERO` the exact value says nothing, and no gradient comes back.

        A mask puts excluded classes there; tau and the normaliser then move them up or down, so
        what marks them is that their probability is exactly 0, not a comparison with `LOG_ZERO`.
        """
        values = []
        for student, teacher in ((LOG_ZERO, LOG_ZERO / 8), (LOG_ZERO / 8, 2 * LOG_ZERO)):
            batch = excluding(example(), 2 * LOG_ZERO, 2 * LOG_ZERO)
            logp = batch.student.detach().log_softmax(-1)
            logp[..., KEPT:] = student
            against = batch.teacher.log_softmax(-1)
            against[..., KEPT:] = teacher
            found = self.component()(logp.requires_grad_(), against)
            found.sum().backward()
            values.append(found.detach())
            assert logp.grad is not None
            assert not logp.grad[..., KEPT:].any(), "gradient comes back from excluded classes"
        same(values[0], values[1], "the value depends on where near LOG_ZERO a class lies")
        narrow = self.component()(logp[..., :KEPT].detach(), against[..., :KEPT])
        torch.testing.assert_close(values[0], narrow, rtol=1e-5, atol=1e-6)

    def test_it_is_finite_at_extreme_logits(self) -> None:
        """In value and in gradient: one NaN ends a training run."""
        for dtype in DTYPES:
            for case, batch in extremes(dtype).items():
                found = measure(self.component(), batch)
                finite(found, f"the value where {case}, {dtype}")
                found.sum().backward()  # type: ignore[no-untyped-call]
                assert batch.student.grad is not None
                finite(batch.student.grad, f"the gradient where {case}, {dtype}")

    def test_the_inputs_are_left_alone(self) -> None:
        """The next term reads the same log-probs."""
        batch = example()
        student, teacher = (x.detach().log_softmax(-1) for x in (batch.student, batch.teacher))
        copies = student.clone(), teacher.clone()
        self.component()(student, teacher)
        same(student, copies[0], "it wrote into the student's log-probs")
        same(teacher, copies[1], "it wrote into the teacher's log-probs")

    def agrees_with(self, reference: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Assert that value and gradient are the formula's. For a test of the author's own.

        reference: from student and teacher log-probs [B, T, K] in float64 to [B, T], and
        differentiable by autograd in the student's. Gradients are compared at the logits.
        """
        for batch in (example(positions=4), excluding(example(seed=1, positions=4))):
            logits = batch.student.detach().double().requires_grad_()
            expected = reference(logits.log_softmax(-1), batch.teacher.double().log_softmax(-1))
            found = measure(self.component(), batch)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
            (slope,) = torch.autograd.grad(expected.sum(), logits)
            (grad,) = torch.autograd.grad(found.sum(), batch.student)
            torch.testing.assert_close(grad.double(), slope, rtol=1e-3, atol=1e-5)

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """The divergence of a batch of that step."""
        return [measure(component, example(seed=step))]


def measure(divergence: Any, batch: LogitBatch) -> Tensor:
    """The divergence [B, T] of a batch's logits, with gradient at the student's."""
    found: Tensor = divergence(batch.student.log_softmax(-1), batch.teacher.log_softmax(-1))
    return found
