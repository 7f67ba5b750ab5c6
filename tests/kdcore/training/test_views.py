"""Whose head may be taken off, and what gives its logits then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
)
from transformers.models.hyperclovax import HyperCLOVAXConfig, HyperCLOVAXForCausalLM

from kdcore.errors import UserError
from kdcore.method.records import Batch
from kdcore.models.anatomy import head_of
from kdcore.training.model_view import ModelView
from kdcore.training.views import DrafterView
from tests.tiny.targets import CLASSES, SIZE, prompts, tiny
from tests.tiny.trained_drafters import anchored, bound

DRAFTER: Any = SimpleNamespace(layers=(1,))


def multiplying(device: str = "cpu") -> Any:
    """A target whose config has a scale by which it multiplies, where others divide."""
    torch.manual_seed(0)
    config = HyperCLOVAXConfig(**SIZE, logits_scaling=0.125)
    with torch.device(device):
        return HyperCLOVAXForCausalLM(config).eval()


def test_scale_and_cap_are_those_of_the_text_in_a_model_of_several_inputs() -> None:
    text = SimpleNamespace(logits_scaling=4.0, logit_scale=2.0, final_logit_softcapping=30.0)
    linear = torch.nn.Linear(3, 5)
    config = SimpleNamespace(get_text_config=lambda: text)
    head = head_of(SimpleNamespace(config=config, get_output_embeddings=lambda: linear))
    assert head is not None
    assert (head().scale, head().cap) == (0.5, 30.0)


def test_a_target_whose_logits_are_not_its_heads_teaches_no_drafter() -> None:
    refused = "the logits of HyperCLOVAXForCausalLM differ from the output of its head"
    with pytest.raises(UserError, match=refused):
        DrafterView(multiplying(), DRAFTER)
    DrafterView(multiplying("meta"), DRAFTER)  # which has nothing to try it with


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_target_whose_logits_are_its_heads_does(family: str) -> None:
    target = tiny(family)
    assert DrafterView(target, DRAFTER).head().weight.shape == (CLASSES, 32)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(target.config)
    DrafterView(outline, DRAFTER)


def test_a_model_that_calls_a_part_of_its_head_its_decoder_gives_whole_logits() -> None:
    torch.manual_seed(0)
    ends = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), 0)
    size: dict[str, Any] = {**SIZE, **ends, "local_attention": 8}
    del size["num_key_value_heads"]
    config = ModernBertDecoderConfig(**size, cls_token_id=0, sep_token_id=0)
    model = ModernBertDecoderForCausalLM(config).eval()
    view = ModelView(model, CLASSES)
    assert not view.takes_the_head_off
    tokens = torch.arange(6)[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    batch = Batch(inputs, tokens, torch.ones_like(tokens).bool(), torch.zeros(1))
    found = view(model, batch)
    logits = found.logits(slice(None))
    torch.testing.assert_close(logits, model(**inputs).logits[0])


def test_the_target_s_logits_of_a_position_are_computed_once_in_a_chunk() -> None:
    target = tiny("llama")
    drafter = bound("medusa", target, depth=4)
    batch = anchored(prompts(2), drafter)
    with torch.no_grad():
        _, logits = DrafterView(target, drafter)(drafter, batch)
        whole = target(**batch.inputs).logits.flatten(0, 1)
    positions, chunk = batch.positions, 12
    read = whole[positions // 4 + positions % 4 + 1]
    computed = 0
    for start in range(0, len(positions), chunk):
        part = slice(start, start + chunk)
        with Products() as products:
            torch.testing.assert_close(logits.logits(part), read[part])
        computed += products.rows
    assert computed < len(positions) / 1.5
    assert logits.features is not None
    assert len(logits.features) == len(positions)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda hidden: hidden[:, :, 0], "shape [2, 16, 32]"),
        (lambda hidden: hidden[:, :, :3], "shape [2, 16, 3, 32]"),
        (lambda hidden: hidden[..., 1:], "shape [2, 16, 4, 31]"),
        (lambda hidden: (hidden,), "type tuple"),
    ],
)
def test_a_drafter_whose_hidden_states_have_another_shape_is_named(wrong: Any, got: str) -> None:
    """Levels or anchors that are taken for others would fail far away, or train without a word."""
    target = tiny("llama")
    drafter = bound("medusa", target, depth=4)
    batch = anchored(prompts(2), drafter)
    rows, length = batch.inputs["input_ids"].shape
    with pytest.raises(UserError) as refused:
        DrafterView(target, drafter)(lambda *given: wrong(drafter(*given)), batch)
    got = got.replace("[2, 16", f"[{rows}, {length}")
    assert refused.value.cause == (
        f"the drafter {type(drafter).__name__} returned hidden states of {got}, expected a tensor "
        f"of shape [{rows}, {length}, 4, 32]"
    )


class Products(TorchDispatchMode):
    """The rows that a head multiplies."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.rows += len(args[0])
        return func(*args, **(kwargs or {}))
