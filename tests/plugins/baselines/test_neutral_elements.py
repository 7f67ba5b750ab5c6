"""What stands where a method could: it changes nothing."""

from __future__ import annotations

import torch

from kdcore.method.records import Part
from tests.plugins.logit_batches import build, random_batch


def test_the_splitter_none_leaves_the_knowledge_whole() -> None:
    splitter, batch = build("splitter", "none"), random_batch(1)
    part = Part(batch.student, batch.teacher, torch.ones(2, 5))
    assert splitter.parts(("kd",)) == ("kd",)
    assert splitter({"kd": part}, batch) == {"kd": part}


def test_shared_momentum_hands_the_one_gradient_on() -> None:
    policy = build("momentum", "shared")
    assert not policy.owns_momentum
    streams = policy.streams(("task", "kd"))
    assert streams == {"all": ("task", "kd")}
    gradients = [torch.ones(2), torch.zeros(3, 3)]
    parameters = [torch.full((2,), 5.0), torch.full((3, 3), 5.0)]
    combined = policy.combine(dict.fromkeys(streams, gradients), parameters)
    assert all(a is b for a, b in zip(combined, gradients, strict=True))
    assert policy.state_dict() == {}
    policy.load_state_dict({})
