"""``model.generate(custom_generate=...)`` gives what ``model.generate`` gives."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GraniteMoeHybridConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkingConfig,
)

from kdcore.decoding.custom_generate import speculative
from kdcore.decoding.drafters.files import save_drafter
from kdcore.decoding.torch_engine import TorchEngine
from kdcore.errors import UserError
from kdcore.method.choice import Choice
from kdcore.method.records import Verdict
from kdcore.method.registry import installed
from kdcore.models.assembly import Assembly
from kdcore.models.loading import load_model
from kdcore.specs.fields import ModelSpec
from kdcore_baselines.drafters.untrained import Ngram
from kdcore_baselines.drafting_components import MedusaParams, NgramParams
from kdcore_baselines.trees import Backbone
from kdcore_baselines.verifiers import ChainSampling
from tests.tiny.drafters import Levels, clueless
from tests.tiny.tiny_chat_models import saved, tiny_model
from tests.tiny.tiny_models import language_model

PROMPTS = torch.tensor([[0, 0, 5, 9, 5, 9, 5], [7, 8, 9, 10, 11, 12, 13]])
REAL = (torch.arange(7) >= torch.tensor([[2], [0]])).long()


def both(drafter: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model = language_model(layers=2, seed=3)
    given = {"input_ids": PROMPTS, "attention_mask": REAL, "max_new_tokens": 14} | settings
    return model.generate(**given), model.generate(**given, custom_generate=speculative(drafter))


class Alternating(LogitsProcessor):
    """Even tokens follow odd ones, by the tokens before alone."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        excluded = (torch.arange(scores.shape[1]) + input_ids[:, -1:]) % 2 == 0
        return scores.masked_fill(excluded, -torch.inf)


class Counting(LogitsProcessor):
    """A state machine, which takes each call as the next token."""

    calls = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.calls += 1
        return scores + torch.arange(scores.shape[1]) * (self.calls % 5)


