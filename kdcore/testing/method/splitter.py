"""The conformance suite of knowledge splitters.

A splitter chooses the number of classes of its parts. Therefore most checks compare the weighted
divergence of each part, position by position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcore.errors import UserError
from kdcore.method.records import LOG_ZERO, LogitBatch, Part
from kdcore.testing.method.batches import (
    DTYPES,
    KEPT,
    chunks_of,
    example,
    excluding,
    extremes,
    kl_of,
    laid_flat,
    padded,
    rows_of,
    whole,
)
from kdcore.testing.suite import STEPS, Suite, alike, finite, same, same_global_random


class SplitterSuite(Suite):
    """The checks of a `KnowledgeSplitter`."""

    kind = "splitter"

    def test_parts_says_what_comes_out(self) -> None:
        """The spec's weights are checked against these names before anything is loaded."""
        splitter, batch = self.component(), example()
        once = splitter({"kd": whole(batch)}, batch)
        for given in ({"kd": whole(batch)}, {"kd": whole(batch), "other": whole(batch)}, once):
            names = tuple(given)
            if refuses(splitter, names):
                continue
            said, found = splitter.parts(names), tuple(splitter(given, batch))
            assert len(set(said)) == len(said), f"parts({names}) returns a name twice: {said}"
            assert sorted(found) == sorted(said), (
                f"parts({names}) returns {said}, but the splitter returns {found}"
            )

    def test_parts_have_the_shape_of_the_positions(self) -> None:
        """Student and teacher [B, T, K] have the same K, and the weight is [B, T]."""
        for dtype in DTYPES:
            for progress in (0.0, 0.5, 1.0):
                batch = example(progress=progress, dtype=dtype)
                for name, part in split(self.component(), batch).items():
                    shape = part.student.shape
                    assert shape == part.teacher.shape, f"'{name}': student and teacher differ"
                    assert shape[:-1] == batch.mask.shape, f"'{name}' is {tuple(shape)}"
                    assert part.weight.shape == batch.mask.shape, f"weight of '{name}' not [B, T]"
                    for tensor in (part.student, part.teacher, part.weight):
                        assert tensor.is_floating_point(), f"'{name}' holds {tensor.dtype}"

    def test_gradient_flows_to_the_student_alone(self) -> None:
        """Weights and teacher have no gradient; at least one part has one for the student."""
        batch = example()
        parts = split(self.component(), batch)
        for name, part in parts.items():
            assert not part.weight.requires_grad, f"gradient flows through the weight of '{name}'"
            assert not part.teacher.requires_grad, f"gradient flows to the teacher of '{name}'"
        (grad,) = torch.autograd.grad(total(parts), batch.student)
        assert grad.any(), "no part gives the student a gradient"

    def test_it_works_on_what_it_made_itself(self) -> None:
        """Splitters chain: each accepts parts of any width, or rejects their names in `parts`.

        It rejects them by a UserError, which stops a run before anything is loaded.
        """
        splitter, batch = self.component(), example()
        once = splitter({"kd": whole(batch)}, batch)
        twice = {} if refuses(splitter, tuple(once)) else splitter(once, batch)
        for name, part in twice.items():
            assert part.student.shape[:-1] == batch.mask.shape, f"'{name}' is not [B, T, K]"
            finite(kl_of(part), f"'{name}' of a splitter after itself")

    def test_excluded_classes_stay_excluded(self) -> None:
        """A class that an earlier splitter excluded has no value and no gradient in any part.

        Its exact logit does not matter. In a part it may be above `LOG_ZERO`, because the part's
        logits were divided by tau.
        """
        found = []
        for depth in (LOG_ZERO, 2 * LOG_ZERO):
            batch = excluding(example(), depth, depth)
            parts = split(self.component(), batch, tau=8)
            found.append(torch.stack([kl_of(part).detach() for _, part in sorted(parts.items())]))
            (grad,) = torch.autograd.grad(total(parts), batch.student)
            assert not grad[..., KEPT:].any(), "excluded classes receive a gradient"
        alike(found[0], found[1], "an excluded class changes the value of a part")

    def test_it_is_finite_at_extreme_logits(self) -> None:
        """Value and gradient are finite at any progress of the training."""
        for dtype in DTYPES:
            for progress in (0.0, 1.0):
                for case, batch in extremes(dtype).items():
                    parts = split(self.component(), replace(batch, progress=progress))
                    for name, part in parts.items():
                        for tensor in (part.student, part.teacher, part.weight, kl_of(part)):
                            finite(tensor, f"'{name}' where {case}, {dtype}")
                    (grad,) = torch.autograd.grad(total(parts), batch.student)
                    finite(grad, f"the gradient where {case}, {dtype}")

    def test_rows_do_not_see_each_other(self) -> None:
        """The parts of a batch equal the parts of its single rows, bit for bit."""
        together = cut(self.component(), [example()])
        apart = cut(self.component(), rows_of(example()))
        same_parts(together, apart, "a row depends on the other rows")

    def test_positions_do_not_see_each_other(self) -> None:
        """The parts of all positions equal the parts of chunks, up to rounding."""
        together = cut(self.component(), [laid_flat(example())])
        apart = cut(self.component(), chunks_of(laid_flat(example())))
        for name in together.keys() | apart.keys():
            alike(together[name], apart[name], f"'{name}' depends on the others in its chunk")

    def test_padding_changes_nothing(self) -> None:
        """A row keeps its parts when positions outside the mask are appended."""
        alone = cut(self.component(), [example(rows=1)])
        longer = cut(self.component(), [padded(example(rows=1))])
        same_parts(alone, longer, "padding changes the parts")

    def test_randomness_comes_from_the_batch_alone(self) -> None:
        """The same seed gives the same parts, whatever the state of the global generators."""
        one = cut(self.component(), [example()], global_seed=1)
        other = cut(self.component(), [example()], global_seed=2)
        same_parts(one, other, "the splitter uses a generator other than batch.generator")

    def test_the_batch_and_the_parts_are_left_alone(self) -> None:
        """It does not change its inputs, which gates, task loss and other splitters read."""
        batch, untouched = example(), example()
        part = whole(batch)
        parts = {"kd": part}
        self.component()(parts, batch)
        assert parts == {"kd": part}, "the splitter changed the mapping of parts"
        same(batch.student, untouched.student, "the splitter changed the student's logits")
        same(batch.teacher, untouched.teacher, "the splitter changed the teacher's logits")
        same(part.weight, whole(batch).weight, "the splitter changed the part's weight")

    def agrees_with(self, reference: Callable[[LogitBatch], Mapping[str, Tensor]]) -> None:
        """Assert that value and gradient equal a formula's, for tests by the author.

        Args:
            reference: The formula, from a batch in float64 to each part's weighted forward KL
                [B, T]; autograd must differentiate it at the batch's student logits.
        """
        for batch in (example(positions=4), excluding(example(seed=1, positions=4))):
            exact = replace(
                batch,
                student=batch.student.detach().double().requires_grad_(),
                teacher=batch.teacher.double(),
            )
            expected, found = reference(exact), split(self.component(), batch)
            assert sorted(found) == sorted(expected), f"the splitter returns {tuple(found)}"
            for name, part in found.items():
                value = kl_of(part)
                torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-5)
                (slope,) = torch.autograd.grad(
                    expected[name].sum(), exact.student, retain_graph=True
                )
                (grad,) = torch.autograd.grad(value.sum(), batch.student, retain_graph=True)
                torch.testing.assert_close(grad.double(), slope, rtol=1e-3, atol=1e-5)

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Compute the parts of the step's batch."""
        found = cut(component, [example(seed=step, progress=step / STEPS)])
        return [found[name] for name in sorted(found)]


