"""What stands where a method could: it changes nothing. And: declaring costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kdcore.method.hookspecs import Component
from kdcore.method.records import Part
from kdcore_baselines import plugin as baselines
from kdcore_speckd import plugin as speckd
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


@pytest.mark.parametrize("package", ["kdcore_speckd", "kdcore_baselines"])
def test_declaring_imports_no_torch(package: str) -> None:
    code = f"import sys, {package}.plugin as p; list(p.kdcore_components()); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "component",
    [*speckd.kdcore_components(), *baselines.kdcore_components()],
    ids=lambda component: f"{component.kind}-{component.name}",
)
def test_every_parameter_is_described(component: Component) -> None:
    for name, field in component.params.model_fields.items():
        assert field.description, name
    assert component.summary and component.source
