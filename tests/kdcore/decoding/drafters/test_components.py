import pytest

from kdcore.components.construction import protocols_of
from kdcore.components.registry import installed
from tests.tiny.targets import Loads, tiny

PARAMS = {"model": {"model": "a small model"}, "self_speculative": {"layers": 1}}
DECODING = [
    c for c, _ in installed().components() if c.kind in ("drafter", "tree", "verifier", "engine")
]


@pytest.mark.parametrize("component", DECODING, ids=lambda c: f"{c.kind} {c.name}")
def test_a_declared_component_builds_and_fits_its_protocol(component) -> None:
    params = component.params(**PARAMS.get(component.name, {}))
    built = installed().attribute(component)(params, Loads(tiny("llama")))
    assert isinstance(built, protocols_of(component.kind))


def test_the_baselines_are_declared() -> None:
    names = {kind: installed().names(kind) for kind in ("drafter", "tree", "verifier", "engine")}
    assert set(names["drafter"]) >= {"model", "ngram", "nothing"}
    assert set(names["tree"]) >= {"backbone", "chain"}
    assert set(names["verifier"]) >= {"chain_sampling", "greedy", "sampling", "typical"}
    assert set(names["engine"]) >= {"torch"}
