"""Losses across tokenizers beside trl's own code, on one tiny pair of models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdcore.data.rows import batch_of
from kdcore_alignment import Gold
from tests.plugins.alignment.test_gold import OURS, THEIRS, objective
from tests.plugins.alignment.test_gold import loss as hybrid_loss
from tests.plugins.alignment.test_uld import Pair, pair
from tests.plugins.alignment.test_uld import loss as uld_loss


def loss_of_trl(
    made: Pair, *, extended: bool, tokenizers: tuple[Any, ...] = (), **config: Any
) -> torch.Tensor:
    """What trl's ULDLoss makes of a pair; ``tokenizers`` and ``config`` are for its hybrid."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    asked = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=extended,
        uld_token_merge_strategy="bayesian",
        **config,
    )
    theirs = batch_of(made.rows.collated(made.batch.index))
    sides = [(made.student, made.batch), (made.teacher, theirs)]
    logits = [model(**batch.inputs).logits for model, batch in sides]
    labels, tokens, offsets = [], [], []
    for (_, batch), tokenizer in zip(sides, (OURS, THEIRS), strict=True):
        # a row's last label is not among its inputs
        whole = torch.cat([batch.inputs["input_ids"][:, :1], batch.labels], 1)
        mask = torch.cat([torch.zeros_like(batch.mask[:, :1]), batch.mask], 1)
        tokens.append(whole)
        labels.append(whole.masked_fill(~mask, -100))
        ends = torch.zeros(*whole.shape, 2, dtype=torch.int64)
        for row in range(len(whole)):
            read = 0
            for place in mask[row].nonzero()[:, 0].tolist():
                piece = tokenizer.convert_ids_to_tokens(int(whole[row, place]))
                read += 0 if piece == "<|im_end|>" else len(piece)  # a sign for each byte
                ends[row, place, 1] = read
        offsets.append(ends)
    # the logits of the position after the last label are not read
    wide = [torch.cat([each, each[:, -1:]], 1) for each in logits]
    found: torch.Tensor = ULDLoss(asked, *tokenizers)(
        wide[0], wide[1], labels[0], labels[1], tokens[0], tokens[1], offsets[0], offsets[1]
    )
    return found


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("extended", [True, False])
def test_uld_has_the_value_and_gradient_of_trls(extended: bool) -> None:
    """GOLD's ULD loss with the strategy 'bayesian', which is ours at the last token of a span."""
    made = pair("spans_last" if extended else "positions")
    expected = loss_of_trl(made, extended=extended)
    weights = list(made.student.parameters())
    slopes = torch.autograd.grad(expected, weights)
    found = uld_loss(made, "product").losses["all"]
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    for grad, slope in zip(torch.autograd.grad(found, weights), slopes, strict=True):
        torch.testing.assert_close(grad, slope, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gold_has_the_value_and_gradient_of_trls_hybrid_loss(
    beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its strategy 'bayesian' is ours at the last token of a span.

    Without its clamp at 1e-8, below which the merged probabilities of long spans lie.
    """
    monkeypatch.setattr(torch.Tensor, "clamp_min", lambda probabilities, _: probabilities)
    made = pair("spans_last")
    hybrid = {
        "uld_use_hybrid_loss": True,
        "uld_hybrid_matched_weight": None,
        "uld_hybrid_unmatched_weight": None,
        "beta": beta,
    }
    expected = loss_of_trl(made, extended=True, tokenizers=(OURS, THEIRS), **hybrid)
    found = hybrid_loss(made, objective(Gold(), beta)).losses["all"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    weights = list(made.student.parameters())
    slopes = torch.autograd.grad(expected, weights)
    for grad, slope in zip(torch.autograd.grad(found, weights), slopes, strict=True):
        torch.testing.assert_close(grad, slope, rtol=1e-3, atol=1e-5)
