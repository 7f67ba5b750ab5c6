"""A broken plugin that nobody asked for is a warning; one that a spec asks for is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdcore.components.registry import Registry
from tests.cli.conftest import Kdcore
from tests.fixtures import fake_distributions as fake
from tests.kdcore.components.test_registry import BROKEN


@pytest.mark.parametrize("fault", BROKEN)
def test_a_plugin_that_does_not_load(
    kdcore: Kdcore, training: dict[str, Any], installed: Registry, site: Path, fault: str
) -> None:
    source, reason = BROKEN[fault]
    module = fake.install(site, f"broken-{sorted(BROKEN).index(fault)}", source)
    installed.load(fake.entries(site))
    who = f"plugin '{module}' of {module.replace('_', '-')} 1.0 failed to load: "

    said = kdcore("distill", "spec.yaml")
    assert said.code == 0
    (warning,) = (line for line in said.err.splitlines() if line.startswith("warning: "))
    assert who in warning
    assert reason in warning

    asked = kdcore("distill", "spec.yaml", "--overwrite", "--set", "method.gates=[half]")
    assert asked.code == 2
    cause, cure = asked.err.splitlines()
    assert cause == ("error: --set method.gates=[half]: method.gates.0: unknown gate 'half'")
    assert who in cure
    assert reason in cure


def test_a_name_that_two_distributions_claim(
    kdcore: Kdcore, training: dict[str, Any], installed: Registry, site: Path
) -> None:
    fake.install(site, "other-plugin", fake.component("speckd"))
    installed.load(fake.entries(site))
    clash = "gate 'speckd' is declared by both toys 1.0 and other-plugin 1.0"

    said = kdcore("distill", "spec.yaml", "--set", "method.gates=[]")
    assert said.code == 0
    assert clash in said.err.splitlines()[0]

    asked = kdcore("distill", "spec.yaml", "--overwrite")
    assert asked.code == 2
    cause, cure = asked.err.splitlines()
    assert cause == f"error: spec.yaml:10: method.gates.0: {clash}"
    assert cure == "  fix: uninstall one of them, or ask its author to rename it"


def test_a_component_that_cannot_be_imported(
    kdcore: Kdcore, training: dict[str, Any], installed: Registry, site: Path
) -> None:
    fake.install(site, "hollow-plugin", fake.component("hollow", build="hollow_plugin:Gate"))
    installed.load(fake.entries(site))
    said = kdcore("distill", "spec.yaml")
    assert said.code == 0
    assert "warning" not in said.err

    training["does"] = lambda run: installed.attribute(installed.component("gate", "hollow"))
    asked = kdcore("distill", "spec.yaml", "--overwrite", "--set", "method.gates=[hollow]")
    assert asked.code == 2
    assert "gate 'hollow' of hollow-plugin 1.0 cannot be imported: AttributeError" in asked.err
    assert "fix: reinstall that package" in asked.err
    assert "Traceback" not in asked.err
