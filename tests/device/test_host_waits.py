"""How often a loop makes the host wait for the device: no more than is known, by line."""

from __future__ import annotations

import copy

import torch

from kdcore.decoding.loop import Decoder, Stop
from kdcore_baselines.trees import Backbone
from kdcore_baselines.verifiers import Greedy
from tests.device.mock_device import DEVICE, MockDevice
from tests.tiny.targets import padded, prompts, tiny, tokenizer_of
from tests.tiny.trained_drafters import unbound

ROUND = 6
"""Waits of a round at most: what it emits, the walk down a chain of which little is accepted, where
the session ends, whether slots move, and what is appended."""


def test_a_round_of_decoding_waits_as_often_as_is_known(device: MockDevice) -> None:
    target = copy.deepcopy(tiny("llama")).to(DEVICE)
    torch.manual_seed(0)
    drafter = unbound("medusa", depth=2).eval()
    drafter.bind(target, tokenizer_of())
    drafter.tree = Backbone(1)
    decoder = Decoder(target, drafter, Greedy(None, None))  # type: ignore[arg-type]
    ids, real = (each.to(DEVICE) for each in padded(prompts(1)))
    rounds = decoder.stream(ids, real, Stop(9, (1,)))
    next(rounds)  # the prompt's pass, too
    device.waits.found.clear()
    count = sum(1 for _ in rounds)
    waits = device.waits.ours
    assert count > 3
    assert waits.total() / count <= ROUND, device.waits.table(count)
    emitting = [
        wait for wait in waits if "decoding/loop.py" in wait.where and wait.what != "nonzero"
    ]
    assert [(wait.what, waits[wait]) for wait in emitting] == [("tolist", count)]
