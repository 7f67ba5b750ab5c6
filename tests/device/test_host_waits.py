"""How often a loop makes the host wait for the device: no more than is known, by line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kdcore.decoding.loop import Decoder, Stop
from kdcore_baselines.drafters import Nothing
from kdcore_baselines.drafting_components import DynamicParams
from kdcore_baselines.trees import Backbone, Dynamic
from kdcore_baselines.verifiers import Greedy, Sampling
from tests.device.mock_device import DEVICE, MockDevice
from tests.tiny.targets import padded, prompts, tiny, tokenizer_of
from tests.tiny.trained_drafters import unbound

DRAFTED: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "nothing": (lambda: Nothing(None, None), lambda: None),  # type: ignore[arg-type]
    "medusa": (lambda: unbound("medusa", depth=2).eval(), lambda: Backbone(3)),
    "fasteagle": (lambda: unbound("fasteagle", depth=2).eval(), lambda: Backbone(1)),
    "eagle3": (
        lambda: unbound("eagle3", depth=2).eval(),
        lambda: Dynamic(DynamicParams(beams=2, nodes=5), None),  # type: ignore[arg-type]
    ),
}
"""Drafters, each with a tree that knows its depth."""


@pytest.mark.parametrize("name", DRAFTED)
def test_a_round_of_decoding_waits_for_what_it_emits_alone(name: str, device: MockDevice) -> None:
    """Once in a while, a cache counts its slots as well: not in so few rounds."""
    target = copy.deepcopy(tiny("llama")).to(DEVICE)
    torch.manual_seed(0)
    make, tree = DRAFTED[name]
    drafter = make()
    drafter.bind(target, tokenizer_of())
    if hasattr(drafter, "tree"):
        drafter.tree = tree()
    verifier: Any = Sampling(None, None) if name == "medusa" else Greedy(None, None)  # type: ignore[arg-type]
    decoder = Decoder(target, drafter, verifier)
    ids, real = (each.to(DEVICE) for each in padded(prompts(3)))
    rounds = decoder.stream(ids, real, Stop(6, (1,)))
    next(rounds)  # the prompt's pass, too
    device.waits.found.clear()
    count = sum(1 for _ in rounds)
    waits = device.waits.ours
    assert count > 2
    assert {(wait.what, n) for wait, n in waits.items()} == {("tolist", count)}, device.waits.table(
        count
    )
