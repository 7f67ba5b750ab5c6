"""The conformance suite of momentum policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdcore.testing.method.batches import DTYPES
from kdcore.testing.suite import STEPS, Suite, finite, same

SHAPES = ((3, 4), (5,), ())


class MomentumSuite(Suite):
    """The checks of a `MomentumPolicy`.

    Attributes:
        terms: The terms of the loss, including those that the component's params name.
    """

    kind = "momentum"
    terms: ClassVar[tuple[str, ...]] = ("task", "kd")

    def component(self) -> Any:
        """Build a new policy and read its streams, as a run does first."""
        policy = super().component()
        policy.streams(self.terms)
        return policy

    def test_streams_hold_each_term_once(self) -> None:
        """A term outside every stream is never trained, one in two streams is trained twice."""
        policy = self.component()
        assert isinstance(policy.owns_momentum, bool)
        streams = policy.streams(self.terms)
        held = [term for terms in streams.values() for term in terms]
        assert sorted(held) == sorted(self.terms), f"of the terms {self.terms}, streams {streams}"
        assert all(streams.values()), f"a stream without terms has no gradient: {streams}"

    def test_every_stream_reaches_the_update(self) -> None:
        """The gradient of a single stream changes every parameter."""
        streams = self.component().streams(self.terms)
        for alone in streams:
            policy = self.component()
            given = {
                stream: [torch.full(shape, float(stream == alone)) for shape in SHAPES]
                for stream in streams
            }
            for update in policy.combine(given, parameters()):
                assert update.all(), f"the gradient of stream '{alone}' is lost"

    def test_the_update_has_the_form_of_the_parameters(self) -> None:
        """One gradient for each parameter, of its shape and dtype, finite for no gradient too."""
        for dtype in DTYPES:
            for scale in (1.0, 0.0):
                policy = self.component()
                for step in range(STEPS):
                    weights = parameters(dtype)
                    given = scaled(self.gradients(policy, step, dtype), scale)
                    updates = policy.combine(given, weights)
                    assert len(updates) == len(weights), f"{len(updates)} for {len(weights)}"
                    for update, weight in zip(updates, weights, strict=True):
                        assert update.shape == weight.shape, f"{update.shape} for {weight.shape}"
                        assert update.dtype == weight.dtype, f"{update.dtype} for {weight.dtype}"
                        finite(update, f"step {step}, gradients times {scale}, {dtype}")

    def test_parameters_are_only_read(self) -> None:
        """Only the optimizer changes the parameters."""
        policy, weights = self.component(), parameters()
        for step in range(STEPS):
            policy.combine(self.gradients(policy, step), weights)
        for weight, untouched in zip(weights, parameters(), strict=True):
            same(weight, untouched, "combine changed a parameter")

    def test_what_comes_out_may_be_written_to(self) -> None:
        """The policy shares no memory with the update that it returns or the gradients it gets.

        Clipping scales the update in place, and the gradients' memory is reused; a shared buffer
        would change with them.
        """
        left_alone, written_to = self.component(), self.component()
        for step in range(STEPS):
            expected = left_alone.combine(self.gradients(left_alone, step), parameters())
            given = self.gradients(written_to, step)
            found = written_to.combine(given, parameters())
            for one, other in zip(expected, found, strict=True):
                same(one, other, f"a buffer of the policy shares memory with step {step - 1}")
            for tensor in [*found, *(tensor for tensors in given.values() for tensor in tensors)]:
                tensor.zero_()

    def agrees_with(
        self,
        reference: Callable[
            [Sequence[Mapping[str, Sequence[Tensor]]], Sequence[Tensor]], Sequence[Sequence[Tensor]]
        ],
    ) -> None:
        """Assert that the updates equal a formula's, for tests by the author.

        The formula gets every term by itself, so the assertion also checks that the streams join
        only terms that may be joined.

        Args:
            reference: The formula, from each step's {term: a gradient for each parameter} and the
                parameters, all in float64, to each step's updates.
        """
        policy = self.component()
        steps = [gradients(self.terms, step) for step in range(STEPS)]
        expected = reference(
            [{name: [t.double() for t in tensors] for name, tensors in s.items()} for s in steps],
            [weight.double() for weight in parameters()],
        )
        for step, exact in enumerate(expected):
            found = policy.combine(self.gradients(policy, step), parameters())
            for update, wanted in zip(found, exact, strict=True):
                torch.testing.assert_close(update.double(), wanted, rtol=1e-4, atol=1e-6)

    def gradients(
        self, policy: Any, step: int, dtype: torch.dtype = torch.float32
    ) -> dict[str, list[Tensor]]:
        """Return each stream's gradients at a step: the sums of its terms' gradients."""
        of_term = gradients(self.terms, step, dtype)
        return {
            stream: [
                torch.stack(same_parameter).sum(0)
                for same_parameter in zip(*(of_term[term] for term in terms), strict=True)
            ]
            for stream, terms in policy.streams(self.terms).items()
        }

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Compute the step's update."""
        updates = component.combine(self.gradients(component, step), parameters())
        return [update.clone() for update in updates]


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return parameters of several shapes, the same at each call."""
    random = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=random).to(dtype) for shape in SHAPES]


def gradients(
    terms: Sequence[str], step: int, dtype: torch.dtype = torch.float32
) -> dict[str, list[Tensor]]:
    """Return each term's gradients for the `parameters`, different at each step."""
    random = torch.Generator().manual_seed(100 + step)
    return {
        term: [torch.randn(shape, generator=random).to(dtype) for shape in SHAPES] for term in terms
    }


def scaled(given: Mapping[str, Sequence[Tensor]], scale: float) -> dict[str, list[Tensor]]:
    """Multiply gradients by a number."""
    return {stream: [scale * tensor for tensor in tensors] for stream, tensors in given.items()}