def split(splitter: Any, batch: LogitBatch, tau: float = 1.0) -> dict[str, Part]:
    """Split a batch's undivided part, as the first splitter of a chain does."""
    parts: dict[str, Part] = splitter({"kd": whole(batch, tau)}, batch)
    return parts


def refuses(splitter: Any, names: tuple[str, ...]) -> bool:
    """Check whether the splitter rejects parts of these names."""
    try:
        splitter.parts(names)
    except UserError:
        return True
    return False


def total(parts: Mapping[str, Part]) -> Tensor:
    """Sum the losses of all parts."""
    return torch.stack([kl_of(part).sum() for part in parts.values()]).sum()


def cut(splitter: Any, pieces: Sequence[LogitBatch], global_seed: int = 0) -> dict[str, Tensor]:
    """Compute each part's loss [N] at the masked positions of a batch in pieces.

    All pieces share one generator, in order.
    """
    generator = torch.Generator().manual_seed(7)
    found: dict[str, list[Tensor]] = {}
    with same_global_random(global_seed):
        for piece in pieces:
            for name, part in split(splitter, replace(piece, generator=generator)).items():
                found.setdefault(name, []).append(kl_of(part).detach()[piece.mask])
    return {name: torch.cat(losses) for name, losses in found.items()}


def same_parts(left: Mapping[str, Tensor], right: Mapping[str, Tensor], otherwise: str) -> None:
    """Assert that two sets of parts have the same names and, bit for bit, the same losses."""
    assert left.keys() == right.keys(), f"{otherwise}: {tuple(left)}, {tuple(right)}"
    for name in left:
        same(left[name], right[name], f"'{name}': {otherwise}")
