"""``model.generate(custom_generate=...)`` gives what ``model.generate`` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from kdcore.assembly import Assembly
from kdcore.choice import Choice
from kdcore.decoding.custom_generate import speculative
from kdcore.drafter_files import save_drafter
from kdcore.errors import UserError
from kdcore.models import load_model
from kdcore.registry import installed
from kdcore.specs import ModelSpec
from kdcore_baselines.drafters import Ngram
from kdcore_baselines.drafting_components import MedusaParams, NgramParams
from tests.decoding.drafters import Levels, clueless
from tests.tiny_chat_models import saved, tiny_model
from tests.tiny_models import language_model

PROMPTS = torch.tensor([[0, 0, 5, 9, 5, 9, 5], [7, 8, 9, 10, 11, 12, 13]])
REAL = (torch.arange(7) >= torch.tensor([[2], [0]])).long()


def both(drafter: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model = language_model(layers=2, seed=3)
    given = {"input_ids": PROMPTS, "attention_mask": REAL, "max_new_tokens": 14} | settings
    return model.generate(**given), model.generate(**given, custom_generate=speculative(drafter))


DRAFTERS = [Ngram(NgramParams(), None), Levels(clueless(3, 61))]  # type: ignore[arg-type]


@pytest.mark.parametrize("drafter", DRAFTERS, ids=["ngram", "clueless"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"eos_token_id": list(range(3, 20)), "pad_token_id": 0},
        {"max_new_tokens": 1},
        {"input_ids": PROMPTS[1:], "attention_mask": None},
    ],
    ids=["greedy", "repetition", "ends", "one token", "no mask"],
)
def test_greedy_output_is_that_of_generate(drafter: Any, settings: dict[str, Any]) -> None:
    plain, drafted = both(drafter, **settings)
    assert torch.equal(plain, drafted)


def test_a_criterion_of_the_caller_stops_a_row() -> None:
    class AtTen(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 10)

    settings = {"input_ids": PROMPTS[1:], "attention_mask": REAL[1:]}
    plain, drafted = both(
        DRAFTERS[0], stopping_criteria=StoppingCriteriaList([AtTen()]), **settings
    )
    assert plain.shape[1] == 10 and torch.equal(plain, drafted)


def test_sampling_follows_top_k_of_one() -> None:
    """With one class left, sampling is greedy: the settings reach the target's distribution."""
    plain, drafted = both(DRAFTERS[1], do_sample=True, top_k=1, temperature=0.7)
    assert torch.equal(plain, drafted)


def test_tokens_stream_one_by_one() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    generate = speculative(DRAFTERS[0], streamer=streamer)
    model = language_model(layers=2, seed=3)
    drafted = model.generate(PROMPTS[1:], max_new_tokens=14, custom_generate=generate)
    assert streamer.ended
    assert streamer.seen == drafted[0].tolist()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"bad_words_ids": [[4]]}, "NoBadWordsLogitsProcessor"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
    ],
)
def test_what_it_does_not_follow_is_refused(settings: dict[str, Any], what: str) -> None:
    model = language_model(layers=2)
    with pytest.raises(UserError, match=what):
        model.generate(
            PROMPTS[1:], max_new_tokens=3, custom_generate=speculative(DRAFTERS[0]), **settings
        )


def test_a_trained_drafter_is_taken_from_its_folder(tmp_path: Path) -> None:
    folder = saved(tiny_model(), tmp_path / "target")
    loaded = load_model(ModelSpec.model_validate({"model": str(folder)}))
    choice = Choice("drafter", "medusa", MedusaParams(depth=2))
    drafter = Assembly(installed()).build(choice)
    drafter.bind(loaded.model, loaded.tokenizer)
    save_drafter(tmp_path / "drafter", drafter, choice, loaded, installed(), feature_rms=[1.0])

    model = AutoModelForCausalLM.from_pretrained(folder)
    given = {"input_ids": torch.tensor([[5, 6, 7, 5, 6]]), "max_new_tokens": 12}
    drafted = speculative(tmp_path / "drafter")
    for custom in (drafted, drafted, speculative(str(tmp_path / "drafter"))):
        assert torch.equal(model.generate(**given), model.generate(**given, custom_generate=custom))
    other = AutoModelForCausalLM.from_pretrained(saved(tiny_model(seed=1), tmp_path / "other"))
    with pytest.raises(UserError, match="its digest differ"):
        other.generate(**given, custom_generate=drafted)
    with pytest.raises(UserError, match="came from no folder"):
        language_model().generate(**given, custom_generate=drafted)