class Neighbours(LogitsProcessor):
    """It takes from each row what the first one has."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores - scores[:1]


class Advancing(LogitsProcessor):
    """A matcher that fails where the tokens are not those that it expects."""

    length = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.length and input_ids.shape[1] != self.length + 1:
            raise RuntimeError("out of order")
        self.length = input_ids.shape[1]
        return scores


AFTER = {5: [40], 13: [40], 40: [41, 42], 41: [43], 42: [44], 43: [40], 44: [40]}
"""A grammar, which fails after a token that it does not allow."""
OPTIONS = [
    "min_new_tokens", "min_length", "ngrams", "bad words", "bias", "prefix by row", "grammar",
    "decay", "forced end", "watermark", "repetition with padding", "repetition without the prompt",
    "own processor",
]  # fmt: skip
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
        {"eos_token_id": list(range(3, 20)), "pad_token_id": 0, "min_new_tokens": 9},
        {"eos_token_id": list(range(3, 20)), "pad_token_id": 0, "min_length": 12},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[n] for n in range(20)] + [[n, n + 1] for n in range(20, 60)]},
        {"sequence_bias": [[[n, n + 1], 9.0] for n in range(20, 60)]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [20 + row, (7 * int(ids[-1]) + 3) % 61]},
        {"prefix_allowed_tokens_fn": lambda row, ids: AFTER[int(ids[-1])]},
        {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 7, "pad_token_id": 0},
        {"forced_eos_token_id": 9, "begin_suppress_tokens": list(range(5, 60))},
        {"watermarking_config": WatermarkingConfig(bias=4.0, context_width=2)},
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.8)]},
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.8, prompt_ignore_length=7)]},
        {"logits_processor": [Alternating()]},
    ],
    ids=["greedy", "repetition", "ends", "one token", "no mask", *OPTIONS],
)
def test_greedy_output_is_that_of_generate(drafter: Any, settings: dict[str, Any]) -> None:
    if "logits_processor" in settings:
        settings = {"logits_processor": LogitsProcessorList(settings["logits_processor"])}
    plain, drafted = both(drafter, **settings)
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize(
    ("processor", "why"),
    [
        (Counting(), "Counting depends on its earlier calls"),
        (Neighbours(), "Neighbours depends on the other rows"),
        (Advancing(), "Advancing fails when it is called for several continuations: RuntimeError"),
    ],
)
def test_a_processor_that_is_not_a_function_of_the_context_is_refused(
    processor: Any, why: str
) -> None:
    with pytest.raises(UserError, match=f"the logits processor {why}"):
        both(DRAFTERS[0], logits_processor=LogitsProcessorList([processor]))


@pytest.mark.parametrize("drafter", DRAFTERS, ids=["ngram", "clueless"])
def test_the_scores_are_those_of_generate(drafter: Any) -> None:
    settings = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.3,
        "eos_token_id": list(range(3, 12)),
        "pad_token_id": 0,
    }
    plain, drafted = both(drafter, **settings)
    assert torch.equal(plain.sequences, drafted.sequences)
    ended = (drafted.sequences[:, 7:] == 0).int()
    assert ended.any() and len(drafted.scores) == len(plain.scores) == ended.shape[1]
    for name in ("scores", "logits"):
        for step, (own, theirs) in enumerate(zip(drafted[name], plain[name], strict=True)):
            going = ended[:, step] == 0
            torch.testing.assert_close(own[going], theirs[going], rtol=1e-4, atol=1e-4)
            assert own[~going].softmax(-1)[:, 0].eq(1).all()


def test_stop_strings_end_a_row() -> None:
    loaded = tiny_model(seed=3)
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.tensor([tokenizer("the mat").input_ids])
    text = tokenizer.decode(model.generate(ids, max_new_tokens=14)[0, ids.shape[1] :])
    given = {"max_new_tokens": 14}
    stops = [text[len(text) // 2 :][:2]]
    plain = model.generate(ids, stop_strings=stops, tokenizer=tokenizer, **given)
    drafted = speculative(DRAFTERS[0], tokenizer=tokenizer, stop_strings=stops)
    assert plain.shape[1] < ids.shape[1] + 14
    assert torch.equal(plain, model.generate(ids, custom_generate=drafted, **given))
    with pytest.raises(UserError, match="stop_strings require a tokenizer"):
        speculative(DRAFTERS[0], stop_strings=stops)


@pytest.mark.parametrize(
    ("adapter", "name"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT_TUNING"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PREFIX_TUNING"),
        (LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 9]), "aLoRA"),
    ],
    ids=["prompt", "prefix", "alora"],
)
def test_an_adapter_that_acts_through_inputs_is_refused(adapter: Any, name: str) -> None:
    model: Any = get_peft_model(language_model(layers=2), adapter).eval()
    given = {"input_ids": PROMPTS[1:], "attention_mask": REAL[1:], "max_new_tokens": 3}
    with pytest.raises(UserError, match=f"does not support the adapter {name}"):
        model.generate(**given, custom_generate=speculative(DRAFTERS[0]))


def test_an_adapter_in_the_layers_is_followed() -> None:
    adapter = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model: Any = get_peft_model(language_model(layers=2, seed=3), adapter).eval()
    given = {"input_ids": PROMPTS, "attention_mask": REAL, "max_new_tokens": 9}
    plain = model.generate(**given)
    assert torch.equal(plain, model.generate(**given, custom_generate=speculative(DRAFTERS[0])))


def test_ids_of_32_bits_are_read_and_embeddings_are_refused() -> None:
    model = language_model(layers=2, seed=3)
    given = {"max_new_tokens": 5, "custom_generate": speculative(DRAFTERS[0])}
    expected = model.generate(PROMPTS[1:], max_new_tokens=5)
    assert torch.equal(model.generate(PROMPTS[1:].int(), **given).long(), expected)
    embedded = model.get_input_embeddings()(PROMPTS[1:])
    with pytest.raises(UserError, match=r"additional inputs \(inputs_embeds\)"):
        model.generate(inputs_embeds=embedded, **given)


def test_a_hybrid_family_without_recurrent_layers_is_decoded() -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
    experts = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 48}
    config = GraniteMoeHybridConfig(
        vocab_size=61, layer_types=["attention"] * 2, **size, **heads, **experts
    )
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data *= 6
    given = {"input_ids": PROMPTS[1:], "max_new_tokens": 12, "pad_token_id": 0}
    plain = model.generate(**given)
    assert torch.equal(plain, model.generate(**given, custom_generate=speculative(DRAFTERS[0])))


def test_another_engine_runs_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are those of the first call, as the documentation says."""
    from kdcore_openvino.engine import OpenVinoEngine

    bound: list[Any] = []

    def bind(engine: Any, target: Any, layers: tuple[int, ...]) -> None:
        bound.append(copy.deepcopy(target))
        engine.inner = TorchEngine()
        engine.inner.bind(bound[-1], layers)
        for name in ("start", "run", "compact", "serving"):
            setattr(engine, name, getattr(engine.inner, name))

    monkeypatch.setattr(OpenVinoEngine, "bind", bind)
    slots = property(lambda engine: engine.inner.slots if bound else 0)
    monkeypatch.setattr(OpenVinoEngine, "slots", slots)
    model = language_model(layers=2, seed=3)
    drafted = speculative(DRAFTERS[0], engine="openvino")
    given = {"input_ids": PROMPTS, "attention_mask": REAL, "max_new_tokens": 9}
    plain = model.generate(**given)
    assert torch.equal(plain, model.generate(**given, custom_generate=drafted))
    model.lm_head.weight.data.neg_()
    assert torch.equal(plain, model.generate(**given, custom_generate=drafted))
    assert len(bound) == 1


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
    cache = model(PROMPTS[1:, :3]).past_key_values
    with pytest.raises(UserError, match="filled past_key_values"):
        model.generate(
            PROMPTS[1:],
            max_new_tokens=3,
            past_key_values=cache,
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
