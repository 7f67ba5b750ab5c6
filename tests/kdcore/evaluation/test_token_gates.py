"""What is shown of the gates is what a step of the training would weigh."""

from __future__ import annotations

import pytest
import torch

from kdcore.evaluation.token_gates import CHOICES, judged_responses
from kdcore.method.loss_engine import LossEngine
from kdcore.runs.results import GatedResponse
from kdcore.training.model_view import ModelView
from tests.kdcore.method.test_loss_engine import ALL, HalfConfident, TopHalf, lm_batch, objective
from tests.tiny.models import language_model


class Letters:
    """A tokenizer's one use here."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"[{n}]" for n in ids)


def judged(chunk: int) -> tuple[list[GatedResponse], torch.Tensor, torch.Tensor]:
    """The responses, and the logits [N, V] of both models at their tokens."""
    batch = lm_batch()
    student, teacher = language_model(seed=1), language_model(seed=2)
    with torch.no_grad():
        found = judged_responses(
            LossEngine(objective((HalfConfident(), TopHalf())), ALL, chunk),
            ModelView(student, 61)(student, batch),
            ModelView(teacher, 61)(teacher, batch),
            batch,
            ids=["a", "b", "c"],
            tokenizer=Letters(),
            generator=torch.Generator().manual_seed(0),
        )
        whole = [model(**batch.inputs).logits[batch.mask] for model in (student, teacher)]
    return found, whole[0], whole[1]


def test_weights_are_the_gates_own_and_their_product() -> None:
    found, student, teacher = judged(chunk=5)
    tokens = [token for response in found for token in response.tokens]
    best = student.amax(-1)
    plain = torch.where(best > teacher.amax(-1), 1.0, 0.25).tolist()
    ranked = (best >= best.median()).float().tolist()
    assert [token.weights for token in tokens] == [
        {"gate0": a, "gate1": b} for a, b in zip(plain, ranked, strict=True)
    ]
    assert [token.weight for token in tokens] == [a * b for a, b in zip(plain, ranked, strict=True)]
    accepted = [(a == 1.0) * b for a, b in zip(plain, ranked, strict=True)]  # 0.25 is the floor
    assert [token.accepted for token in tokens] == accepted
    assert 0 < sum(ranked) < len(ranked) and len(set(plain)) == 2


def test_tokens_are_the_learned_ones_with_what_stands_before_them() -> None:
    found, _, _ = judged(chunk=512)
    batch = lm_batch()
    assert [response.id for response in found] == ["a", "b", "c"]
    for row, response in enumerate(found):
        learned = batch.labels[row][batch.mask[row]].tolist()
        assert [token.text for token in response.tokens] == [f"[{n}]" for n in learned]
        first = int(batch.mask[row].int().argmax())
        before = batch.inputs["input_ids"][row, : first + 1].tolist()
        assert response.prompt == Letters().decode(before)


@pytest.mark.parametrize("chunk", [1, 512])
def test_choices_are_the_likeliest_of_each_model(chunk: int) -> None:
    found, *whole = judged(chunk)
    tokens = [token for response in found for token in response.tokens]
    sides = [[token.student for token in tokens], [token.teacher for token in tokens]]
    for logits, own in zip(whole, sides, strict=True):
        best = logits.double().softmax(-1).topk(CHOICES)
        for choices, shares, ids in zip(own, best.values, best.indices, strict=True):
            assert [text for text, _ in choices] == [f"[{n}]" for n in ids.tolist()]
            assert [share for _, share in choices] == pytest.approx(shares.tolist(), rel=1e-4)
