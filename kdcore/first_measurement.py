"""What is measured before the training: once, and only where the spec asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from kdcore.jobs import TrainedSpec
from kdcore.runs import Run

NOTHING: dict[str, Any] = {"figures": {}, "rows": {}, "answers": []}
"""What came of a measurement that was not made."""


def measured_before(
    run: Run, spec: TrainedSpec, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What ``measure`` gives, or gave an earlier attempt at the run; `NOTHING` if not asked for.

    before.json is written in any case: a run that has it has begun to train, see
    `kdcore.run_inputs`.
    """
    found = run.read_json("before.json")
    if not spec.evaluation.before:
        found = NOTHING
    elif not found.get("figures"):
        found = measure()
    run.write_text("before.json", json.dumps(found))
    return found
