"""LongRoPE, whose factors a whole pass shares: what is decoded is what transformers generates."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.continuation import continue_prompts, pick
from kdcore.data.responses.decoder import DecoderAnswers
from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.protocols import Drafter
from kdcore.errors import UserError
from kdcore.models.anatomy import short_length_of
from kdcore_baselines.drafters.untrained import Ngram, Nothing
from kdcore_baselines.drafting_components import NgramParams
from kdcore_baselines.trees import Backbone
from kdcore_baselines.verifiers import Greedy
from tests.tiny.drafters import Levels, clueless
from tests.tiny.targets import CLASSES, SIZE, generated, padded, tiny

SHORT = 32


@functools.cache
def phi() -> Any:
    """A Phi-3 of no size that reads 32 positions by its short factors. Do not change it."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": SHORT,
    }
    config = Phi3Config(**SIZE, original_max_position_embeddings=SHORT, rope_parameters=rope)
    model = Phi3ForCausalLM(config)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.eval()


def row(length: int, seed: int = 0) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(CLASSES, (length,), generator=random).tolist()


def drafters() -> list[Drafter]:
    """One of them drafts to a depth of 4 in every round, and nothing that is accepted."""
    wide = Levels(clueless(4, CLASSES), Backbone(3))
    return [Nothing(None, None), Ngram(NgramParams(length=5), None), wide]


def decode(drafter: Drafter, rows: list[list[int]], count: int) -> list[list[int]]:
    return Decoder(phi(), drafter, Greedy(None, None)).generate(*padded(rows), Stop(count))


def test_the_length_is_that_of_the_config() -> None:
    assert short_length_of(phi()) == SHORT
    assert short_length_of(tiny("llama")) is None
    nested = {"full_attention": phi().config.rope_parameters, "other": {"rope_type": "default"}}
    text = SimpleNamespace(rope_parameters=nested)
    config = SimpleNamespace(get_text_config=lambda: text)
    assert short_length_of(SimpleNamespace(config=config)) == SHORT


@pytest.mark.parametrize(
    ("lengths", "count"),
    [([20], 13), ([20, 7], 13), ([SHORT], 1), ([SHORT + 2], 20), ([50, 40], 20)],
)
def test_what_stays_on_one_side_is_what_transformers_generates(
    lengths: list[int], count: int
) -> None:
    rows = [row(length, seed) for seed, length in enumerate(lengths)]
    expected = generated(phi(), rows, count)
    for drafter in drafters():
        assert decode(drafter, rows, count) == expected


def test_the_two_sides_differ() -> None:
    """Or nothing here would show a fault."""
    with torch.no_grad():
        ids = torch.tensor([row(20)])
        far = torch.tensor([[*range(19), SHORT]])
        short, long = (
            phi()(ids, position_ids=places).logits[0, -2] for places in (far.clamp(max=19), far)
        )
    assert (short - long).abs().max() > 0.1


@pytest.mark.parametrize(
    ("length", "count", "cure"),
    [(20, 14, "at most 13 new tokens"), (SHORT, 2, "at most 1 new"), (SHORT + 1, 1, "34 tokens")],
)
def test_what_could_cross_is_refused(length: int, count: int, cure: str) -> None:
    for drafter in drafters():
        with pytest.raises(UserError, match="LongRoPE") as raised:
            decode(drafter, [row(length), row(3)], count)
        assert cure in raised.value.cure


def test_a_conversation_that_could_cross_is_named_before_any_is_answered() -> None:
    def tokenizer(text: str, **_: bool) -> dict[str, list[int]]:
        return {"input_ids": row(len(text))}

    target: Any = SimpleNamespace(tokenizer=tokenizer)
    answers = DecoderAnswers(target, Decoder(phi(), Nothing(None, None), Greedy(None, None)), 14)
    for length in (19, SHORT + 2):
        asked = Conversation("this one", (Message("user", "x" * length),), plain=True)
        assert len(answers.prompt(asked)) == length
    asked = Conversation("this one", (Message("user", "x" * 20),), plain=True)
    with pytest.raises(UserError, match="this one of 20 tokens with 14 new tokens"):
        answers.prompt(asked)


def greedy(logits: list[torch.Tensor]) -> torch.Tensor:
    return pick(logits[0], 0.0, None)


@torch.no_grad()
def without_cache(ids: list[int], count: int) -> list[int]:
    """Greedy decoding that reads the whole row for each token.

    Before 5.23 transformers loses its cache where a row crosses, and generates other tokens.
    """
    for _ in range(count):
        ids = [*ids, int(phi()(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


@pytest.mark.parametrize("length", [20, SHORT, SHORT + 1, 40])
def test_a_row_continued_across_is_read_anew(length: int) -> None:
    made = continue_prompts([row(length)], [phi()], greedy, ends=[], limits=[25])
    assert made == [without_cache(row(length), 25)]


def test_when_the_row_beyond_leaves_the_others_are_read_anew() -> None:
    seen: list[torch.Tensor] = []

    def heard(logits: list[torch.Tensor]) -> torch.Tensor:
        seen.append(logits[0])
        return greedy(logits)

    made = continue_prompts([row(40), row(9, 1)], [phi()], heard, ends=[], limits=[2, 12])
    assert [len(each) for each in seen] == [2, 2] + [1] * 10
    for step in range(2, 12):
        with torch.no_grad():
            alone = phi()(torch.tensor([row(9, 1) + made[1][:step]])).logits[0, -1]
        torch.testing.assert_close(seen[step][0], alone, rtol=1e-4, atol=1e-4)
