"""Models that go by slots where the mask and the positions should count are found and refused."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from kdcore.decoding.loop import Decoder
from kdcore.decoding.trials.tree_probe import refuse_unfaithful
from kdcore.errors import UserError
from kdcore_baselines.drafters.untrained import Nothing
from kdcore_baselines.verifiers import Greedy
from tests.tiny.targets import FAMILIES, tiny

ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
CONFIGS = {
    "mpt": MptConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, **ENDS),
    "bloom": BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4, **ENDS),
    "gpt_neo": GPTNeoConfig(
        vocab_size=61,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        **ENDS,
    ),
    "gpt_neo of global layers": GPTNeoConfig(
        vocab_size=61,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global"], 2]],
        **ENDS,
    ),
    "opt": OPTConfig(
        vocab_size=61,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        **ENDS,
    ),
}


def made(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "what"),
    [
        (
            "mpt",
            "MptForCausalLM gives different logits for a draft tree",
        ),  # distances between slots
        (
            "gpt_neo",
            "GPTNeoForCausalLM gives different logits for a draft tree",
        ),  # a window of slots
        ("bloom", "BloomForCausalLM cannot run a draft tree: ValueError"),  # asks for a 2D mask
    ],
)
def test_a_model_that_goes_by_slots_is_refused(family: str, what: str, dtype: torch.dtype) -> None:
    model = made(CONFIGS[family], dtype)
    for _ in range(2):
        with pytest.raises(UserError, match=what) as refused:
            Decoder(model, Nothing(None, None), Greedy(None, None))
        assert "transformers' generate" in refused.value.cure


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["opt", "gpt_neo of global layers"])
def test_a_model_that_goes_by_the_mask_is_taken(family: str, dtype: torch.dtype) -> None:
    refuse_unfaithful(made(CONFIGS[family], dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_no_reason_to_refuse(family: str) -> None:
    refuse_unfaithful(made(tiny(family).config, torch.bfloat16))


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_is_no_reason_to_refuse_nor_a_proof_without_it(family: str) -> None:
    model, passes = made(tiny(family).config), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refuse_unfaithful(model)
    model.register_forward_hook(lambda *_: passes.append(1))
    refuse_unfaithful(model)
    assert passes


def test_a_model_is_tried_once() -> None:
    model, passes = made(CONFIGS["opt"]), []
    model.register_forward_hook(lambda *_: passes.append(1))
    refuse_unfaithful(model)
    tried = len(passes)
    refuse_unfaithful(model)
    assert tried and len(passes) == tried


def test_a_context_without_room_for_a_trial_is_not_tried() -> None:
    refuse_unfaithful(tiny("llama", max_position_embeddings=4))
