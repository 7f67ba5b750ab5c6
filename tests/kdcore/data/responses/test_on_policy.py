"""Sampled responses: whose distribution they follow, and what rows become of them."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.data.responses.on_policy import OnPolicy, answered, prompt_of
from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.specs.parts.on_policy import OnPolicySpec
from kdcore.testing.decoding.draft_trees import p_value
from tests.tiny.models import language_model

CLASSES, SHARED, END = 7, 6, 2
PROMPT = [1, 4, 3]
DRAWS = 6_000


def sharp(seed: int, temperature: float = 1.0) -> Any:
    """A model whose distributions are far from uniform."""
    model: Any = language_model(classes=CLASSES, layers=1, seed=seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(12.0 / temperature if weight.ndim == 2 else 1.0)
    return model


STUDENT, TEACHER = sharp(1), sharp(2)


def row(tokens: list[int], learned: list[int]) -> Row:
    """Positions whose label is learned; the last token is only a label."""
    ids = torch.tensor(tokens)
    mask = torch.zeros(len(tokens) - 1, dtype=torch.bool)
    mask[learned] = True
    inputs = {"input_ids": ids[:-1], "attention_mask": torch.ones_like(ids[:-1])}
    return Row(inputs, ids[1:], mask, "a row")


def policy(rows: list[Row], positions: int = 100, **fields: Any) -> OnPolicy:
    spec = OnPolicySpec.model_validate(fields)
    return OnPolicy(spec, rows, TEACHER, [END], SHARED, positions)


@torch.no_grad()
def next_probs(model: Any, tokens: tuple[int, ...], temperature: float) -> Tensor:
    """[V] in float64, by a pass over all that comes before, over the classes both have."""
    logits = model(input_ids=torch.tensor([[*PROMPT, *tokens]])).logits[0, -1, :SHARED]
    return (logits.double() / temperature).softmax(-1)


def of_student(tokens: tuple[int, ...], temperature: float) -> Tensor:
    return next_probs(STUDENT, tokens, temperature)


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest classes that reach top_p, and nothing of the others."""
    kept, reached = torch.zeros_like(probs), 0.0
    for place in probs.argsort(descending=True).tolist():
        if reached < top_p:
            kept[place] = probs[place]
        reached += float(probs[place])
    return kept / kept.sum()


def cut_student(top_p: float) -> Any:
    """The student's nucleus."""
    return lambda tokens, temperature: nucleus(of_student(tokens, temperature), top_p)


def interleaved(k: int, teacher_temperature: float | None = None, top_p: float = 1.0) -> Any:
    """The student's within the teacher's k best, and the teacher's for the rest of the chance."""

    def probs(tokens: tuple[int, ...], temperature: float) -> Tensor:
        student = nucleus(next_probs(STUDENT, tokens, temperature), top_p)
        uncut = next_probs(TEACHER, tokens, teacher_temperature or temperature)
        teacher = nucleus(uncut, top_p)
        best = torch.zeros(SHARED, dtype=torch.float64)
        best[uncut.argsort(descending=True)[:k]] = 1.0
        return student * best + (student * (1 - best)).sum() * teacher

    return probs


def mixed(share: float) -> Any:
    """The student's and the teacher's, mixed at each token."""

    def probs(tokens: tuple[int, ...], temperature: float) -> Tensor:
        one, other = (next_probs(model, tokens, temperature) for model in (STUDENT, TEACHER))
        return (1 - share) * one + share * other

    return probs


def exact(probs: Any, temperature: float) -> dict[tuple[int, ...], float]:
    """The chance of each response of at most two tokens."""
    first = probs((), temperature)
    chances = {(END,): float(first[END])}
    for one in set(range(SHARED)) - {END}:
        second = probs((one,), temperature)
        chances |= {(one, two): float(first[one] * second[two]) for two in range(SHARED)}
    return chances


