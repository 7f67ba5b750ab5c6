"""The versions of other packages that kdcore supports: lower bounds, and room for the engines."""

from __future__ import annotations

import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SUPPORTED = [
    Requirement(text) for text in PROJECT["dependencies"] + EXTRAS["endpoint"] + EXTRAS["images"]
]
ENGINES = {
    "vllm 0.32": {"torch": "2.13.0", "transformers": "5.19.0", "tokenizers": "0.23.2"},
    "vllm 0.33": {"torch": "2.14.0", "transformers": "5.20.2", "tokenizers": "0.23.2"},
    "sglang 0.5.23": {"torch": "2.14.1", "transformers": "5.19.0", "tokenizers": "0.23.2"},
}
"""What an engine pins, or the newest version that it admits, of the packages that it bounds."""


def oldest_pins() -> dict[str, Version]:
    """The exact versions in requirements-oldest.lock."""
    lines = (ROOT / "requirements-oldest.lock").read_text().splitlines()
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): Version(number) for name, number in pins}


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = requirement.specifier
    assert bound.operator == ">=", f"{requirement} must have a lower bound and nothing else"
    return Version(bound.version)


def test_the_oldest_lock_pins_the_lower_bounds() -> None:
    bounds = {canonicalize_name(each.name): lower_bound(each) for each in SUPPORTED}
    pins = oldest_pins()
    assert pins.keys() == bounds.keys()
    assert pins.pop("torch") >= bounds.pop("torch")  # the lock says why it is not equal
    assert pins == bounds


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engines_environment_needs_no_change(engine: str) -> None:
    supported = {canonicalize_name(each.name): each.specifier for each in SUPPORTED}
    for name, number in ENGINES[engine].items():
        assert number in supported[name], f"{engine} has {name} {number}"


def test_what_is_installed_meets_every_requirement() -> None:
    """Of kdcore, and of all that it requires in turn."""
    waiting, seen = list(SUPPORTED), set()
    while waiting:
        requirement = waiting.pop()
        assert version(requirement.name) in requirement.specifier, requirement
        if (key := str(requirement)) not in seen:
            seen.add(key)
            inner = map(Requirement, requires(requirement.name) or [])
            extras = requirement.extras or {""}
            waiting += [
                each
                for each in inner
                if not each.marker or any(each.marker.evaluate({"extra": e}) for e in extras)
            ]
    assert len(seen) > len(SUPPORTED)
