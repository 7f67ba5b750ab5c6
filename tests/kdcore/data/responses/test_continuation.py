"""The loop gives what transformers' own gives, row by row, while the batch shrinks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    MambaConfig,
    OpenAIGPTConfig,
    RwkvConfig,
)

from kdcore.data.responses.continuation import continue_prompts, pick
from kdcore.errors import UserError
from tests.tiny.models import FAMILIES, language_model

END = 2
ENDS = [END, *range(3, 61, 6)]
"""So many that rows end at many lengths."""
PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [15, 16, 17, 18, 19], [20, 21], [30, 31]]


def greedy(logits: list[torch.Tensor]) -> torch.Tensor:
    return pick(logits[0], 0.0, None)


def transformers_own(model: Any, ends: list[int], longest: int) -> list[list[int]]:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    config = GenerationConfig(
        max_new_tokens=longest, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    out = model.generate(input_ids=ids, attention_mask=real, generation_config=config)
    rows = out[:, width:].tolist()
    stops = [next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in rows]
    return [row[:stop] for row, stop in zip(rows, stops, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_transformers_generates(family: str) -> None:
    model = language_model(family, seed=4)
    made = continue_prompts(PROMPTS, [model], greedy, ends=ENDS, limits=[20] * len(PROMPTS))
    assert made == transformers_own(model, ENDS, 20)
    assert len({len(row) for row in made}) > 1  # the test sees rows leave


def test_a_model_that_wears_adapters_is_read_with_them() -> None:
    model = language_model(seed=4)
    plain = continue_prompts(PROMPTS, [model], greedy, ends=ENDS, limits=[20] * len(PROMPTS))
    adapted: Any = get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    made = continue_prompts(PROMPTS, [adapted], greedy, ends=ENDS, limits=[20] * len(PROMPTS))
    assert made == transformers_own(adapted, ENDS, 20) != plain


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, initializer_range=0.5),
        OpenAIGPTConfig(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4),
        RwkvConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_without_keys_and_values_to_cache_reads_all_tokens(config: Any) -> None:
    """Mamba and RWKV take another cache than the one that is given, or none at all."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    right = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + 5:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        right.append(ids[len(prompt) :])
    assert continue_prompts(PROMPTS, [model], greedy, ends=[], limits=[5] * len(PROMPTS)) == right


def test_each_row_has_a_limit_of_its_own() -> None:
    model = language_model(seed=4)
    whole = continue_prompts(PROMPTS, [model], greedy, ends=[END], limits=[9] * len(PROMPTS))
    limits = [1, 9, 3, 2, 9, 5]
    made = continue_prompts(PROMPTS, [model], greedy, ends=[END], limits=limits)
    assert made == [row[:limit] for row, limit in zip(whole, limits, strict=True)]


def test_a_row_that_has_ended_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    model = language_model(seed=4)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    kept: list[int] = []
    real = DynamicCache.reorder_cache
    monkeypatch.setattr(
        DynamicCache, "reorder_cache",
        lambda cache, rows: (real(cache, rows), kept.append(len(cache.layers[0].keys)))[0],
    )  # fmt: skip
    continue_prompts(PROMPTS[:3], [model], greedy, ends=[END], limits=[1, 4, 2])
    assert sizes == [3, 2, 1, 1]
    assert kept == [2, 1]


def test_all_models_read_what_was_chosen() -> None:
    """Each model's logits are those it would give to the rows so far, without a cache."""
    first, second = language_model(seed=4), language_model("qwen2", seed=5)
    seen: list[list[torch.Tensor]] = []

    def choose(logits: list[torch.Tensor]) -> torch.Tensor:
        seen.append(logits)
        return (logits[0] + logits[1]).argmax(-1)

    made = continue_prompts(PROMPTS, [first, second], choose, ends=[END], limits=[6] * 6)
    for step, logits in enumerate(seen):
        going = [i for i, row in enumerate(made) if len(row) > step]
        for place, row in enumerate(going):
            ids = torch.tensor([PROMPTS[row] + made[row][:step]])
            for model, found in zip((first, second), logits, strict=True):
                with torch.no_grad():
                    alone = model(input_ids=ids).logits[0, -1]
                torch.testing.assert_close(found[place], alone, rtol=1e-4, atol=1e-5)


def test_what_is_picked_follows_the_softmax_at_the_temperature() -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0)) * 2
    drawn = pick(logits.expand(20_000, -1), 1.7, torch.Generator().manual_seed(1))
    seen = torch.bincount(drawn, minlength=20) / len(drawn)
    expected = (logits / 1.7).softmax(-1)
    assert float((seen - expected).abs().sum()) < 4 * (20 / len(drawn)) ** 0.5
    assert int(pick(logits[None], 0.0, None)) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_logits_are_not_finite_is_refused(temperature: float) -> None:
    sound, broken = language_model(seed=4), copy.deepcopy(language_model(seed=4))
    broken.model.embed_tokens.weight.data[15] = torch.nan  # which one prompt contains
    for models in ([broken], [sound, broken]):
        with pytest.raises(UserError, match=r"logits of \w+ contain NaN or infinite"):
            continue_prompts(
                PROMPTS,
                models,
                lambda logits: pick(logits[-1], temperature, None),
                ends=ENDS,
                limits=[2] * len(PROMPTS),
            )
