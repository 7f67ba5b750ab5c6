"""``model.generate(custom_generate=...)`` gives what ``model.generate`` gives."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kdcore.components.choice import Choice
from kdcore.components.registry import installed
from kdcore.decoding.custom_generate import speculative
from kdcore.decoding.drafters.files import save_drafter
from kdcore.decoding.tree import Verdict
from kdcore.errors import UserError
from kdcore.models.assembly import Assembly
from kdcore.models.loading.load import load_model
from kdcore.models.transformers_versions import cache_argument
from kdcore.specs.parts.fields import ModelSpec
from kdcore_baselines.drafters.untrained import Ngram
from kdcore_baselines.drafting_components import MedusaParams, NgramParams
from kdcore_baselines.trees import Backbone
from kdcore_baselines.verifiers import ChainSampling
from tests.tiny.drafters import Levels, clueless
from tests.tiny.models import language_model
from tests.tiny.tiny_chat_models import saved, tiny_model

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
        {"eos_token_id": list(range(3, 20)), "pad_token_id": 0},
        {"max_new_tokens": 1},
        {"input_ids": PROMPTS[1:], "attention_mask": None},
    ],
    ids=["greedy", "ends", "one token", "no mask"],
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


def test_several_samples_follow_the_seed_and_differ() -> None:
    model = language_model(layers=2, seed=3)
    settings = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3, "top_k": 0}

    def drawn(seed: int) -> Any:
        torch.manual_seed(seed)
        drafted = speculative(DRAFTERS[0])
        return model.generate(PROMPTS, **settings, custom_generate=drafted).tolist()

    first, again, other = map(drawn, (1, 1, 2))
    assert first == again and len(set(map(tuple, [*first, *other]))) == 12
    with pytest.raises(ValueError, match="do not support `num_return_sequences`"):
        model.generate(PROMPTS, num_return_sequences=3, custom_generate=speculative(DRAFTERS[0]))


def test_a_verifier_of_chains_is_refused_before_a_tree_is_drafted() -> None:
    drafter = Levels(clueless(3, 61), Backbone(k=2))
    drafter.propose = lambda *_: pytest.fail("drafted")  # type: ignore[method-assign]
    drafted = speculative(drafter, verifier=ChainSampling(None, None))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="follows a single chain, but the tree Backbone branches"):
        language_model(layers=2, seed=3).generate(PROMPTS, custom_generate=drafted)


class Witness:
    """A verifier that emits the likeliest token, and keeps the log-probs after the root [B, V]."""

    lossless = True

    def __call__(self, tree: Any, logp: Any, generator: Any) -> Verdict:
        root = torch.zeros(len(tree.tokens), 1, dtype=torch.int64)
        self.logp = logp(root).squeeze(1)
        return Verdict(root[:, :0], self.logp.argmax(-1))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.3},
        {"top_p": 0.0, "top_k": 0},
        {"top_p": 0.4, "top_k": 0},
        {"top_k": 10**6},
        {"top_k": 7, "top_p": 0.8, "temperature": 1.7, "repetition_penalty": 1.9},
        {"min_p": 0.6, "top_k": 0},
        {"typical_p": 0.3, "top_k": 0},
        {"epsilon_cutoff": 0.01, "top_k": 0},
        {"eta_cutoff": 0.02, "top_k": 0},
        {"top_h": 0.3, "top_k": 0},
        {"suppress_tokens": list(range(30)), "renormalize_logits": True},
        {"num_return_sequences": 3},
        {"logits_processor": [TemperatureLogitsWarper(0.2)]},
        {"logits_processor": [TopKLogitsWarper(3)], "top_k": 0},
        {"logits_processor": [TopPLogitsWarper(0.1, min_tokens_to_keep=4)], "top_k": 0},
        {
            "logits_processor": [RepetitionPenaltyLogitsProcessor(2.5)],
            "input_ids": PROMPTS[1:],
            "attention_mask": REAL[1:],
        },
    ],
    ids=", ".join,
)
def test_what_is_sampled_from_is_what_generate_samples_from(settings: dict[str, Any]) -> None:
    model = language_model(layers=2, seed=3)
    for parameter in model.parameters():  # so that the distribution is far from uniform
        parameter.data *= 6
    settings = {"input_ids": PROMPTS, "attention_mask": REAL, "max_new_tokens": 1} | settings
    if "logits_processor" in settings:
        processors = LogitsProcessorList(settings["logits_processor"])
        settings = settings | {"logits_processor": processors}
    scores = model.generate(
        **settings, do_sample=True, output_scores=True, return_dict_in_generate=True
    ).scores[0]
    witness = Witness()
    drafted = speculative(Ngram(NgramParams(), None), verifier=witness)  # type: ignore[arg-type]
    model.generate(**settings, do_sample=True, custom_generate=drafted)
    torch.testing.assert_close(witness.logp.exp(), scores.float().softmax(-1), atol=1e-5, rtol=1e-4)


def test_a_row_that_ends_early_is_filled_as_generate_fills_it() -> None:
    model = language_model(layers=2, seed=3)
    model.generation_config.pad_token_id = None
    given = {"input_ids": PROMPTS, "attention_mask": REAL, "max_new_tokens": 14}
    given["eos_token_id"] = [int(model.generate(**given)[0, 9])]
    plain = model.generate(**given)
    assert torch.equal(plain, model.generate(**given, custom_generate=speculative(DRAFTERS[0])))


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

    failed = Streamer()
    generate = speculative(DRAFTERS[0], streamer=failed)
    with pytest.raises(UserError, match="beam search"):
        model.generate(PROMPTS[1:], max_new_tokens=14, num_beams=2, custom_generate=generate)
    assert failed.ended
    with pytest.raises(UserError, match="does not support a streamer of 2 rows"):
        model.generate(PROMPTS, max_new_tokens=14, custom_generate=generate)
    assert not failed.seen[7:]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "low"}, "dola generation"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"position_ids": torch.arange(7)[None] + 5}, "position_ids"),
    ],
)
def test_what_it_does_not_follow_is_refused(settings: dict[str, Any], what: str) -> None:
    model = language_model(layers=2)
    given = {"input_ids": PROMPTS[1:], "max_new_tokens": 3} | settings
    with pytest.raises(UserError, match=what):
        model.generate(**given, custom_generate=speculative(DRAFTERS[0]))


def test_a_cache_that_is_filled_is_refused() -> None:
    model = language_model(layers=2)
    name = cache_argument(model)
    cache = getattr(model(PROMPTS[1:, :3]), name)
    with pytest.raises(UserError, match="a filled cache"):
        model.generate(
            PROMPTS[1:],
            max_new_tokens=3,
            **{name: cache},
            custom_generate=speculative(DRAFTERS[0]),
        )


def test_a_quantized_cache_is_refused() -> None:
    """Asked directly, since generate makes such a cache only where a further package is."""
    config = GenerationConfig(cache_implementation="quantized", max_new_tokens=3)
    generate = speculative(DRAFTERS[0])
    with pytest.raises(UserError, match="a quantized cache"):
        generate(
            language_model(),
            PROMPTS,
            logits_processor=LogitsProcessorList(),
            stopping_criteria=StoppingCriteriaList(),
            generation_config=config,
        )


def test_a_criterion_that_would_not_see_the_padding_is_refused() -> None:
    class Never(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with pytest.raises(UserError, match="Never would not see the padding"):
        both(DRAFTERS[0], stopping_criteria=StoppingCriteriaList([Never()]))


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
    with pytest.raises(UserError, match=r"differs from .* in weights or config"):
        other.generate(**given, custom_generate=drafted)
    with pytest.raises(UserError, match="has no name_or_path"):
        language_model().generate(**given, custom_generate=drafted)


def test_a_name_is_a_drafter_and_a_missing_folder_is_told_at_once(tmp_path: Path) -> None:
    plain, drafted = both("ngram")
    assert torch.equal(plain, drafted)
    with pytest.raises(UserError, match=r"'ngramm'.*\n.*ngram"):
        speculative("ngramm")
    for missing in (str(tmp_path / "drafter"), tmp_path / "drafter"):
        with pytest.raises(UserError, match="does not contain a drafter"):
            speculative(missing)
    with pytest.raises(UserError, match="a dict is not a drafter"):
        speculative({"name": "ngram"})  # type: ignore[arg-type]


def test_threads_take_turns() -> None:
    """A drafter has the rows of one call: with those of another it would fail or draft nothing."""

    class Witness(Ngram):
        def start(self, first: torch.Tensor) -> None:
            self.call = threading.get_ident()
            super().start(first)

        def propose(self, *given: Any) -> Any:
            time.sleep(0.001)  # the other threads run
            assert self.call == threading.get_ident()
            return super().propose(*given)

    model = language_model(layers=2, seed=3)
    drafted = speculative(Witness(NgramParams(), None))  # type: ignore[arg-type]

    def answer(length: int) -> bool:
        given = {"input_ids": PROMPTS[1:, :length], "max_new_tokens": 8}
        expected = model.generate(**given)
        return torch.equal(expected, model.generate(**given, custom_generate=drafted))

    with ThreadPoolExecutor(4) as several:
        assert all(several.map(answer, [3, 4, 5, 6]))
