"""The conformance kit catches each planted fault by the check meant for it, and no other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.components.registry import Registry
from kdcore.method.records import LogitBatch
from kdcore.testing import Suite, suite_of
from kdcore.testing.method.batches import kl_of, whole
from tests.kdcore.testing import planted, planted_heavy
from tests.kdcore.testing.components import SoundMomentum, confidence

REGISTRY = Registry()
REGISTRY.register(planted, "planted", "kdcore-tests", "1")
REGISTRY.register(planted_heavy, "heavy", "kdcore-tests", "1")


def weights(batch: LogitBatch) -> Tensor:
    return confidence(batch.teacher)


def losses(batch: LogitBatch) -> dict[str, Tensor]:
    loss, sure = kl_of(whole(batch)), confidence(batch.teacher)
    return {"kd_sure": sure * loss, "kd_unsure": (1 - sure) * loss}


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)


def heavy_balls(
    steps: Sequence[Mapping[str, Sequence[Tensor]]], parameters: Sequence[Tensor]
) -> list[list[Tensor]]:
    """Each update written out as the sum over all past gradients."""
    return [
        [
            sum(
                momentum ** (now - then) * steps[then][term][i]
                for term, momentum in SoundMomentum.momenta.items()
                for then in range(now + 1)
            )
            for i in range(len(parameters))
        ]
        for now in range(len(steps))
    ]


REFERENCES: dict[str, Callable[..., Any]] = {
    "gate": weights,
    "splitter": losses,
    "divergence": forward_kl,
    "momentum": heavy_balls,
}


def failing(suite: type[Suite]) -> dict[str, str]:
    """Run every check of a suite; those that fail, and what they say."""
    failed = {}
    for check in dir(suite):
        if check.startswith("test_"):
            try:
                getattr(suite(), check)()
            except Exception as fault:
                failed[check] = f"{type(fault).__name__}: {fault}"
    return failed


def suite(kind: str, name: str, reference: Callable[..., Any] | None) -> type[Suite]:
    members: dict[str, Any] = {"registry": REGISTRY}
    if reference is not None:
        members["test_it_agrees_with_its_reference"] = lambda self: self.agrees_with(reference)
    return suite_of(REGISTRY.component(kind, name), **members)


@pytest.mark.parametrize("fault", planted.FAULTS, ids=lambda fault: f"{fault.kind}-{fault.name}")
def test_a_fault_fails_the_check_meant_for_it_and_no_other(fault: planted.Fault) -> None:
    reference = REFERENCES[fault.kind] if fault.reference else None
    failed = failing(suite(fault.kind, fault.name, reference))
    assert sorted(failed) == sorted(fault.checks), failed


@pytest.mark.parametrize("name", ["undescribed", "thawed"])
def test_a_bad_declaration_is_caught(name: str) -> None:
    assert sorted(failing(suite("gate", name, None))) == [
        "test_declaring_it_imports_no_torch",
        "test_its_params_are_frozen_and_described",
    ]


@pytest.mark.parametrize("name", planted.SOUND)
def test_a_sound_component_passes_whole(name: str) -> None:
    kind = planted.SOUND[name]
    reference = REFERENCES.get(kind) if name in ("sound_splitter", "sound_divergence") else None
    assert failing(suite(kind, name, reference)) == {}
