"""Command ``evaluate``: show the results of a run, or evaluate a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcore.components import registry
from kdcore.errors import UserError, nearest
from kdcore_cli.options import AsJson, AsTable, Device, Metric, Quiet, Sets, Verbose
from kdcore_cli.terminal import console
from kdcore_cli.terminal.quiet_libraries import quieten

if TYPE_CHECKING:
    from kdcore.reporting.table_text import TableFormat

SOURCES = {".jsonl": "chat", ".csv": "labelled_text"}
"""Source that reads a file of rows, by the suffix of the file's name."""


def evaluate(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT...",
            help="Folder of a finished run, a model (hub id, folder or .gguf file), or an "
            "evaluate spec (.yaml). Several finished runs are compared with the first one.",
        ),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="FILE", help="Held-out rows to evaluate on: a .jsonl or .csv file."
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher", metavar="MODEL", help="Teacher to compare the model's logits with."
        ),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(
            "--answers",
            metavar="NAME[,NAME]",
            help="Scores of generated answers, e.g. rouge_l or exact_match (see `kdcore plugins "
            "list --kind score`); parameters: --set evaluation.answers='[{name: NAME, ...}]'.",
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval", metavar="TASK[,TASK]", help="lm-eval tasks (requires kdcore[lm-eval])."
        ),
    ] = None,
    device: Device = None,
    sets: Sets = None,
    metric: Metric = None,
    table: AsTable = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Run the command; its help text is that of the job."""
    flags = [
        *([f"heldout={json.dumps(_source(data))}"] if data else []),
        *([f"teacher.model={json.dumps(teacher)}"] if teacher else []),
        *([f"evaluation.answers={json.dumps(answers.split(','))}"] if answers else []),
        *([f"lm_eval={json.dumps(lm_eval.split(','))}"] if lm_eval else []),
        *([f"device={json.dumps(device)}"] if device else []),
        *(sets or []),
    ]
    folders = [Path(each) for each in what]
    if len(what) > 1 and flags:
        raise UserError(
            f"{len(what)} runs and settings of a new evaluation exclude each other",
            "evaluate each run by itself, or name only runs to compare their stored results",
        )
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("a run is named twice", "name each run once")
    if len(what) > 1 or (not flags and (folders[0] / "run.json").exists()):
        _show_runs(folders, as_json, metric, table)
    elif table or metric:
        raise UserError(
            f"--{'table' if table else 'metric'} shows the stored results of runs, and {what[0]} "
            "is measured anew",
            "remove the option; --json prints the figures",
        )
    else:
        _measure(what[0], flags, quiet, verbose, as_json)


def _source(file: Path) -> dict[str, str]:
    if file.suffix not in SOURCES:
        raise UserError(
            f"--data {file}: the format '{file.suffix}' is unknown",
            "name a .jsonl or .csv file, or write an evaluate spec with a source that reads it",
        )
    return {"name": SOURCES[file.suffix], "path": str(file.resolve())}


def _show_runs(
    folders: Sequence[Path], as_json: bool, metric: str | None, form: TableFormat | None
) -> None:
    from kdcore.reporting.compared_runs import compared
    from kdcore.reporting.run_record import read_runs
    from kdcore_cli.terminal.outcomes import print_comparison, print_tables

    if len(folders) == 1 and not form and not metric:
        _show_run(folders[0], as_json)
    elif form:
        print_tables(folders, form, metric)
    else:
        runs = read_runs(folders)
        outcome = runs[0].comparison if len(runs) == 1 else compared(runs)
        if outcome is None:
            raise UserError(
                "--metric chooses a column of a comparison, and one run has none",
                "remove --metric, or name a second run",
            )
        print_comparison(outcome, as_json, metric)


def _show_run(folder: Path, as_json: bool) -> None:
    from kdcore.runs.comparison_results import BENCH_RESULTS, COMPARISON
    from kdcore.runs.folder import Run
    from kdcore.runs.results import TRAINING_RESULTS
    from kdcore_cli.terminal.bench_table import show_bench
    from kdcore_cli.terminal.outcomes import print_comparison
    from kdcore_cli.terminal.tables import show_results

    run = Run(folder)
    if comparison := run.read(COMPARISON):
        print_comparison(comparison, as_json, None)
        return
    if bench := run.read(BENCH_RESULTS):
        if as_json:
            console.print_json(BENCH_RESULTS.plain(bench))
        else:
            show_bench(console.out(), bench)
        return
    results = run.read(TRAINING_RESULTS)
    if results is None:
        raise UserError(
            f"the run in {folder} has no results; its status is '{run.status}'",
            f"see `kdcore report {folder}`; if the file was deleted, rerun with --overwrite"
            if run.status == "done"
            else "finish the run: rerun its command with --resume",
        )
    if as_json:
        console.print_json(TRAINING_RESULTS.plain(results))
    else:
        show_results(console.out(), results)


def _measure(what: str, flags: list[str], quiet: bool, verbose: bool, as_json: bool) -> None:
    from kdcore.specs.evaluate import EvaluateSpec
    from kdcore.specs.reading.file import parse_spec, placing, read_spec
    from kdcore_cli.terminal.progress import progress_on
    from kdcore_cli.terminal.tables import show_evaluation

    found = registry.installed()
    if Path(what).suffix in (".yaml", ".yml"):
        asked = read_spec(Path(what), flags, registry=found)
    else:
        text = json.dumps(_base_spec(what, flags))
        asked = parse_spec(text, what, Path(), flags, registry=found)
    if not isinstance(asked, EvaluateSpec):
        raise UserError(f"{what} is not an evaluate spec", "write job: evaluate in it")
    console.warn_of_problems(found)
    quieten(quiet, verbose)
    progress = progress_on(console.err(), quiet)
    is_file = Path(what).suffix in (".yaml", ".yml")
    with placing(Path(what), flags) if is_file else nullcontext():
        outcome = found.job("evaluate").carry_out(asked, registry=found, progress=progress)
    if as_json:
        console.print_json(outcome)
    else:
        show_evaluation(console.out(), outcome)


def _base_spec(what: str, flags: list[str]) -> dict[str, Any]:
    """Build the spec that the flags override: a run's own, or one that only names the model."""
    folder = Path(what)
    if (folder / "run.json").exists():
        from kdcore.jobs.evaluate import spec_of
        from kdcore.runs.folder import Run

        return spec_of(Run(folder))
    if not flags:
        beside = [path.name for path in folder.parent.glob("*") if (path / "run.json").exists()]
        raise UserError(
            f"{what} does not contain a run, and --data is missing",
            f"name a run ({nearest(folder.name, beside)}), or add --data FILE"
            if beside
            else "name the folder of a run, e.g. runs/distill, or add --data FILE",
        )
    return {"job": "evaluate", "model": {"model": what}}
