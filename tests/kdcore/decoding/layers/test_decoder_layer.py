"""The sizes of a drafter's layer, of targets that name theirs in their own ways."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedConfig

from kdcore.decoding.layers.decoder_layer import LayerSize
from kdcore.decoding.loop import Decoder
from kdcore.errors import UserError
from kdcore_baselines.verifiers import Greedy
from tests.tiny.targets import config_of, tiny
from tests.tiny.trained_drafters import bound

ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def size_of(config: PreTrainedConfig) -> LayerSize:
    model: Any = SimpleNamespace(config=config)
    return LayerSize.of(model)


def test_it_is_as_large_as_the_targets_layers() -> None:
    assert size_of(tiny("llama").config) == LayerSize(32, 48, 4, 2, 8, 1e-6, 10000.0)


@pytest.mark.parametrize(
    ("changes", "feed_forward", "heads"),
    [
        ({"intermediate_size": [48, 64, 48]}, 128, 4),  # a size of its own for each layer
        ({"num_attention_heads": None, "num_key_value_heads": None, "head_dim": None}, 48, 1),
        ({"rope_parameters": {"full_attention": None}}, 48, 4),
    ],
)
def test_what_the_layers_do_not_share_is_of_the_usual_size(
    changes: dict[str, Any], feed_forward: int, heads: int
) -> None:
    config = config_of("llama")
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    size = size_of(config)
    assert (size.feed_forward, size.heads, size.theta) == (feed_forward, heads, 10000.0)


def test_sizes_that_transformers_does_not_name_for_all_layers_are_the_usual() -> None:
    config = config_of("llama", per_layer_config={1: {"head_dim": 16}})
    with pytest.raises(RuntimeError, match="per-layer"):
        _ = config.head_dim
    assert size_of(config).head == 32 // 4


def test_a_target_without_heads_is_refused_by_what_it_cannot_do() -> None:
    config = MambaConfig(vocab_size=61, hidden_size=32, state_size=8, num_hidden_layers=3, **ENDS)
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config).eval()
    drafter = bound("fasteagle", target, depth=2)
    with pytest.raises(UserError, match="whose state cannot follow a draft tree"):
        Decoder(target, drafter, Greedy(None, None))
