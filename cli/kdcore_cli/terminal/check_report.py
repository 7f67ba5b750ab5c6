"""Text output of `kdcore check`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from kdcore.components.job import Job
from kdcore.errors import counted
from kdcore.jobs.comparison.cells import cells_by_arm, untried
from kdcore.jobs.preflight.bench import BenchReport
from kdcore.jobs.preflight.comparison import total_seconds
from kdcore.jobs.preflight.drafter_cost import DrafterCost
from kdcore.jobs.preflight.generate_data import GenerationReport
from kdcore.jobs.preflight.report import Report
from kdcore.jobs.preflight.rows import DataFacts
from kdcore.method.schedule import Points
from kdcore.runs.costs import in_bytes
from kdcore.specs.compare import CompareSpec
from kdcore_cli.terminal.progress import duration
from kdcore_cli.terminal.tables import show_facts, table

EXAMPLE = 300
"""Maximum number of tokens shown of the example row."""

NOTED = 0.01
"""Share of padding that is worth a line."""


def report_of(job: Job) -> Callable[[Console, Any, Any], None]:
    """Return the function that prints the preflight report of a job.

    Args:
        job: Job whose preflight wrote the report.

    Returns:
        A function of a console, the report and the spec.
    """
    return _REPORTS.get(job.name) or _show_fields


def _show_fields(console: Console, report: Any, spec: Any) -> None:
    """Print the fields of a report, for jobs of plugins."""
    show_facts(console, report)


def _show_comparison(console: Console, report: Mapping[str, Any], spec: CompareSpec) -> None:
    if all(isinstance(arm, Report) for arm in report.values()) and report:
        show_report(console, report[spec.baseline or next(iter(report))], spec)
        show_arms(console, report, spec)
        return
    for name, arm in report.items():  # of a plugin's job
        _heading(console, f"arm {name}")
        show_facts(console, arm)


def show_report(console: Console, report: Report, spec: Any) -> None:
    """Print the preflight report of a job that trains.

    Args:
        console: Console to print to.
        report: Report of the preflight.
        spec: Spec of the job.
    """
    _heading(console, "components")
    components = table("", "", "", show_header=False)
    for kind, name, origin in report.components:
        components.add_row(kind, Text(name, "bold"), origin)
    console.print(components)

    _heading(console, "loss")
    _indented(console, _loss(report))
    if len(report.streams) > 1:
        parts = ["{" + ", ".join(terms) + "}" for terms in report.streams.values()]
        console.print(f"  {len(parts)} backward passes: {' '.join(parts)}")

    _heading(console, "models")
    models = table("", "parameters", "layers", "width", "classes", "context")
    for who, facts in report.models.items():
        kept = f"{facts.layers} of {facts.cut_from}" if facts.cut_from else facts.layers
        numbers = (kept, facts.hidden, facts.classes, facts.context or "-")
        models.add_row(who, _count(facts.parameters), *map(str, numbers))
    console.print(models)
    for who, facts in report.models.items():
        console.print(Padding(f"{who}: {facts.name} ({facts.architecture})", (0, 0, 0, 2)))
    for line in (_compared(report), *report.matched):
        _indented(console, line)
    if report.teachers:
        teachers = table("teacher", "rows alone", "rows averaged", "weight", "from")
        for each in report.teachers:
            rows = (f"{each.alone:,}", f"{each.averaged:,}", _weight(each.weight), each.origin)
            teachers.add_row(Text(each.name, "bold"), *rows)
        console.print(teachers)
    if report.sampler is not None:
        console.print(f"  the student's responses are sampled by {report.sampler}")
    if report.adapted is not None:
        every = report.models["student"].parameters
        share = report.adapted / every
        console.print(
            f"  LoRA trains {_count(report.adapted)} of the student's {_count(every)} parameters "
            f"({share:.2%})"
        )

    _heading(console, "data")
    data = table("", "rows", "tokens/row", "trained/row", "longest", "truncated", "empty")
    for name, source in report.rows.items():
        data.add_row(name, *_cells(source))
    console.print(data)
    for line in _remarks(report, spec):
        _indented(console, line)

    if report.example:
        _heading(console, "first row, with the trained tokens marked")
        console.print(Padding(_marked(report.example[:EXAMPLE], console), (0, 0, 0, 2)))

        if len(report.example) > EXAMPLE:
            console.print(f"  ... and {len(report.example) - EXAMPLE} more tokens")

    _heading(console, "estimated cost")
    cost = table("", "", show_header=False)
    cost.columns[1].justify = "right"
    for name, size in report.memory.items():
        if size:
            cost.add_row(name, in_bytes(size))
    cost.add_row("total memory", Text(in_bytes(sum(report.memory.values())), "bold"))
    for name, size in report.disk.items():
        cost.add_row(f"{name}, maximum on disk", in_bytes(size))
    for name, seconds in report.seconds.items():
        if seconds:
            cost.add_row(name, duration(seconds))
    total = f"{duration(sum(report.seconds.values()))} for {counted(report.steps, 'step')}"
    without = " without the servers'" if report.servers else ""
    cost.add_row(f"total time{without}", Text(total, "bold"))
    console.print(cost)
    if report.drafting is not None:
        _show_drafting(console, report.drafting)


def show_arms(console: Console, reports: Mapping[str, Report], spec: CompareSpec) -> None:
    """Print the loss and the estimated cost of each arm of a comparison.

    Args:
        console: Console to print to.
        reports: Preflight report of each arm, by its name.
        spec: Spec of the comparison.
    """
    _heading(console, "arms")
    arms = table("", "loss", "backward passes", "memory", "time")
    for column in arms.columns[2:]:
        column.justify = "right"
    for name, report in reports.items():
        size = in_bytes(sum(report.memory.values()))
        seconds = duration(sum(report.seconds.values()))
        arms.add_row(Text(name, "bold"), _loss(report), str(len(report.streams)), size, seconds)
    console.print(arms)
    seeds = counted(len(spec.seeds), "seed")
    trials = f" x {spec.trials} trials" if spec.trials > 1 else ""
    alike = Counter(len(spec.points_of(arm)) if spec.grids[arm] else 0 for arm in reports)
    for points, count in alike.items():
        runs = f"({counted(points, 'grid point')}{trials} + {seeds})" if points else seeds
        console.print(f"  {counted(count, 'arm')} x {runs}")
    for line in untried(spec):
        _indented(console, line)
    if spec.controls:
        console.print("  plus three controls for each arm with one gate")
    cells = cells_by_arm(spec)
    time = duration(total_seconds(spec, reports))
    total = f"{counted(sum(cells.values()), 'training')}, {time}"
    console.print(f"  in all {total}, and the start of each process")


def show_generation(console: Console, report: GenerationReport, spec: Any) -> None:
    """Print the preflight report of a generate-data job.

    Args:
        console: Console to print to.
        report: Report of the preflight.
        spec: Spec of the job; not used.
    """
    facts = table("", "", show_header=False)
    facts.add_row("teacher", Text(report.teacher, "bold"))
    facts.add_row("conversations", f"{report.conversations:,}")
    facts.add_row("responses", f"{report.responses:,}")
    facts.add_row("maximum tokens", f"{report.tokens:,}")
    if report.seconds is not None:
        facts.add_row("estimated maximum time", duration(report.seconds))
    console.print(facts)


def show_bench_report(console: Console, report: BenchReport, spec: Any) -> None:
    """Print the preflight report of a benchmark.

    Args:
        console: Console to print to.
        report: Report of the preflight.
        spec: Spec of the job; not used.
    """
    facts = table("", "", show_header=False)
    facts.add_row("target", Text(report.target.name, "bold"))
    for name, count in report.prompts.items():
        facts.add_row(f"prompts of {name}", f"{count:,}")
    facts.add_row("maximum tokens of a method", f"{report.tokens:,}")
    console.print(facts)
    if report.drafting is not None:
        _show_drafting(console, report.drafting)


def _show_drafting(console: Console, cost: DrafterCost) -> None:
    """Print from which acceptance length each drafter makes decoding faster."""
    _heading(console, "does a drafter pay here?")
    rows = table("", "batch", "engine", "plain pass", "proposal", "verification", "break-even tau")
    for column in rows.columns[3:]:
        column.justify = "right"
    for each in cost.drafters:
        times = (each.cost.plain_ms, each.cost.draft_ms, each.cost.verify_ms)
        tau = Text(f"{each.cost.tau:.2f}", "bold")
        cells = (str(each.batch_size), each.engine, *(f"{time:.3g} ms" for time in times))
        rows.add_row(Text(each.name, "bold"), *cells, tau)
    if cost.drafters:
        console.print(rows)
        _indented(
            console,
            "the drafter makes decoding faster if its acceptance length tau exceeds (proposal + "
            "verification) / plain pass",
        )
        rounds = min(each.cost.rounds for each in cost.drafters)
        passes = f"{counted(rounds, 'round')} or more"
        prompt = f"a prompt of {counted(cost.prompt, 'token')}"
        _indented(console, f"medians of {passes} after {prompt}, measured on {cost.machine}")
    for note in cost.notes:
        _indented(console, note)


def _indented(console: Console, line: str) -> None:
    console.print(Padding(line, (0, 0, 0, 2)))


def _heading(console: Console, text: str) -> None:
    console.print(Text(text, "bold underline"))


def _loss(report: Report) -> str:
    """The terms of the loss with their weights, those on auxiliary rows last."""
    own, others = (
        " + ".join(f"{_weight(weight)} x {name}" for name, weight in terms.items())
        for terms in (report.terms, report.auxiliary_terms)
    )
    return f"{own} + {others} on auxiliary rows" if others else own


def _weight(weight: float | Points) -> str:
    if isinstance(weight, list):
        return "(" + " to ".join(f"{value:g}" for _, value in weight) + ")"
    return f"{weight:g}"


def _compared(report: Report) -> str:
    """Describe the models that the loss compares, in one sentence."""
    classes = counted(report.classes, "class", "classes")
    if "drafter" in report.models:
        known = report.models["target"].classes
        if report.classes < known:
            return f"the drafter proposes {report.classes:,} of the target's {known:,} tokens"
        return f"drafter and target share {classes}"
    if report.aligned:
        return "teacher and student read their own tokens of the same text"
    if report.teacher_cache is not None:
        return f"the teacher's logits come from {report.teacher_cache}: {classes}"
    if report.served_teacher is not None:
        return f"the teacher's logits are {report.served_teacher}: {classes}"
    if report.teachers:
        return f"the student and {len(report.teachers)} teachers share {classes}"
    names = list(report.models)
    if "teacher" not in names:
        return "there is no teacher: the student learns from the labels only"
    return f"{', '.join(names[:-1])} and {names[-1]} share {classes}"


def _cells(data: DataFacts) -> Iterable[str]:
    yield "stream" if data.streamed else str(data.rows)
    yield f"{data.tokens:.0f}"
    yield f"{data.learned:.0f}"
    yield str(data.longest)
    yield f"{data.cut:.0%}"
    yield f"{data.empty:.0%}"


def _padding(report: Report, training: Any) -> str:
    """Describe the padding of the training batches, and what the fields that limit it give."""
    share, sequences = report.train.padding, bool(report.example) and "drafter" not in report.models
    others = {"without either": share.plain, "with training.group_by_length": share.grouped}
    others |= {"with training.packing": share.packed} if sequences else {}
    field = next((f for f in ("packing", "group_by_length") if getattr(training, f)), None)
    own = others.pop("without either" if field is None else f"with training.{field}")
    alike = "; ".join(f"{value:.0%} {how}" for how, value in others.items())
    return f"padding: {own:.0%} of the positions of a batch ({alike})"


def _remarks(report: Report, spec: Any) -> Iterable[str]:
    awaited = report.train.generated + (report.heldout.generated if report.heldout else 0)
    if awaited:
        who = next(iter(report.models))
        answers = counted(awaited, "response")
        yield f"the {who} generates {answers} first, estimated at their maximum length"
    if report.train.streamed:
        first = counted(report.train.rows, "row")
        yield f"the training figures are those of the first {first} of the stream"
    elif report.train.sampled < report.train.rows:
        yield (
            f"the training figures are estimated from {report.train.sampled} of "
            f"{counted(report.train.rows, 'row')}"
        )
    if report.train.padding.plain >= NOTED and not report.train.streamed:  # which can be neither
        yield _padding(report, getattr(spec, "base", spec).training)
    if report.train.cut:
        yield "longer rows are cut at data.max_length"
    if report.train.empty:
        yield "empty rows have no token to learn and are left out"
    for name, data in report.rows.items():
        for note, row in data.notes.items():
            yield f"{name}: {note}, e.g. {row}"
    if report.heldout is None:
        yield "nothing is held out, so nothing will be measured: data.heldout"
    yield from (f"warning: {warning}" for warning in report.warnings)


def _marked(example: Iterable[tuple[str, bool]], console: Console) -> Text:
    """Learned tokens in green or, where there are no colours, between « and »."""
    text = Text()
    for learned, run in groupby(example, key=lambda token: token[1]):
        words = "".join(token for token, _ in run)
        if not learned:
            text.append(words, "dim")
        elif console.is_terminal and not console.no_color:
            text.append(words, "bold green")
        else:
            text.append(f"«{words}»")
    return text


def _count(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= unit:
            return f"{number / unit:.2f}{name}" if unit == 1e9 else f"{number / unit:.1f}{name}"
    return str(number)


_REPORTS: dict[str, Callable[[Console, Any, Any], None]] = {
    "distill": show_report,
    "train-drafter": show_report,
    "compare": _show_comparison,
    "generate-data": show_generation,
    "bench": show_bench_report,
}
