"""Prompts are answered by an engine as by the model itself, while rows leave the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdcore.components.registry import installed
from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses import model as answering
from kdcore.data.responses.continuation import continue_prompts, pick
from kdcore.data.responses.model import ModelAnswers
from kdcore.decoding.engines.torch_engine import TorchEngine
from kdcore.specs.parts.training import GenerationSpec
from tests.tiny.models import language_model
from tests.tiny.tiny_chat_models import tiny_model

ENDS = [2, *range(3, 61, 6)]
PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [15, 16, 17, 18, 19], [20, 21], [30, 31]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompts", [PROMPTS, [[11], [12]]], ids=["padded", "one token"])
def test_an_engine_gives_the_tokens_of_the_model(
    prompts: list[list[int]], temperature: float
) -> None:
    """Both draw with the same numbers, so that sampled tokens are equal too."""
    model = language_model(seed=4)
    engine = TorchEngine()
    engine.bind(model, ())

    def made(engine: Any) -> list[list[int]]:
        generator = torch.Generator().manual_seed(3)
        return continue_prompts(
            prompts,
            [model],
            lambda logits: pick(logits[0], temperature, generator),
            ends=ENDS,
            limits=[90] * len(prompts),
            engine=engine,
        )

    expected = made(None)
    assert made(engine) == expected
    assert made(engine) == expected, "the engine was not emptied"
    assert len({len(row) for row in expected}) > 1  # the test sees rows leave


class Noticing(TorchEngine):
    """The reference, which counts its passes."""

    passes = 0

    def run(self, *given: Any) -> Any:
        Noticing.passes += 1
        return super().run(*given)


def asked() -> list[Conversation]:
    said = ["the mat", "the teacher sat", "on what?", "the mat and the teacher"]
    return [Conversation(str(n), (Message("user", text),)) for n, text in enumerate(said)]


def answered(spec: dict[str, Any]) -> list[Conversation]:
    given = GenerationSpec.model_validate(
        {"max_new_tokens": 8, "batch_size": 3} | spec, context={"registry": installed()}
    )
    answerer = ModelAnswers(tiny_model(seed=1), given)
    batches = list(enumerate(answerer.plan(asked())))
    return [c for done, _ in answerer.answers(batches) for c in done]


def test_the_engine_of_the_spec_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(target: Any, layers: Any, choice: Any, *_: Any) -> Any:
        assert choice is not None
        assert choice.name == "openvino"
        engine = Noticing()
        engine.bind(target.model, layers)
        return engine

    monkeypatch.setattr(answering, "bound_engine", chosen)
    expected = answered({})  # too few tokens for the default engine
    assert not Noticing.passes
    assert answered({"engine": "openvino"}) == expected
    assert Noticing.passes


def test_an_engine_that_may_round_is_a_setting_of_the_file() -> None:
    def settings(engine: Any) -> Any:
        spec = GenerationSpec.model_validate({"engine": engine}, context={"registry": installed()})
        return ModelAnswers(tiny_model(), spec).settings

    assert settings(None) == settings("openvino") == settings("torch")
    assert settings({"name": "openvino", "weights": "float16"}) != settings("openvino")