@pytest.mark.parametrize(
    ("fields", "probs"),
    [
        ({"temperature": 1.0}, of_student),
        ({"temperature": 1.7}, of_student),
        ({"policy": "interleaved", "top_k": 2, "temperature": 1.5}, interleaved(2)),
        ({"policy": "interleaved", "top_k": 99}, of_student),
        ({"top_p": 0.7, "temperature": 1.7}, cut_student(0.7)),
        (
            {"policy": "interleaved", "top_k": 2, "temperature": 2.5, "teacher_temperature": 1.2},
            interleaved(2, 1.2),
        ),
        (
            {"policy": "interleaved", "top_k": 2, "temperature": 2.0, "top_p": 0.8}
            | {"teacher_temperature": 3.0},
            interleaved(2, 3.0, 0.8),
        ),
        ({"policy": "mixed", "teacher_share": 0.4}, mixed(0.4)),
    ],
    ids=[
        "student",
        "student, warmer",
        "interleaved",
        "interleaved, all are likely",
        "student, cut",
        "interleaved, a cooler teacher",
        "interleaved, a warmer teacher, both cut",
        "mixed",
    ],
)
def test_responses_follow_the_distribution_they_should(fields: dict[str, Any], probs: Any) -> None:
    asked = policy([row([*PROMPT, 5, END], [2, 3])], max_new_tokens=2, batch_size=3_000, **fields)
    drawn = asked(STUDENT, [0] * DRAWS, torch.Generator().manual_seed(5))
    seen = Counter(
        tuple(int(token) for token in each.labels[each.mask].tolist()) for each in drawn.rows
    )
    chances = exact(probs, asked.spec.temperature)
    assert p_value(seen, chances) > 1e-3
    assert max(chances.values()) > 5 * sorted(chances.values())[len(chances) // 2]  # no uniform
    assert drawn.tokens == sum(len(tokens) * count for tokens, count in seen.items())


def test_what_is_not_the_teachers_is_among_its_best() -> None:
    """At temperature 0 the teacher's own token is its likeliest: every token is among its best."""
    rows = [row([*start, 5, END], [len(start) - 1]) for start in itertools.product((1, 3, 4), [5])]
    fields = {"policy": "interleaved", "top_k": 2, "max_new_tokens": 9}
    drawn = policy(rows, temperature=0.0, **fields)(STUDENT, [0, 1, 2], torch.Generator())
    greedy = policy(rows, temperature=0.0, max_new_tokens=9)(STUDENT, [0, 1, 2], torch.Generator())
    assert 0 < drawn.replaced < drawn.tokens
    assert greedy.replaced == 0
    for each in drawn.rows:
        with torch.no_grad():
            theirs = TEACHER(input_ids=each.inputs["input_ids"][None]).logits[0, :, :SHARED]
            ours = STUDENT(input_ids=each.inputs["input_ids"][None]).logits[0, :, :SHARED]
        best = theirs.topk(2).indices[each.mask]
        for token, two, own in zip(
            each.labels[each.mask], best, ours.argmax(-1)[each.mask], strict=True
        ):
            assert token in two
            assert token == (own if own in two else two[0])


def test_a_token_that_one_model_alone_has_is_never_drawn() -> None:
    drawn = policy([row([*PROMPT, 5, END], [2, 3])], temperature=50.0)(
        STUDENT, [0] * 200, torch.Generator().manual_seed(0)
    )
    labels = torch.cat([each.labels for each in drawn.rows])
    assert set(labels.tolist()) == set(range(SHARED))


@pytest.mark.parametrize(
    ("learned", "prompt"),
    [
        ([3, 4, 5], [1, 5, 6, 4]),
        ([1, 2, 5], [1, 5, 6, 4, 3, 0]),  # of several turns, the last
        ([3], [1, 5, 6, 4]),  # the end was left out, or cut
        ([0, 1, 2, 3, 4, 5], [1]),
    ],
)
def test_the_prompt_is_what_precedes_the_last_response(
    learned: list[int], prompt: list[int]
) -> None:
    assert prompt_of(row([1, 5, 6, 4, 3, 0, END], learned)) == prompt


def test_a_row_learns_its_sampled_response_and_nothing_else() -> None:
    made = answered(row([1, 5, 6, 4, 3, 0, END], [1, 2, 5]), [1, 5, 6, 4, 3, 0], [4, 4, END])
    assert made.inputs["input_ids"].tolist() == [1, 5, 6, 4, 3, 0, 4, 4]
    assert made.inputs["attention_mask"].tolist() == [1] * 8
    assert made.labels.tolist() == [5, 6, 4, 3, 0, 4, 4, END]
    assert made.mask.tolist() == [False] * 5 + [True] * 3
    assert made.id == "a row"


def test_a_response_ends_at_its_longest_or_where_the_row_does() -> None:
    rows = [row([*PROMPT, 5, 5, END], [2, 3, 4]), row([5, 5, END], [1])]
    long = policy(rows, positions=6, max_new_tokens=50, temperature=0.0)
    drawn = long(never_ending(), [0, 1], torch.Generator())
    assert [len(each.labels) for each in drawn.rows] == [6, 6]
    short = policy(rows, max_new_tokens=2)(never_ending(), [0, 1], torch.Generator())
    assert [int(each.mask.sum()) for each in short.rows] == [2, 2]
    assert all(END not in each.labels[each.mask] for each in short.rows)


def never_ending() -> Any:
    """A model whose end token is the unlikeliest."""
    model: Any = language_model(classes=CLASSES, layers=1, seed=3)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(CLASSES))
    with torch.no_grad():
        model.lm_head.bias[END] = -1e9
    return model


def test_the_student_samples_without_dropout_and_goes_on_training() -> None:
    model: Any = language_model("gpt2", classes=CLASSES)
    rows = [row([*PROMPT, 5, END], [2, 3])]
    before = torch.get_rng_state()
    drawn = []
    for training in (False, True):
        model.train(training)
        drawn.append(policy(rows)(model, [0] * 20, torch.Generator().manual_seed(1)))
        assert model.training is training
        assert all(part.training is training for part in model.modules())
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(one.labels, other.labels)
        for one, other in zip(drawn[0].rows, drawn[1].rows, strict=True)
    )


def test_a_temperature_for_a_teacher_that_does_not_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher_temperature applies only to policy"):
        OnPolicySpec.model_validate({"teacher_temperature": 0.2})


def test_rows_that_are_more_than_tokens_are_refused() -> None:
    odd = row([*PROMPT, 5, END], [2, 3])
    with pytest.raises(UserError, match="an input 'pixel_values'"):
        policy([Row({**odd.inputs, "pixel_values": torch.ones(3)}, odd.labels, odd.mask, "x")])
