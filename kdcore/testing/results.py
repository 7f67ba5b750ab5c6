"""A suite's checks without pytest: what each says of a component, in one line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from kdcore.testing.suite import Suite


@dataclass(frozen=True, slots=True)
class Result:
    """What one check said. ``reason``: why it failed; empty when it passed."""

    kind: str
    name: str
    check: str
    passed: bool
    reason: str = ""


def results(suite: type[Suite]) -> Iterator[Result]:
    """Run every check of a suite, in the order in which they are declared.

    A check is an assertion, so this is of no use under ``python -O``.
    """
    for check in checks(suite):
        try:
            getattr(suite(), check)()
        except (Exception, SystemExit) as fault:
            said = f"{type(fault).__name__}: {fault}".removeprefix("AssertionError: ")
            reason = textwrap.shorten(said, 400, placeholder=" ...")
            yield Result(suite.kind, suite.name, check, False, reason)
        else:
            yield Result(suite.kind, suite.name, check, True)


def checks(suite: type[Suite]) -> list[str]:
    """The names of a suite's checks: what every kind must hold, then what this one must."""
    names = [name for level in reversed(suite.__mro__) for name in vars(level)]
    return [name for name in dict.fromkeys(names) if name.startswith("test_")]
