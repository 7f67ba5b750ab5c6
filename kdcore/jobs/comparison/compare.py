"""The compare job: train by several methods with the same data, budget and seeds.

A cell is one arm with one seed: an ordinary run in its own process, so that a failed cell does not
stop the others and its peak memory is measured alone. Cells of equal seed read the same rows in the
same order; responses of a teacher or target are generated once for all cells. With a grid, each arm
first runs at every grid point, on rows and with seeds that are not reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from kdcore.components.choice import choices
from kdcore.components.registry import THIS_PROGRAM, Registry, installed
from kdcore.decoding.build import refuse_untrainable
from kdcore.errors import UserError, in_field, nearest
from kdcore.jobs.comparison.cell_fields import in_comparison, placed_failure
from kdcore.jobs.comparison.cell_process import Failed, run_here, run_on_ray
from kdcore.jobs.comparison.cells import (
    Cell,
    cells_by_arm,
    independent_cells,
    metrics_of,
    traceback_file,
    untried,
)
from kdcore.jobs.comparison.outcome import outcome
from kdcore.jobs.comparison.shared_states import refuse_other_states
from kdcore.jobs.ray_workers import Cluster, connected
from kdcore.models.assembly import Assembly
from kdcore.models.loading.loaded import first_few
from kdcore.runs.comparison_results import COMPARISON, refuse_unmeasured
from kdcore.runs.folder import Run
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.results import CellFailure
from kdcore.runs.today import pinned
from kdcore.specs.compare import CompareSpec
from kdcore.specs.parts.changes import changed
from kdcore.specs.train_drafter import TrainDrafterSpec


def compare(
    spec: CompareSpec,
    *,
    registry: Registry | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    on: Cluster | None = None,
    share: tuple[int, int] | None = None,
) -> Run:
    """Run every cell that is not done yet, and write ``comparison.json``.

    A failed cell is recorded with its reason, and the other cells continue. A line that several
    cells note is shown once.

    Processes that run a share each write one run folder, or folders whose ``cells`` are copied into
    one. A share runs its cells until each other one waits for another share, and repeats neither
    done nor failed cells. The share that finds all cells at their end writes ``comparison.json``;
    until then the run's status stays ``running``.

    Args:
        spec: The compare spec.
        registry: The installed components; each cell's process loads the same ones.
        overwrite: Whether an existing run folder is replaced.
        resume: Whether an unfinished comparison is continued.
        progress: The display of stages and notes (default: none).
        on: The cluster whose workers run the cells (default: this machine, one after another).
        share: (n, m) to run the n-th of m shares of the cells (default: all cells).

    Returns:
        The run, whose ``comparison.json`` holds the results.

    Raises:
        UserError: `kdcore.runs.folder.Run.open` refuses the folder, a component is not installed,
            no cell of the baseline succeeds, ``choose_by`` names a metric that is not measured,
            a model or row file changed since other cells read it, a cell was made by another spec,
            the cluster cannot be used, or other processes run cells and this one is not a share.
    """
    registry = registry or installed()
    progress = progress or Silent()
    _refuse_uninstalled(spec, registry)
    _refuse_untrainable(spec, registry)
    refuse_unmeasured("choose_by", spec.choose_by, spec.base.job)
    refuse_other_states(spec, registry)
    with connected(on):
        if share is not None:
            return _share(spec, registry, progress, on, share, overwrite=overwrite)
        run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume)
        with run.closed_after():
            _note_grid(spec, registry, progress)
            made = _pass(spec, run, registry, progress, on)
            if made.waiting:
                raise _busy(made.waiting[0])
            run.write(COMPARISON, outcome(spec, made.cells))
    return run


def _share(
    spec: CompareSpec,
    registry: Registry,
    progress: Progress,
    on: Cluster | None,
    share: tuple[int, int],
    *,
    overwrite: bool,
) -> Run:
    """Run a share; see `compare`."""
    number, shares = share
    if not 1 <= number <= shares:
        raise UserError(f"share={share} is not a share", "name (n, m) with 1 <= n <= m")
    if overwrite:
        raise UserError(
            "a share cannot replace a run, which would delete the cells of the other shares",
            "remove overwrite=True; delete the run folder yourself before the shares start",
        )
    run = Run.open(spec.run, spec, registry, resume=True, shared=True)
    with pinned(run.facts.date or ""):
        _note_grid(spec, registry, progress)
        made = _pass(spec, run, registry, progress, on, share)
        while made.ran:  # now cells may run that waited for these, or for those of other shares
            made = _pass(spec, run, registry, progress, on, share)
    if made.waiting:
        progress.note(
            f"share {number}/{shares} has ended, and cells of other shares have not "
            f"({first_few(made.waiting)}): run it again after them"
        )
        return run
    with run.closed_after():
        run.write(COMPARISON, outcome(spec, made.cells))
    return run


@dataclass(frozen=True, slots=True)
class _Pass:
    """A pass over the cells of a comparison.

    Attributes:
        cells: All cells that are known so far.
        ran: Whether this process ran one of them.
        waiting: Names of those that have not ended, since other processes run them.
    """

    cells: Sequence[Cell]
    ran: bool
    waiting: list[str]


def _pass(
    spec: CompareSpec,
    run: Run,
    registry: Registry,
    progress: Progress,
    on: Cluster | None,
    share: tuple[int, int] | None = None,
) -> _Pass:
    """Run the cells that are not done or, of a share, those that have not ended."""
    cells: list[Cell] = []
    waiting: list[str] = []
    notes: set[str] = set()
    ran = False

    def note(cell: Cell, line: str) -> None:
        if line not in notes:
            notes.add(line)
            progress.note(f"{cell.name}: {line}")

    with progress.stage("cells", sum(cells_by_arm(spec).values())) as stage:
        for part in independent_cells(spec, run, registry):
            cells += part
            for cell in part:
                cell.refuse_other_spec(registry)
            left = [cell for cell in part if _is_left(cell, share)]
            ran = ran or bool(left)
            done = [(cell, None) for cell in part if cell not in left]
            for cell in left:
                cell.forget_failure()
            outcomes = run_on_ray(left, run, note) if on else run_here(left, registry, note)
            for cell, failed in chain(done, outcomes):
                if failed and not cell.busy:  # else another process was faster to begin it
                    for line in _told(spec, cell, failed):
                        progress.note(line)
                if cell.trial:
                    _refuse_unmeasured(spec, cell)
                if cell.ended:
                    stage.advance()
                else:
                    waiting.append(cell.name)
    return _Pass(cells, ran, waiting)


def _told(spec: CompareSpec, cell: Cell, failed: Failed) -> Iterator[str]:
    """Record the failure of a cell, and yield the lines that say so."""
    told = placed_failure(spec, cell, failed.error)
    failure = CellFailure(told.cause, told.cure)
    cell.record_failure(failure, failed.traceback)
    yield from f"{cell.name} failed: {failure}".splitlines()
    if failed.traceback:
        yield f"  traceback: {traceback_file(cell.spec.run)}"


def _is_left(cell: Cell, share: tuple[int, int] | None) -> bool:
    """Whether this process has to run a cell.

    Raises UserError when the process has to run all cells, and another one runs this one.
    """
    if share is not None:
        number, shares = share
        return cell.number % shares == number - 1 and not cell.ended and not cell.busy
    if cell.busy:
        raise _busy(cell.name)
    return not cell.done


def _busy(cell: str) -> UserError:
    return UserError(
        f"another process runs {cell} of this comparison",
        "wait until it ends, then rerun with resume=True; or run a share (share=(n, m))",
    )


def _refuse_uninstalled(spec: CompareSpec, registry: Registry) -> None:
    """Raises UserError for a component that a cell's process cannot load."""
    arms = [changed(spec.base, arm, {"registry": registry}) for arm in spec.arms.values()]
    for _, choice in choices(arms):
        if registry.plugin_of(choice.kind, choice.name).distribution == THIS_PROGRAM:
            raise UserError(
                f"the {choice.kind} '{choice.name}' is not installed; each cell of a comparison "
                "runs in its own process, which loads installed plugins only",
                "install it as a plugin (kdcore plugins new), or run each arm by itself",
            )


