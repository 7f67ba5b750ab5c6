"""What a broken plugin does to the others (nothing), and what is said of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcore.components.registry import Registry, installed
from kdcore.errors import UserError
from tests.fixtures import fake_distributions as fake
from tests.fixtures.fake_distributions import component, install
from tests.tiny.toy_components import registry as toys


@pytest.fixture
def fresh(site: Path) -> Iterator[None]:
    """What is installed is read anew."""
    installed.cache_clear()
    yield
    installed.cache_clear()


BROKEN = {
    "import error": (
        fake.IMPORT_ERROR,
        "ModuleNotFoundError: No module named 'a_library_that_is_not_there'",
    ),
    "exits": (fake.EXITS, "SystemExit: 3"),
    "raises in the hook": (fake.RAISES, "RuntimeError: no licence found"),
    "not a Component": (
        fake.NO_COMPONENT,
        "TypeError: kdcore_components returned 'speckd', which is not a Component",
    ),
    "no hook": (
        fake.NO_HOOK,
        "ValueError: it implements no hooks; mark its functions with @hookimpl",
    ),
    "unknown hook": (fake.MISSPELT_HOOK, "unknown hook 'kdcore_component' in plugin"),
    "unknown argument of a hook": (fake.WRONG_ARGUMENT, "{'application'} are declared in the"),
    "unknown kind": (component("x", kind="gat"), "ValueError: unknown kind 'gat'; did you mean"),
    "bad name": (component("X-1"), "ValueError: 'X-1' is not a valid name"),
    "bad build": (component("x", build="a.b.C"), "must have the form 'module:attribute'"),
    "params are no model": (component("x", more=", params=dict"), "must be a pydantic model"),
    "params allow extra keys": (
        component("x", more=", params=BaseModel"),
        "must forbid extra keys",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_a_problem_that_names_its_distribution(site: Path, fault: str) -> None:
    source, reason = BROKEN[fault]
    install(site, "broken-plugin", source, version="2.3")
    registry = toys()
    registry.load(fake.entries(site))
    (problem,) = registry.problems
    assert str(problem).startswith("plugin 'broken_plugin' of broken-plugin 2.3 failed to load: ")
    assert reason in problem.reason
    assert "\n" not in str(problem)
    # whole or not at all, and the others stand
    assert [plugin.name for plugin in registry.plugins] == ["toys"]
    assert len(registry.hooks.get_plugins()) == 1
    assert registry.names("gate") == ["all", "inverted", "random", "speckd"]


def test_asking_for_what_a_broken_plugin_would_have_declared_says_why_it_is_missing(
    site: Path,
) -> None:
    install(site, "broken-plugin", fake.IMPORT_ERROR)
    registry = toys()
    registry.load(fake.entries(site))
    with pytest.raises(UserError) as caught:
        registry.component("gate", "half")
    assert caught.value.cause == "unknown gate 'half'"
    assert "plugin 'broken_plugin' of broken-plugin 1.0 failed to load" in caught.value.cure
    assert "a_library_that_is_not_there" in caught.value.cure


def test_the_name_of_another_kind_is_recognised() -> None:
    with pytest.raises(UserError) as caught:
        toys().component("divergence", "speckd")
    assert caught.value.cause == "unknown divergence 'speckd'"
    assert caught.value.cure.startswith("'speckd' is a gate; ")


def test_a_name_claimed_twice_is_refused_to_both(site: Path) -> None:
    install(site, "first-plugin", component("half"))
    install(site, "second-plugin", component("half"))
    registry = toys()
    registry.load(fake.entries(site))
    clash = "gate 'half' is declared by both first-plugin 1.0 and second-plugin 1.0"
    assert [clash in str(problem) for problem in registry.problems] == [True]
    with pytest.raises(UserError) as caught:
        registry.component("gate", "half")
    assert caught.value.cause == clash
    assert registry.component("gate", "speckd").name == "speckd"


def test_a_name_declared_twice_by_one_plugin_is_its_own_fault(site: Path) -> None:
    twice = component("half").replace("**said)]", "**said)] * 2")
    install(site, "double-plugin", twice)
    registry = toys()
    registry.load(fake.entries(site))
    assert "declares gate 'half' twice" in registry.problems[0].reason
    assert "half" not in registry.names("gate")


def test_what_cannot_be_imported_names_the_distribution(site: Path) -> None:
    install(site, "hollow-plugin", component("half", build="hollow_plugin:Gate"))
    registry = toys()
    registry.load(fake.entries(site))
    assert not registry.problems  # declaring is free; only building would fail
    with pytest.raises(UserError) as caught:
        registry.attribute(registry.component("gate", "half"))
    assert caught.value.cause.startswith(
        "gate 'half' of hollow-plugin 1.0 cannot be imported: AttributeError"
    )


def test_another_api_version_is_listed_and_never_imported(site: Path, fresh: None) -> None:
    module = install(site, "future-plugin", fake.EXITS, group="kdcore.v2")
    install(site, "unrelated", fake.EXITS, group="kdcore.v2.tools")
    registry = installed()
    assert [(f.name, f.group, f.distribution) for f in registry.foreign] == [
        (module, "kdcore.v2", "future-plugin")
    ]
    assert module not in sys.modules


def test_strict_turns_problems_into_failures(
    site: Path, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(site, "broken-plugin", fake.RAISES)
    monkeypatch.setenv("KDCORE_STRICT", "1")
    with pytest.raises(UserError, match=r"broken-plugin 1\.0 failed to load: RuntimeError"):
        installed()


def test_components_come_in_the_order_of_kinds_and_names() -> None:
    registry: Registry = toys()
    kinds = [component.kind for component, _ in registry.components()]
    assert kinds == ["gate"] * 4 + ["splitter"] + ["divergence"] * 2 + ["momentum"] * 2 + ["source"]
    assert registry.names("drafter") == []
