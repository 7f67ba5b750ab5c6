"""Each installed component on an accelerator: as on the CPU, and the host hardly waits for it.

A plugin that is installed beside kdcore is walked through as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdcore.components.registry import installed
from kdcore.decoding.tree import DraftTree
from kdcore.method.records import LogitBatch, Part, SampledTokens
from kdcore.models.matching.layers import LayerAttention, PassLayers, Queries, reads_attention
from kdcore.testing import suite_of
from kdcore.testing.decoding.tree import levels
from kdcore.testing.decoding.verifier import CLASSES, ROOT, branching, sampled_chains
from kdcore.testing.method import advantage as advantages
from kdcore.testing.method import gate as gates
from kdcore.testing.method import matcher as matchers
from kdcore.testing.method import momentum as momenta
from kdcore.testing.method.batches import example
from tests.device.mock_device import DEVICE, MockDevice, on_cpu
from tests.plugins.test_conformance import MEMBERS

WIDE = 96
"""Classes of a batch: more than a divergence that ranks them looks at first."""
PART = "kd"


def chosen(kinds: Collection[str]) -> Iterator[Any]:
    """A suite for each installed component of some kinds, and for each of its variants."""
    more = [{"params": {"merge": merge}} for merge in ("product", "rest")]
    members = MEMBERS | {
        ("splitter", "uld"): [{}, *more],
        ("splitter", "gold"): [{}, {"params": {"merge": "none", "adaptive": False}}],
    }
    for component, _ in installed().components():
        for number, own in enumerate(members.get((component.kind, component.name), [{}])):
            if component.kind in kinds:
                name = f"{component.kind}-{component.name}-{number}"
                yield pytest.param(suite_of(component, **own)(), id=name)


def there(value: Any) -> Any:
    """The value with its tensors on the device, and a generator of the device."""
    if isinstance(value, Tensor):
        return value.detach().to(DEVICE).requires_grad_(value.requires_grad)
    if isinstance(value, torch.Generator):
        return torch.Generator(DEVICE).manual_seed(0)
    if is_dataclass(value):
        moved = {field.name: there(getattr(value, field.name)) for field in fields(value)}
        return replace(value, **moved)  # type: ignore[type-var]
    if isinstance(value, dict):
        return {name: there(each) for name, each in value.items()}
    return [there(each) for each in value] if isinstance(value, list) else value


def batch() -> LogitBatch:
    """One row, as the loss engine gives it, with spans of several tokens."""
    made = example(rows=1, positions=8, classes=WIDE)
    span = torch.tensor([[3, 3, 4, 4, 4, 6, 8, 8]])
    rest = -torch.rand(1, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    return replace(made, span=span, teacher_rest=rest, generator=generator)


def of_gate(gate: Any, given: LogitBatch) -> list[Tensor]:
    scores, weights = gates.passes(gate)
    with torch.no_grad():
        found = scores(given)
        return [found, weights(found.flatten())]


def of_splitter(splitter: Any, given: LogitBatch) -> list[Tensor]:
    whole = Part(given.student, given.teacher, torch.ones_like(given.student[..., 0]))
    parts = splitter({PART: whole}, given)
    return [each for name in sorted(parts) for each in (*parts[name].compared, parts[name].weight)]


def of_divergence(divergence: Any, given: LogitBatch) -> list[Tensor]:
    found = divergence(given.student.log_softmax(-1), given.teacher.log_softmax(-1))
    return [found, *torch.autograd.grad(found.sum(), given.student)]


def of_advantage(advantage: Any, given: SampledTokens) -> list[Tensor]:
    return [advantage(given)]


def of_matcher(matcher: Any, given: list[Any]) -> list[Tensor]:
    ours, theirs = given[reads_attention(matcher)]
    return [matcher([ours[i] for i, _ in matcher.pairs], [theirs[j] for _, j in matcher.pairs])]


def compared() -> list[Any]:
    suite = matchers.MatcherSuite()
    return [list(suite.states()), list(suite.maps())]


def of_momentum(policy: Any, given: list[Any]) -> list[Tensor]:
    (gradients, weights), streams = given, policy.streams(("task", "target", "non_target"))
    summed = {
        stream: [torch.stack(same).sum(0) for same in zip(*map(gradients.get, own), strict=True)]
        for stream, own in streams.items()
    }
    return list(policy.combine(summed, weights))


def of_tree(tree: Any, given: list[Tensor]) -> list[Tensor]:
    logp, active = given
    built = tree(logp, active)
    return [built.tokens, built.mask, built.shape.parents, built.shape.sees]


def of_verifier(verifier: Any, given: list[Any]) -> list[Tensor]:
    tree, table, generator = given
    if tree.shape.parents.shape[1] != tree.shape.levels and getattr(verifier, "chain", False):
        return []
    last = torch.cat([torch.full_like(tree.tokens[:, :1], ROOT), tree.tokens], dim=1)
    verdict = verifier(tree, lambda slots: table[last.gather(1, slots)], generator)
    beyond = tree.tokens.shape[1] - verdict.path.shape[1]  # a walk on the CPU ends early
    return [nn.functional.pad(verdict.path, (0, beyond), value=-1), verdict.token]


def drafted(make: Callable[[int], DraftTree]) -> list[Any]:
    table = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(2))
    return [make(6), table.log_softmax(-1), torch.Generator().manual_seed(0)]


KINDS: dict[str, tuple[Callable[[Any, Any], list[Tensor]], Callable[[], list[Any]], int]] = {
    "gate": (of_gate, lambda: [batch()], 0),
    "splitter": (of_splitter, lambda: [batch()], 0),
    "divergence": (of_divergence, lambda: [batch()], 0),
    "advantage": (of_advantage, lambda: [advantages.example()], 0),
    "matcher": (of_matcher, lambda: [compared()], 0),
    # what it clips by
    "momentum": (
        of_momentum,
        lambda: [[momenta.gradients(("task", "target", "non_target"), 0), momenta.parameters()]],
        1,
    ),
    # a search for the best nodes runs on the host
    "tree": (of_tree, lambda: [[levels(depth=3), torch.tensor([True, False, True, True])]], 1),
    "verifier": (of_verifier, lambda: [drafted(branching), drafted(sampled_chains)], 0),
}
"""Kind -> what a component of it computes, from what, and how often the host may wait for it."""


@pytest.mark.parametrize("suite", list(chosen(KINDS)))
def test_a_component_computes_the_same_and_the_host_hardly_waits(
    device: MockDevice, suite: Any
) -> None:
    use, given, waits = KINDS[suite.kind]
    here, moved = suite.component(), suite.component()
    if isinstance(moved, nn.Module):
        moved.to(DEVICE)
    for value, again in zip(given(), given(), strict=True):
        on_device = there(again)
        expected, found = use(here, value), use(moved, on_device)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(on_cpu(other.detach()), one.detach(), rtol=1e-5, atol=1e-6)
        device.waits.found.clear()  # it may look at a shape once
        use(moved, on_device)
        assert device.waits.found.total() <= waits, device.waits.table()


def test_maps_are_compared_without_waiting(device: MockDevice) -> None:
    """Those of a language model, and those of whole rows."""
    matcher = suite_of(installed().component("matcher", "attention"))().component()
    query, key = there(torch.randn(2, 3, 2, 6, 4))
    layer = LayerAttention(query.requires_grad_(), key, None, True, 0.5)
    places, rows = there(torch.arange(6).repeat(3)), there(torch.arange(3))
    for queries, count in ((Queries((6,) * 3, places), 18), (Queries((6,) * 3, places, rows), 3)):
        maps = PassLayers({}, queries, dict.fromkeys((matcher.pairs[0]), layer))
        weights = torch.ones(count, device=DEVICE)
        device.waits.found.clear()
        maps.distance(matcher, maps, weights, 4).backward()
        assert device.waits.found.total() == 0, device.waits.table()
