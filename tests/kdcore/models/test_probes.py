"""What a few tokens tell of a model: bidirectional ones, heads that are not what they seem."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CpmAntConfig,
    MixtralConfig,
    ReformerConfig,
    XLMConfig,
    XLNetConfig,
    XmodConfig,
)

from kdcore.data.responses.continuation import continue_prompts, pick
from kdcore.errors import UserError
from kdcore.models.anatomy import decoder_of, head_of
from kdcore.models.loading.load import load_model, load_student
from kdcore.models.loading.loaded import LoadedModel
from kdcore.models.probes import (
    body_and_head_agree,
    refuse_bidirectional,
    refuse_reluctant,
    running,
)
from kdcore.specs.distill import StudentSpec
from kdcore.specs.parts.changes import points
from kdcore.specs.parts.fields import ModelSpec
from tests.tiny.models import FAMILIES, language_model
from tests.tiny.tiny_chat_models import saved, tiny_tokenizer

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
XLNET: dict[str, Any] = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}


def in_files(config: Any, folder: Path) -> ModelSpec:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    return ModelSpec(model=str(saved(LoadedModel(model, tiny_tokenizer(), "", ""), folder)))


def test_an_encoder_is_refused_by_its_config_alone(tmp_path: Path) -> None:
    spec = in_files(BertConfig(vocab_size=290, **SIZE), tmp_path)
    for weights in (True, False):
        with pytest.raises(UserError, match="model_type bert without is_decoder"):
            load_model(spec, weights=weights)
    asked = {"model_type": "bert", **SIZE}
    teacher = LoadedModel(language_model(classes=290), tiny_tokenizer(), "", "")
    with pytest.raises(UserError, match="new bert is not a causal language model") as caught:
        load_student(StudentSpec(model="new", config=asked), teacher, weights=False)
    assert "is_decoder: true" in caught.value.cure
    load_student(StudentSpec(model="new", config=asked | {"is_decoder": True}), teacher)


def test_a_model_that_reads_later_tokens_is_refused(tmp_path: Path) -> None:
    spec = in_files(XLNetConfig(vocab_size=290, **XLNET), tmp_path)
    with pytest.raises(UserError, match="its logits depend on later tokens"):
        load_model(spec)
    teacher = LoadedModel(language_model(classes=290), tiny_tokenizer(), "", "")
    new = StudentSpec(model="new", config={"model_type": "xlnet", **XLNET})
    with pytest.raises(UserError, match="its logits depend on later tokens"):
        load_student(new, teacher)


def test_a_model_that_fails_on_plain_tokens_is_refused_with_its_reason(tmp_path: Path) -> None:
    """It wants a language, which no row names."""
    config = XmodConfig(vocab_size=290, is_decoder=True, languages=["en_XX", "de_DE"], **SIZE)
    with pytest.raises(
        UserError, match=r"XmodForCausalLM fails on these rows: Input language unknown"
    ):
        load_model(in_files(config, tmp_path))


def another_s_hook(*given: Any) -> None:
    raise ValueError("a fault of its own")


def test_a_pass_tells_what_the_model_s_own_code_raises() -> None:
    """And neither a wrong call, nor the fault of a hook, kdcore's or another's."""
    config = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 61, "prompt_types": 2}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "dim_head": 8, "dim_ff": 16}
    model = AutoModelForCausalLM.from_config(CpmAntConfig(**config, **sizes))
    rows = torch.full((1, 4), 61)
    said = "the code of CpmAntForCausalLM fails on these rows: index out"
    with pytest.raises(UserError, match=said), running(model):
        model(input_ids=rows)
    with pytest.raises(TypeError, match="positional arguments"), running(model):
        model(*[rows] * 20)
    hooked = model.get_input_embeddings().register_forward_pre_hook(another_s_hook)
    with pytest.raises(ValueError, match="of its own"), running(model):
        model(input_ids=rows)
    hooked.remove()
    model.register_forward_pre_hook(lambda *given: points({"a": None}))  # type: ignore[dict-item]
    with pytest.raises(TypeError), running(model):
        model(input_ids=rows)


@pytest.mark.parametrize("weights", [True, False])
def test_a_reformer_teaches_and_does_not_learn(tmp_path: Path, weights: bool) -> None:
    sizes = {"hidden_size": 16, "attention_head_size": 8, "num_attention_heads": 2}
    chunks = {"lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "num_buckets": 2}
    causal = {"is_decoder": True, "lsh_num_chunks_after": 0, "local_num_chunks_after": 0}
    causal |= {"axial_pos_embds": False, "hash_seed": 0, "attn_layers": ["local", "lsh"]}
    spec = in_files(ReformerConfig(vocab_size=290, **sizes, **chunks, **causal), tmp_path)
    assert load_model(spec, weights=weights).classes == 290
    with pytest.raises(UserError, match="is a Reformer, which trains only on rows whose length"):
        load_student(StudentSpec(model=spec.model), None, weights=weights)


def test_a_cache_of_a_model_s_own_is_none_of_keys_and_values() -> None:
    """XLM calls a dict of its own `cache`; its prompts are continued without a cache."""
    torch.manual_seed(0)
    sizes = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "init_std": 0.5, "embed_init_std": 0.5}
    model = AutoModelForCausalLM.from_config(XLMConfig(vocab_size=61, causal=True, **sizes)).eval()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    found = continue_prompts(
        prompts, [model], lambda logits: pick(logits[0], 0, None), ends=[], limits=[4, 4]
    )
    for prompt, made in zip(prompts, found, strict=True):
        for count, token in enumerate(made):
            read = torch.tensor([[*prompt, *made[:count]]])
            assert token == int(model(input_ids=read).logits[0, -1].argmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_encoder_reads_later_tokens_in_either_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=61, initializer_range=0.2, **SIZE)
    with pytest.raises(UserError, match="its logits depend on later tokens"):
        refuse_bidirectional(AutoModelForCausalLM.from_config(config, dtype=dtype), "an encoder")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "bert"])
def test_a_causal_model_is_not(family: str, dtype: torch.dtype) -> None:
    others: dict[str, Any] = {
        "mixtral": MixtralConfig(vocab_size=61, num_key_value_heads=2, **SIZE),
        "bert": BertConfig(vocab_size=61, is_decoder=True, **SIZE),
    }
    config = others[family] if family in others else language_model(family).config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    refuse_bidirectional(model, family)
    assert model.training


@pytest.mark.parametrize("size", [0.002, 0.02, 0.5])
@pytest.mark.parametrize("wrong", [{"scale": 1.1}, {"cap": None}, {"cap": 25.0}], ids=str)
def test_a_head_of_another_scale_or_cap_is_seen_at_every_size(
    size: float, wrong: dict[str, Any]
) -> None:
    model = language_model("gemma2")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=size)
    decoder, head = decoder_of(model), head_of(model)
    assert decoder is not None and head is not None
    assert body_and_head_agree(model, decoder, head)
    assert not body_and_head_agree(model, decoder, lambda: replace(head(), **wrong))


def test_a_model_whose_own_code_refuses_tokens_is_refused_without_weights() -> None:
    """What fails only since the meta device has no values says nothing of the model."""
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    config = XmodConfig(**sizes, num_attention_heads=2, is_decoder=True)
    told = XmodConfig(**sizes, num_attention_heads=2, is_decoder=True, default_language="en_XX")
    with torch.device("meta"):
        unsure, sure = (AutoModelForCausalLM.from_config(each) for each in (config, told))
    with pytest.raises(UserError, match=r"code of XmodForCausalLM fails .*Input language unknown"):
        refuse_reluctant(unsure)
    refuse_reluctant(sure)
    for family in FAMILIES:
        refuse_reluctant(language_model(family).to("meta"))
