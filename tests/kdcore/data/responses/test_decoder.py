"""What answers to conversations are drawn from: the seed, and nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.decoder import DecoderAnswers
from kdcore.models.loading.loaded import LoadedModel
from tests.tiny.tiny_chat_models import tiny_model


class Drawing:
    """In place of a decoder: notes what it would draw, and says a word."""

    def __init__(self, limit: int | None = None) -> None:
        self.session = SimpleNamespace(limit=limit, short=None)
        self.drawn: list[float] = []

    def stream(
        self, ids: Tensor, real: Tensor, stop: Any, generator: torch.Generator
    ) -> Iterator[list[list[int]]]:
        self.drawn.append(float(torch.rand(1, generator=generator)))
        yield [[70] for _ in ids]


@pytest.fixture(scope="module")
def target() -> LoadedModel:
    return tiny_model()


def asked(*turns: str) -> Conversation:
    return Conversation("x", tuple(Message("user", turn) for turn in turns))


def talk(target: LoadedModel, seed: int) -> list[float]:
    """What is drawn in a conversation of three turns, one after the other."""
    decoder: Any = Drawing()
    answers = DecoderAnswers(target, decoder, 4, seed=seed)
    conversation = asked()
    for turn in ("the mat", "and then?", "and then?"):
        messages = (*conversation.messages, Message("user", turn))
        conversation = Conversation("x", messages)
        tokens = [token for (emitted,) in answers.stream(conversation) for token in emitted]
        conversation = conversation.answered(answers.message(tokens))
    return decoder.drawn


def test_each_turn_of_a_conversation_draws_its_own(target: LoadedModel) -> None:
    first, again, other = (talk(target, seed) for seed in (1, 1, 2))
    assert first == again
    assert len({*first, *other}) == 6


@pytest.mark.parametrize("alone", [True, False])
def test_turns_and_rows_of_a_batch_draw_their_own(target: LoadedModel, alone: bool) -> None:
    conversations = [asked("the mat", "and then?"), asked("the teacher sat", "on what?")]
    seen = []
    for seed in (1, 1, 2):
        decoder: Any = Drawing(limit=500 if alone else None)
        answers = DecoderAnswers(target, decoder, 500 if alone else 4)
        done = answers.answer(conversations, seed)
        assert not any(each.needs_response for each in done)
        seen.append(decoder.drawn)
    assert seen[0] == seen[1]
    assert len({*seen[0], *seen[2]}) == (8 if alone else 4)
