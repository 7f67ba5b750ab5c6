"""Functions that print the results of a finished run, by job.

Each takes the run and whether to print JSON. Its further parameters become options of the command:
typer reads their annotations, so this module does not postpone them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcore.errors import UserError, nearest
from kdcore_cli.options import AsTable, Metric
from kdcore_cli.terminal import console

if TYPE_CHECKING:
    from kdcore.components.job import Job
    from kdcore.reporting.run_record import RunRecord
    from kdcore.reporting.table_text import TableFormat
    from kdcore.runs.comparison_results import Comparison
    from kdcore.runs.folder import Run


def outcome_of(job: "Job") -> Callable[..., None]:
    """Return the function that prints the results of a job.

    Args:
        job: Job of the run.

    Returns:
        A function of a `kdcore.runs.folder.Run`, the flag ``as_json`` and options of its own.
    """
    return _OUTCOMES.get(job.name) or partial(_show_result, job)


def _show_result(job: "Job", run: "Run", as_json: bool) -> None:
    """Print the job's result file, for jobs of plugins."""
    from kdcore_cli.terminal.tables import show_facts

    result = run.read_json(job.result) if job.result else {}
    if as_json:
        console.print_json(result)
        return
    if result:
        show_facts(console.out(), result)
    console.tell(f"run: {run.folder}")


def _show_training(
    what: str, folder: str, run: "Run", as_json: bool, table: AsTable = None
) -> None:
    from kdcore.runs.results import TRAINING_RESULTS
    from kdcore_cli.terminal.tables import show_results

    results = run.read(TRAINING_RESULTS)
    assert results is not None, "which the job has just written"
    if as_json:
        console.print_json(TRAINING_RESULTS.plain(results))
    elif table:
        print_tables([run.folder], table)
    else:
        show_results(console.out(), results)
        console.tell(f"{what}: {run.path(folder)}")


def refuse_unknown_metric(spec: Any, metric: str | None) -> None:
    """Check the option ``--metric`` of a comparison before it trains.

    Args:
        spec: Spec of the comparison.
        metric: Value of the option.

    Raises:
        UserError: No cell will measure that metric.
    """
    from kdcore.runs.comparison_results import refuse_unmeasured

    refuse_unmeasured("--metric", metric, spec.base.job)


def _show_comparison(
    run: "Run", as_json: bool, metric: Metric = None, table: AsTable = None
) -> None:
    if run.status != "done":  # a share ended before the others, as the job has noted
        if as_json:
            console.print_json({})
        return
    outcome = _drawn(run, "comparison.html").comparison
    assert outcome is not None, "which the job has just written"
    if table:
        print_tables([run.folder], table, metric)
        return
    print_comparison(outcome, as_json, metric)
    if not as_json:
        console.tell(f"page: {run.path('comparison.html')}")


def print_comparison(outcome: "Comparison", as_json: bool, metric: str | None) -> None:
    """Print one metric of a comparison, or all of it as JSON.

    Args:
        outcome: Results of the comparison.
        as_json: Whether to print JSON.
        metric: Name of the metric, or None for the first one.

    Raises:
        UserError: The metric was not measured.
    """
    from kdcore.runs.comparison_results import COMPARISON
    from kdcore_cli.terminal.comparison_table import show_comparison

    known = [each.name for each in outcome.metrics]
    metric = metric or known[0]
    if metric not in known:
        raise UserError(f"--metric: unknown metric '{metric}'", nearest(metric, known))
    if as_json:
        console.print_json(COMPARISON.plain(outcome))
    else:
        show_comparison(console.out(), outcome, metric)


def print_tables(folders: Sequence[Path], form: "TableFormat", metric: str | None = None) -> None:
    """Print the tables of runs in a text format.

    Args:
        folders: Run folders.
        form: The format.
        metric: Name of the metric to show (default: all).
    """
    from kdcore.reporting.table_text import as_text, tables_of_runs

    console.write(as_text(tables_of_runs(folders, [metric] if metric else []), form))


def _show_bench(run: "Run", as_json: bool, table: AsTable = None) -> None:
    from kdcore.runs.comparison_results import BENCH_RESULTS
    from kdcore_cli.terminal.bench_table import show_bench

    outcome = _drawn(run, "bench.html").bench
    assert outcome is not None, "which the job has just written"
    if as_json:
        console.print_json(BENCH_RESULTS.plain(outcome))
    elif table:
        print_tables([run.folder], table)
    else:
        show_bench(console.out(), outcome)
        console.tell(f"page: {run.path('bench.html')}")


def _show_generation(run: "Run", as_json: bool) -> None:
    came = run.facts.responses
    assert came is not None, "which the job has just written"
    if as_json:
        console.print_json(came)
        return
    speed = came.tokens / came.seconds if came.tokens else 0.0
    console.tell(
        f"{came.responses} responses, {came.ended / came.responses:.0%} with an end token; "
        f"{came.tokens} new tokens, {speed:.0f} tokens/s: {run.path('responses.jsonl')}"
    )


def _drawn(run: "Run", name: str) -> "RunRecord":
    """Read a run's folder and write its page there, as `kdcore report` does."""
    from kdcore.reporting.page import page
    from kdcore.reporting.run_record import read_runs

    (record,) = read_runs([run.folder])
    run.write_text(name, page([record]))
    return record


_OUTCOMES: dict[str, Callable[..., None]] = {
    "distill": partial(_show_training, "student", "model"),
    "train-drafter": partial(_show_training, "drafter", "drafter"),
    "compare": _show_comparison,
    "bench": _show_bench,
    "generate-data": _show_generation,
}
