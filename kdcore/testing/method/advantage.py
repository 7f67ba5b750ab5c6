"""The conformance suite of advantages of sampled tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from kdcore.method.records import SampledTokens
from kdcore.testing.suite import STEPS, Suite, finite, same, same_global_random

ROWS, POSITIONS = 3, 32
LENGTHS, FIRST = (9, 1, 20), 4
"""Of the responses, and the position of their first tokens: the prompts are before it."""


class AdvantageSuite(Suite):
    """The checks of an `Advantage`."""

    kind = "advantage"

    def test_it_gives_one_number_for_each_token(self) -> None:
        """Floating-point advantages [B, T], of either sign, which vary over the tokens."""
        found = self.component()(example())
        assert found.shape == (ROWS, POSITIONS), f"gave {tuple(found.shape)}, not [B, T]"
        assert found.is_floating_point(), f"advantages are {found.dtype}"
        assert found[example().mask].unique().numel() > 1, "all advantages are equal"

    def test_it_is_finite_where_the_models_disagree(self) -> None:
        """A token may be all but impossible for one of them, at any time of the training."""
        for progress in (0.0, 1.0):
            tokens = replace(example(), progress=progress)
            for student, teacher in ((0.0, -1e4), (-1e4, 0.0), (0.0, 0.0)):
                given = replace(
                    tokens,
                    student=torch.full_like(tokens.student, student),
                    teacher=torch.full_like(tokens.teacher, teacher),
                )
                found = self.component()(given)[given.mask]
                finite(found, f"log-probs of {student} and {teacher}")

    def test_rows_do_not_see_each_other(self) -> None:
        """The advantages of a batch equal those of its single rows, bit for bit.

        Otherwise they depend on how a step is cut into micro-batches.
        """
        together = self.component()(example())
        apart = [self.component()(_each(example(), slice(row, row + 1))) for row in range(ROWS)]
        same(together, torch.cat(apart), "a row depends on the other rows")

    def test_padding_changes_nothing(self) -> None:
        """A response keeps its advantages when positions outside the mask are appended."""
        tokens = example()
        noise = replace(example(seed=9), mask=torch.zeros_like(tokens.mask))
        joined: dict[str, Any] = {
            name: torch.cat([getattr(tokens, name), getattr(noise, name)], 1) for name in ALL
        }
        longer = self.component()(replace(tokens, **joined))[:, :POSITIONS]
        found = self.component()(tokens)
        same(found[tokens.mask], longer[tokens.mask], "padding changes the advantages")

    def test_it_ignores_what_is_outside_the_mask(self) -> None:
        """The prompt has no tokens that were sampled."""
        tokens, other = example(), example(seed=9)
        changed = replace(
            tokens,
            student=tokens.student.where(tokens.mask, other.student),
            teacher=tokens.teacher.where(tokens.mask, other.teacher),
            importance=tokens.importance.where(tokens.mask, other.importance),
        )
        one, another = (self.component()(each) for each in (tokens, changed))
        same(one[tokens.mask], another[tokens.mask], "it reads positions outside the mask")

    def test_it_uses_no_global_generator(self) -> None:
        """A resumed run computes the same advantages."""
        found = []
        for seed in (1, 2):
            with same_global_random(seed):
                found.append(self.component()(example()))
        same(found[0], found[1], "the advantages depend on torch's global generator")

    def test_the_tokens_are_left_alone(self) -> None:
        """It does not change what it reads."""
        tokens, untouched = example(), example()
        self.component()(tokens)
        for name in ALL:
            same(getattr(tokens, name), getattr(untouched, name), f"it changed '{name}'")

    def agrees_with(self, reference: Callable[[SampledTokens], Any]) -> None:
        """Assert that the advantages equal a formula's, for tests by the author.

        Args:
            reference: The formula, from tokens in float64 to advantages [B, T], as a tensor or
                array.
        """
        tokens = example()
        exact = replace(
            tokens,
            student=tokens.student.double(),
            teacher=tokens.teacher.double(),
            importance=tokens.importance.double(),
        )
        expected = torch.as_tensor(reference(exact)).double()
        found = self.component()(tokens).double()
        torch.testing.assert_close(found[tokens.mask], expected[tokens.mask], rtol=1e-4, atol=1e-5)

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Compute the advantages of the step's tokens."""
        found: Tensor = component(replace(example(seed=step), progress=step / STEPS))
        return [found]


ALL = tuple(field.name for field in fields(SampledTokens) if field.type == "Tensor")
"""The names of the tensors of a record."""


def example(seed: int = 0) -> SampledTokens:
    """Make tokens of responses of several lengths, sampled from a mixture of both models.

    Args:
        seed: The seed of the log-probs.

    Returns:
        The tokens [B, T], with noise outside the mask.
    """
    random = torch.Generator().manual_seed(seed)
    student, teacher = (-3 * torch.rand(ROWS, POSITIONS, generator=random) for _ in range(2))
    mixture = 0.8 * student.exp() + 0.2 * teacher.exp()
    places = torch.arange(POSITIONS)
    ends = FIRST + torch.tensor(LENGTHS)[:, None]
    mask = (places >= FIRST) & (places < ends)
    return SampledTokens(student, teacher, student.exp() / mixture, mask, 0.5)


def _each(tokens: SampledTokens, rows: slice) -> SampledTokens:
    return replace(tokens, **{name: getattr(tokens, name)[rows] for name in ALL})
