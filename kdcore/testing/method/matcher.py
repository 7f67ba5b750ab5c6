"""The conformance suite of matchers of hidden states and of attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.method.records import LOG_ZERO, StateSizes
from kdcore.models.matching.layers import reads_attention
from kdcore.testing.suite import Suite, alike, finite, same, same_global_random

STUDENT, TEACHER = StateSizes(4, 16, 2, 2), StateSizes(8, 24, 2, 2)
POSITIONS = 32
KEYS = 12


class MatcherSuite(Suite):
    """The checks of a `Matcher`.

    Attributes:
        student: The sizes of the student that the matcher is bound to.
        teacher: The sizes of the teacher.
    """

    kind = "matcher"
    student: StateSizes = STUDENT
    teacher: StateSizes = TEACHER

    def component(self) -> Any:
        """Build a new component, and bind it."""
        matcher = super().component()
        with same_global_random():
            matcher.bind(self.student, self.teacher)
        return matcher

    def test_the_pairs_are_hidden_states_or_layers_of_both(self) -> None:
        """A run reads only these.

        Hidden state 0 is the embedding, L the output of the final norm; layers begin with 1.
        """
        matcher = self.component()
        first, what = (1, "layer") if reads_attention(matcher) else (0, "hidden state")
        assert matcher.pairs, "there is nothing to compare"
        for ours, theirs in matcher.pairs:
            assert first <= ours <= self.student.layers, f"the student has no {what} {ours}"
            assert first <= theirs <= self.teacher.layers, f"the teacher has no {what} {theirs}"

    def test_it_gives_one_number_for_each_position(self) -> None:
        """It does not reduce over positions, because a gate weights each of them."""
        for size in (1e-3, 1.0, 1e3):
            matcher = self.component()
            found = self.measured(matcher, *self.given(matcher, size=size))
            assert found.shape == (POSITIONS,), f"gave {tuple(found.shape)}, not [N]"
            assert found.is_floating_point() and (found > -1e-6).all(), "a distance is negative"
            finite(found, f"values of size {size}")

    def test_gradient_reaches_the_student_and_the_weights(self) -> None:
        """Each of the student's hidden states in a pair and each weight gets one."""
        matcher = self.component()
        ours, theirs = self.given(matcher)
        read = [ours[number] for number in {ours for ours, _ in matcher.pairs}]
        total = self.measured(matcher, ours, theirs).sum()
        grads = torch.autograd.grad(total, [*read, *matcher.parameters()], allow_unused=True)
        for grad in grads:
            assert grad is not None and grad.any(), "a tensor receives no gradient"
            finite(grad, "a gradient")

    def test_positions_do_not_see_each_other(self) -> None:
        """The distances of all positions equal the distances of parts, up to rounding."""
        matcher = self.component()
        ours, theirs = self.given(matcher)
        whole = self.measured(matcher, ours, theirs)
        apart = [
            self.measured(matcher, [s[part] for s in ours], [s[part] for s in theirs])
            for part in (slice(0, 5), slice(5, None))
        ]
        scale = whole.detach().abs().max()
        alike(whole / scale, torch.cat(apart) / scale, "a position depends on the others")

    def test_it_is_a_module_whose_weights_come_from_bind(self) -> None:
        """The optimizer finds them, and a seed decides them."""
        matcher = self.component()
        assert isinstance(matcher, nn.Module), "it is not a torch.nn.Module"
        for name, tensor in self.component().state_dict().items():
            same(tensor, matcher.state_dict()[name], f"'{name}' ignores torch's global generator")

    def saved(self, component: Any) -> dict[str, Tensor]:
        """Return a copy of the matcher's weights, as a checkpoint does."""
        return {name: tensor.clone() for name, tensor in component.state_dict().items()}

    def resumed(self, state: Mapping[str, Tensor]) -> Any:
        """Build a matcher, and load its weights into it."""
        matcher = self.component()
        if state:
            matcher.load_state_dict(state)
        return matcher

    def finish(self, component: Any, step: int) -> None:
        """Take a step that changes the weights, in place as an optimizer does."""
        state = {name: tensor + 0.1 * (step + 1) for name, tensor in self.saved(component).items()}
        component.load_state_dict(state)

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Compute the distances of the step's values."""
        return [self.measured(component, *self.given(component, seed=step)).detach()]

    def measured(self, matcher: Any, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """Call the matcher with the values of its pairs."""
        distance: Tensor = matcher(
            [ours[i] for i, _ in matcher.pairs], [theirs[j] for _, j in matcher.pairs]
        )
        return distance

    def given(
        self, matcher: Any, seed: int = 0, size: float = 1.0
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What the matcher reads of both: its numbers index all hidden states or maps."""
        return (self.maps if reads_attention(matcher) else self.states)(seed, size)

    def maps(self, seed: int = 0, size: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
        """Maps [N, heads, S] of the layers of both, that of the student with gradient.

        The queries see 1 to S keys. What has number 0 is not that of a layer.
        """
        random = torch.Generator().manual_seed(seed)
        seen = torch.arange(KEYS) <= torch.arange(POSITIONS)[:, None] % KEYS
        ours, theirs = (
            [
                (size * torch.randn(POSITIONS, of.heads, KEYS, generator=random)).masked_fill(
                    ~seen[:, None], LOG_ZERO
                )
                for _ in range(of.layers + 1)
            ]
            for of in (self.student, self.teacher)
        )
        return [each.requires_grad_() for each in ours], theirs

    def states(self, seed: int = 0, size: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
        """All hidden states [N, H] of a student, with gradient, and of a teacher."""
        random = torch.Generator().manual_seed(seed)
        ours, theirs = (
            [
                size * torch.randn(POSITIONS, of.width, generator=random)
                for _ in range(of.layers + 1)
            ]
            for of in (self.student, self.teacher)
        )
        return [each.requires_grad_() for each in ours], theirs

    def agrees_with(self, reference: Callable[[Any, list[Tensor], list[Tensor]], Tensor]) -> None:
        """Assert that the distances equal a formula's, for tests by the author.

        Args:
            reference: The formula, from the matcher and the hidden states or maps of its pairs, in
                float64, to the distances [N].
        """
        matcher = self.component()
        ours, theirs = self.given(matcher)
        found = self.measured(matcher, ours, theirs)
        exact = reference(
            matcher.double(),
            [ours[i].double() for i, _ in matcher.pairs],
            [theirs[j].double() for _, j in matcher.pairs],
        )
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)