def _refuse_untrainable(spec: CompareSpec, registry: Registry) -> None:
    """Raises UserError for cells with a drafter without weights, which would all fail."""
    if not isinstance(spec.base, TrainDrafterSpec):
        return
    assembly = Assembly(registry)
    for arm in spec.arms:
        for point in range(len(spec.points_of(arm))):
            try:
                refuse_untrainable(spec.at_point(arm, point).drafter, assembly)
            except UserError as wrong:
                raise in_comparison(wrong, spec, arm, point, called=f"arm '{arm}'") from wrong


def _note_grid(spec: CompareSpec, registry: Registry, progress: Progress) -> None:
    """Note arms that lack fields of the grid, and grid points that reported rows choose.

    Figures are optimistic where the rows that are reported choose the point.
    """
    for line in untried(spec):
        progress.note(line)
    reported = spec.base.data.heldout
    if spec.validation is None or reported is None:
        return
    assembly = Assembly(registry)
    with in_field("base.data.heldout"):
        rows = _contents(assembly.build(reported).read())
    with in_field("validation"):
        chosen_on = _contents(assembly.build(spec.validation).read())
    if shared := len(rows & chosen_on):
        progress.note(
            f"{shared} of {len(rows)} held-out rows are also in validation, which chooses the grid "
            "points; this makes the reported figures optimistic"
        )


def _contents(examples: Sequence[Any]) -> set[Any]:
    """The contents of examples without their ids; examples that cannot be hashed are left out."""
    found = set()
    for each in examples:
        with suppress(TypeError):  # not a dataclass, or one that holds lists
            found.add(replace(each, id=""))
    return found


def _refuse_unmeasured(spec: CompareSpec, cell: Cell) -> None:
    """Raises UserError, already after the first cell, when ``choose_by`` was not measured."""
    known = [each.name for each in metrics_of([cell.results()])]
    if known and spec.choose_by and spec.choose_by not in known:
        raise UserError(
            f"choose_by names '{spec.choose_by}', which was not measured",
            nearest(spec.choose_by, known),
        )
