"""The conformance kit: the checks that every plugin of a kind must pass, ready for pytest.

A plugin's author writes one class for each component:

    from kdcore.testing import GateSuite

    class TestMargin(GateSuite):
        name = "margin"
        params = {"least": 0.2}

        def test_formula(self):
            self.agrees_with(lambda batch: ...)  # the paper's formula, in float64

and pytest runs the checks inherited from the suite. Each check builds the component through the
installed registry, as a spec does. A subclass may override the suite's class attributes and the
methods that are not tests. The plugins that ship with kdcore pass the same suites.

`kdcore plugins check` runs the same checks without pytest. No other package of kdcore imports this
one.
"""

from __future__ import annotations

import contextlib
from typing import Any

with contextlib.suppress(ImportError):
    import pytest

    # pytest then explains a failed assertion of these modules like one of a test file.
    pytest.register_assert_rewrite(
        *map(
            f"{__name__}.{{}}".format,
            ["decoding", "job", "method", "score", "source", "suite"],
        )
    )

from kdcore.components.component import Component
from kdcore.testing.decoding.baseline import BaselineSuite
from kdcore.testing.decoding.drafter import DrafterSuite
from kdcore.testing.decoding.engine import EngineSuite
from kdcore.testing.decoding.tree import TreeSuite
from kdcore.testing.decoding.verifier import VerifierSuite
from kdcore.testing.job import JobSuite, job_suite_of
from kdcore.testing.method.advantage import AdvantageSuite
from kdcore.testing.method.divergence import DivergenceSuite
from kdcore.testing.method.gate import GateSuite
from kdcore.testing.method.matcher import MatcherSuite
from kdcore.testing.method.momentum import MomentumSuite
from kdcore.testing.method.splitter import SplitterSuite
from kdcore.testing.score import ScoreSuite
from kdcore.testing.source import SourceSuite
from kdcore.testing.suite import Suite

SUITES: dict[str, type[Suite]] = {
    suite.kind: suite
    for suite in (
        GateSuite,
        SplitterSuite,
        DivergenceSuite,
        AdvantageSuite,
        MatcherSuite,
        MomentumSuite,
        SourceSuite,
        DrafterSuite,
        TreeSuite,
        VerifierSuite,
        EngineSuite,
        BaselineSuite,
        ScoreSuite,
    )
}


def suite_of(component: Component, **members: Any) -> type[Suite]:
    """Make the test class of a declared component, for testing many of them.

    Args:
        component: The component's declaration.
        **members: Class attributes of the suite, such as ``params``, and further tests.

    Returns:
        A subclass of the suite of the component's kind.
    """
    title = "".join(word.capitalize() for word in f"{component.kind}_{component.name}".split("_"))
    return type(f"Test{title}", (SUITES[component.kind],), {"name": component.name, **members})


__all__ = [
    "SUITES",
    "AdvantageSuite",
    "BaselineSuite",
    "DivergenceSuite",
    "DrafterSuite",
    "EngineSuite",
    "GateSuite",
    "JobSuite",
    "MatcherSuite",
    "MomentumSuite",
    "ScoreSuite",
    "SourceSuite",
    "SplitterSuite",
    "Suite",
    "TreeSuite",
    "VerifierSuite",
    "job_suite_of",
    "suite_of",
]
