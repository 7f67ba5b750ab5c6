"""The conformance suite of divergences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdcore.method.records import LOG_ZERO, LogitBatch
from kdcore.testing.method.batches import (
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

    Attributes:
        tolerance: Maximum of a divergence of equal distributions in float32.
    """

    kind = "divergence"
    tolerance: ClassVar[float] = 1e-5

    def test_it_gives_one_number_for_each_position(self) -> None:
        """It does not reduce over rows or positions, because a gate weights each position."""
        for dtype in DTYPES:
            batch = example(dtype=dtype)
            found = measure(self.component(), batch)
            assert found.shape == batch.mask.shape, f"gave {tuple(found.shape)}, not [B, T]"
            assert found.is_floating_point(), f"gave {found.dtype}"

    def test_it_is_zero_at_equality_and_never_negative(self) -> None:
        """These two properties define a divergence."""
        batch = example()
        found = measure(self.component(), batch)
        assert (found >= -self.tolerance).all(), f"negative: {found.min()}"
        logp = batch.teacher.log_softmax(-1)
        found = self.component()(logp, logp.clone())
        assert (found.abs() <= self.tolerance).all(), f"not 0 at equality: {found.abs().max()}"

    def test_gradient_reaches_the_student(self) -> None:
        """Every position gives the student a gradient; the teacher arrives detached."""
        batch = example()
        (grad,) = torch.autograd.grad(measure(self.component(), batch).sum(), batch.student)
        assert grad.any(-1).all(), "the student receives no gradient at some position"

    def test_rows_do_not_see_each_other(self) -> None:
        """The result of a batch equals the results of its single rows, bit for bit."""
        together = measure(self.component(), example())
        apart = torch.cat([measure(self.component(), row) for row in rows_of(example())])
        same(together, apart, "a row depends on the other rows")

    def test_positions_do_not_see_each_other(self) -> None:
        """The result of all positions equals the results of chunks, up to rounding."""
        flat = laid_flat(example())
        together = measure(self.component(), flat)
        apart = torch.cat([measure(self.component(), chunk) for chunk in chunks_of(flat)], 1)
        alike(together, apart, "a position depends on its neighbours")

    def test_excluded_classes_contribute_nothing(self) -> None:
        """A class near `LOG_ZERO` adds neither value nor gradient.

        A mask sets excluded classes to `LOG_ZERO`; tau and the normaliser then move them up or
        down. A divergence recognises them by their probability of exactly 0, not by `LOG_ZERO`.
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
            assert not logp.grad[..., KEPT:].any(), "excluded classes receive a gradient"
        same(values[0], values[1], "the value depends on the exact logit of an excluded class")
        narrow = self.component()(logp[..., :KEPT].detach(), against[..., :KEPT])
        torch.testing.assert_close(values[0], narrow, rtol=1e-5, atol=1e-6)

    def test_it_is_finite_at_extreme_logits(self) -> None:
        """Value and gradient are finite: a single NaN ends a training run."""
        for dtype in DTYPES:
            for case, batch in extremes(dtype).items():
                found = measure(self.component(), batch)
                finite(found, f"the value where {case}, {dtype}")
                found.sum().backward()  # type: ignore[no-untyped-call]
                assert batch.student.grad is not None
                finite(batch.student.grad, f"the gradient where {case}, {dtype}")

    def test_the_inputs_are_left_alone(self) -> None:
        """It does not change the log-probs, which the next term reads."""
        batch = example()
        student, teacher = (x.detach().log_softmax(-1) for x in (batch.student, batch.teacher))
        copies = student.clone(), teacher.clone()
        self.component()(student, teacher)
        same(student, copies[0], "the divergence changed the student's log-probs")
        same(teacher, copies[1], "the divergence changed the teacher's log-probs")

    def agrees_with(self, reference: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Assert that value and gradient equal a formula's, for tests by the author.

        Gradients are compared at the logits.

        Args:
            reference: The formula, from student and teacher log-probs [B, T, K] in float64 to
                [B, T]; autograd must differentiate it in the student's.
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
        """Compute the divergence of the step's batch."""
        return [measure(component, example(seed=step))]


def measure(divergence: Any, batch: LogitBatch) -> Tensor:
    """Compute the divergence [B, T] of a batch's logits, with gradient at the student's."""
    found: Tensor = divergence(batch.student.log_softmax(-1), batch.teacher.log_softmax(-1))
    return found
