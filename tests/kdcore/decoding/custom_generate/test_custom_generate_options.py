"""Options of ``generate`` on the nodes of a draft tree, and adapters of the model."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    CPTConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    WatermarkingConfig,
)

from kdcore.decoding.custom_generate import speculative
from kdcore.decoding.engines.torch_engine import TorchEngine
from kdcore.errors import UserError
from tests.kdcore.decoding.custom_generate.test_custom_generate import DRAFTERS, PROMPTS, REAL, both
from tests.tiny.models import language_model
from tests.tiny.tiny_chat_models import tiny_model


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
    "min_new_tokens", "min_length", "prompt's tokens", "prompt's ngrams", "ngrams", "bad words",
    "bias", "prefix by row", "grammar", "decay", "forced end", "watermark",
    "repetition with padding", "repetition without the prompt", "own processor",
]  # fmt: skip


@pytest.mark.parametrize("drafter", DRAFTERS, ids=["ngram", "clueless"])
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"eos_token_id": list(range(3, 20)), "pad_token_id": 0, "min_new_tokens": 9},
        {"eos_token_id": list(range(3, 20)), "pad_token_id": 0, "min_length": 12},
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 2},
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
    ids=["repetition", *OPTIONS],
)
def test_an_option_is_followed(drafter: Any, settings: dict[str, Any]) -> None:
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
        (
            PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
            "P_TUNING",
        ),
        (
            CPTConfig(
                task_type="CAUSAL_LM",
                cpt_token_ids=[1, 2],
                cpt_mask=[1, 1],
                cpt_tokens_type_mask=[1, 2],
            ),
            "CPT",
        ),
        (LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 9]), "aLoRA"),
    ],
    ids=["prompt", "prefix", "p-tuning", "cpt", "alora"],
)
def test_an_adapter_that_acts_through_inputs_is_refused(adapter: Any, name: str) -> None:
    model: Any = get_peft_model(language_model(layers=2), adapter).eval()
    given = {"input_ids": PROMPTS[1:], "attention_mask": REAL[1:], "max_new_tokens": 3}
    with pytest.raises(UserError, match=f"does not support the adapter {name}"):
        model.generate(**given, custom_generate=speculative(DRAFTERS[0]))


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False),
        AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_layers=2, adapter_len=4),
    ],
    ids=["lora", "adaption prompt"],
)
def test_an_adapter_in_the_layers_is_followed(adapter: Any) -> None:
    model: Any = get_peft_model(language_model(layers=2, seed=3), adapter).eval()
    for name, weight in model.named_parameters():
        if name.endswith("adaption_gate"):  # 0 in the beginning, without an effect
            weight.data.fill_(8.0)
    given = {"input_ids": PROMPTS, "attention_mask": REAL, "max_new_tokens": 9}
    plain = model.generate(**given)
    with model.disable_adapter():
        assert not torch.equal(plain, model.generate(**given))
    for drafter in DRAFTERS:
        assert torch.equal(plain, model.generate(**given, custom_generate=speculative(drafter)))


def test_adapters_of_single_rows_are_refused() -> None:
    """The hooks of peft expect all rows, and the trial of a model runs one."""
    adapter = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model: Any = get_peft_model(language_model(layers=2, seed=3), adapter).eval()
    given = {"input_ids": PROMPTS, "attention_mask": REAL, "max_new_tokens": 3}
    with pytest.raises(UserError, match="does not support peft's adapter_names"):
        model.generate(
            **given,
            adapter_names=["default", "__base__"],
            custom_generate=speculative(DRAFTERS[0]),
        )


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
        engine.verifying = nullcontext

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
