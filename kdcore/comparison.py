"""Several methods, the same data, budget and seeds: which one helps, and at what cost.

A cell is one arm with one seed: an ordinary distill run in a process of its own, so that a cell
that fails takes nothing with it and its peak memory is its own. Cells of equal seed see the same
rows in the same order; responses that the teacher generates are generated once for all.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcore.assembly import Assembly
from kdcore.errors import UserError
from kdcore.evaluation.bootstrap import paired_differences
from kdcore.evaluation.heldout import Measured, shown
from kdcore.progress import Progress, Silent
from kdcore.registry import Registry, describe, installed
from kdcore.runs import CELLS, Run
from kdcore.specs import CompareSpec, DistillSpec, changed
from kdcore.step_costs import spent

COST = ("seconds", "tokens", "peak_memory")
"""What a cell cost: seconds inside training steps, tokens each model read, bytes at the most."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm with one seed."""

    arm: str
    seed: int
    spec: DistillSpec


def compare(
    spec: CompareSpec,
    *,
    registry: Registry | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Run every cell that is not done yet; the folder's ``comparison.json`` holds the outcome.

    A cell that fails is recorded with its reason, and the others go on.

    Raises UserError as `kdcore.runs.Run.open` does, or when no cell of the baseline is done.
    """
    registry = registry or installed()
    progress = progress or Silent()
    run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume)
    with run.closed_after():
        failures: dict[str, str] = {}
        arms: list[str] = []
        total = len(spec.seeds) * len(spec.arms) * (4 if spec.controls else 1)
        with progress.stage("cells", total) as stage:
            for cell in _cells(spec, run, registry):
                arms += [cell.arm] if cell.arm not in arms else []
                reason = _carry_out(cell, run)
                if reason:
                    failures[f"{cell.arm}, seed {cell.seed}"] = reason
                    progress.note(f"{cell.arm}, seed {cell.seed} failed: {reason}")
                stage.advance()
        outcome = _outcome(spec, run, arms, failures)
        run.write_text("comparison.json", json.dumps(outcome, indent=2))
    return run


def _cells(spec: CompareSpec, run: Run, registry: Registry) -> Iterator[Cell]:
    """The cells of each arm, and then of its controls, whose rates its own cells give."""
    for arm, changes in spec.arms.items():
        own = [Cell(arm, seed, _of_seed(spec, changes, arm, seed, run)) for seed in spec.seeds]
        yield from own
        if spec.controls and len(own[0].spec.method.gates) == 1:
            for cell in own:
                gates = _control_gates(cell, run, registry)
                for control, gate in gates.items():
                    name = f"{arm}+{control}"
                    method = {"method": {"gates": [gate]}}
                    yield Cell(
                        name,
                        cell.seed,
                        changed(cell.spec, {**method, "run": str(_folder(run, name, cell.seed))}),
                    )


def _of_seed(
    spec: CompareSpec, changes: Mapping[str, Any], arm: str, seed: int, run: Run
) -> DistillSpec:
    place = {"run": str(_folder(run, arm, seed)), "seed": seed}
    responses = {"data": {"responses": {"folder": str(run.path("responses"))}}}
    return changed(changed(spec.base, dict(changes)), place | responses)


def _folder(run: Run, arm: str, seed: int) -> Path:
    return run.path(CELLS, arm, f"seed-{seed}")


def _control_gates(cell: Cell, run: Run, registry: Registry) -> dict[str, dict[str, Any]]:
    """What an arm's gate has to beat: chance, a smaller loss everywhere, and its opposite."""
    lines = _metrics(_folder(run, cell.arm, cell.seed))
    (gate,) = cell.spec.method.gates
    rates = [line[f"acceptance/{gate.name}"] for line in lines if f"acceptance/{gate.name}" in line]
    if not rates:
        return {}  # the cell itself failed
    rate = min(max(float(np.mean(rates)), 0.0), 1.0)
    floor = float(getattr(Assembly(registry).build(gate), "floor", 0.0))
    return {
        "random": {"name": "random", "rate": rate, "floor": floor},
        "uniform": {"name": "uniform", "weight": rate + (1 - rate) * floor},
        "inverted": {"name": "inverted", "gate": gate.dump()},
    }


def _carry_out(cell: Cell, run: Run) -> str | None:
    """Run a cell in a process of its own; the reason when it failed."""
    folder = _folder(run, cell.arm, cell.seed)
    if Run(folder).finished and (folder / "cost.json").exists():
        return None
    processes = multiprocessing.get_context("spawn")
    queue = processes.SimpleQueue()
    process = processes.Process(target=_child, args=(cell.spec.model_dump(mode="json"), queue))
    process.start()
    process.join()
    if not queue.empty():
        return str(queue.get())
    return None if process.exitcode == 0 else f"its process ended with code {process.exitcode}"


def _child(asked: dict[str, Any], queue: Any) -> None:
    """A cell's process: the run, then what it cost."""
    from kdcore.distill import distill  # heavy; the parent needs none of it

    try:
        run = distill(DistillSpec.model_validate(asked), resume=True)
        run.write_text("cost.json", json.dumps(_cost(run.folder)))
    except KeyboardInterrupt:  # the parent says so
        sys.exit(130)
    except UserError as wrong:
        queue.put(wrong.cause)
    except Exception as fault:
        queue.put(describe(fault))


def _cost(folder: Path) -> dict[str, float]:
    """Of a finished run in this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {**spent(_metrics(folder)), "peak_memory": float(peak)}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _outcome(
    spec: CompareSpec, run: Run, arms: list[str], failures: Mapping[str, str]
) -> dict[str, Any]:
    """Each arm's figures and cost, meaned over seeds, and its difference from the baseline."""
    baseline = spec.baseline or next(iter(spec.arms))
    measured = {arm: _measured(spec, run, arm) for arm in arms}
    if not measured[baseline]:
        raise UserError(
            f"no cell of the baseline '{baseline}' is done: {'; '.join(failures.values())}",
            "mend what the reason names and go on with --resume",
        )
    rows = []
    for arm, by_seed in measured.items():
        shared = [seed for seed in by_seed if seed in measured[baseline]]
        row: dict[str, Any] = {"arm": arm, "seeds": list(by_seed)}
        if shared:
            figures = [by_seed[seed].means() for seed in by_seed]
            row["figures"] = {name: _mean(figures, name) for name in figures[0]}
            row["cost"] = {name: _mean(_costs(run, arm, by_seed), name) for name in COST}
            ours = [by_seed[seed] for seed in shared]
            theirs = [measured[baseline][seed] for seed in shared]
            gaps = paired_differences(ours, theirs, spec.draws)
            row["differences"] = {name: asdict(gap) for name, gap in gaps.items()}
        rows.append(row)
    return {
        "baseline": baseline,
        "seeds": spec.seeds,
        "metrics": shown(next(iter(measured[baseline].values())).means()),
        "arms": rows,
        "failures": dict(failures),
    }


def _measured(spec: CompareSpec, run: Run, arm: str) -> dict[int, Measured]:
    """The finished cells' held-out rows, by seed."""
    found = {}
    for seed in spec.seeds:
        cell = Run(_folder(run, arm, seed))
        if cell.finished:
            found[seed] = Measured(**cell.read_json("heldout_rows.json")["after"])
    return found


def _costs(run: Run, arm: str, seeds: Mapping[int, Any]) -> list[dict[str, float]]:
    return [Run(_folder(run, arm, seed)).read_json("cost.json") for seed in seeds]


def _mean(dicts: list[dict[str, float]], name: str) -> float:
    return float(np.mean([each[name] for each in dicts]))
