"""Functions of the public API: check and run specs, report on runs, load models.

This module does not import torch; each function imports its dependencies when it is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import ValidationError

from kdcore.components.registry import Registry, installed
from kdcore.errors import UserError
from kdcore.runs.folder import Run
from kdcore.runs.progress import Progress
from kdcore.runs.whole_files import unwritable, write_text
from kdcore.specs.evaluate import EvaluateSpec
from kdcore.specs.parts.fields import ModelSpec, SpecModel
from kdcore.specs.reading import file
from kdcore.specs.reading.mistakes import mistakes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kdcore.decoding.protocols import Drafter
    from kdcore.jobs.evaluate import Evaluation
    from kdcore.jobs.preflight.report import Report
    from kdcore.jobs.ray_workers import Cluster
    from kdcore.models.loading.loaded import LoadedModel
    from kdcore.reporting.table_text import TableFormat

Spec: TypeAlias = Path | str | Mapping[str, Any] | SpecModel
"""A spec: the path of its file, its contents as a mapping, or the model from `read_spec`."""

_OVERRIDE = "the override"


def read_spec(spec: Spec, *overrides: str, registry: Registry | None = None) -> SpecModel:
    """Read and validate a spec.

    Args:
        spec: A path, a mapping or a spec model. Paths in a file are relative to its folder, those
            in a mapping to the working directory.
        *overrides: Assignments such as ``"training.steps=50"``, applied before validation.
        registry: Known components (default: the installed ones).

    Returns:
        The spec as a frozen pydantic model.

    Raises:
        UserError: The spec is invalid; the message lists each mistake with its line or assignment.
    """
    if isinstance(spec, Path | str):
        return file.read_spec(Path(spec), overrides, registry=registry, given_as=_OVERRIDE)
    if isinstance(spec, SpecModel):
        if not overrides:
            return spec
        spec = spec.model_dump(mode="json")
    return file.validate_spec(spec, Path(), overrides, registry=registry, given_as=_OVERRIDE)


@dataclass(frozen=True, slots=True)
class Plan:
    """Report of `check`.

    Attributes:
        job: Name of the job.
        spec: Resolved spec, with every default.
        trainings: Report of each training (components, data, estimated cost): by arm for a
            comparison, else by job; empty for a job that does not train.
        facts: Whole report as plain data, for any job.
    """

    job: str
    spec: SpecModel
    trainings: Mapping[str, Report]
    facts: Mapping[str, Any]

    def __repr__(self) -> str:
        """One line in a notebook; the spec and the facts are pages."""
        return f"Plan({self.job}, trainings={list(self.trainings)})"

    @property
    def training(self) -> Report:
        """Report of the only training.

        Raises:
            UserError: The plan has no training, or several.
        """
        if len(self.trainings) != 1:
            raise UserError(
                f"the job {self.job} has {len(self.trainings)} trainings", "read trainings or facts"
            )
        return next(iter(self.trainings.values()))


def check(spec: Spec, *overrides: str, registry: Registry | None = None) -> Plan:
    """Validate a spec and estimate its cost, without training.

    Args:
        spec: See `read_spec`.
        *overrides: See `read_spec`.
        registry: See `read_spec`.

    Returns:
        The report of the job's preflight.

    Raises:
        UserError: The run would fail, or the job has no check.
    """
    asked: Any = read_spec(spec, *overrides, registry=registry)
    known = registry or installed()
    job = known.job(asked.job)
    if job.preflight is None:
        raise UserError(f"job '{asked.job}' does not have a check", "run the spec")
    with _placing(spec, overrides):
        found = job.look_ahead(asked, registry=known)
    from kdcore.jobs.preflight.report import Report

    arms = found if isinstance(found, Mapping) else {job.name: found}
    return Plan(
        job=job.name,
        spec=asked,
        trainings={name: arm for name, arm in arms.items() if isinstance(arm, Report)},
        facts=_plain(found),
    )


def _plain(found: Any) -> Any:
    """Convert records to mappings, also inside a mapping."""
    if isinstance(found, Mapping):
        return {name: _plain(each) for name, each in found.items()}
    return dataclasses.asdict(found) if dataclasses.is_dataclass(found) else found  # type: ignore[arg-type]


def run(
    spec: Spec,
    *overrides: str,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    registry: Registry | None = None,
    on: Cluster | None = None,
    share: tuple[int, int] | None = None,
) -> Run:
    """Run the job of a spec.

    Args:
        spec: See `read_spec`.
        *overrides: See `read_spec`.
        resume: Whether to resume the run in the spec's folder.
        overwrite: Whether to replace that run. If the job has a preflight, it checks the new run
            first.
        progress: Receiver of progress reports (default: none).
        registry: See `read_spec`.
        on: ``"ray"`` to spread the work over a Ray cluster (compare and generate-data).
        share: (n, m) to do the n-th of m shares of the work (compare), as other machines do theirs.

    Returns:
        The run, with its folder and results.

    Raises:
        UserError: The spec, its inputs or the folder are invalid, the job does not write a run
            folder (see `evaluate`), or it cannot be spread over a cluster or divided into shares.
    """
    if resume and overwrite:
        raise UserError("resume and overwrite exclude each other", "set one of them to False")
    asked: Any = read_spec(spec, *overrides, registry=registry)
    known = registry or installed()
    job = known.job(asked.job)
    if isinstance(asked, EvaluateSpec):
        raise UserError(
            "the job evaluate does not write a run folder", "call kdcore.evaluate with the spec"
        )
    if not job.run_folder:
        raise UserError(
            f"the job {job.name} does not write a run folder",
            f"run the spec with `kdcore {job.name}`",
        )
    if on and not job.spreads:
        spread = ", ".join(each.name for each, _ in known.jobs() if each.spreads)
        raise UserError(
            f"the job {job.name} cannot be spread over a cluster",
            f"run it without on={on!r}; these jobs can be spread: {spread}",
        )
    if share and not job.shares:
        divided = ", ".join(each.name for each, _ in known.jobs() if each.shares)
        raise UserError(
            f"the job {job.name} cannot be divided into shares",
            f"run it without share={share}; these jobs can be divided: {divided}",
        )
    where: dict[str, Any] = {"on": on} if on else {}
    where |= {"share": share} if share else {}
    with _placing(spec, overrides):
        if overwrite and job.preflight:  # a mistake in the new run must not cost the old one
            job.look_ahead(asked, registry=known)
        done: Run = job.carry_out(
            asked, registry=known, overwrite=overwrite, resume=resume, progress=progress, **where
        )
    return done


def _placing(spec: Spec, overrides: Sequence[str]) -> AbstractContextManager[None]:
    """`kdcore.specs.reading.file.placing` of a spec that is a file."""
    if isinstance(spec, Path | str):
        return file.placing(Path(spec), overrides, given_as=_OVERRIDE)
    return nullcontext()


def evaluate(
    spec: Spec | Run,
    *overrides: str,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> Evaluation:
    """Evaluate a model: the job ``evaluate``, which does not write a run folder.

    Args:
        spec: See `read_spec`; or a distillation run or its folder, whose student is evaluated
            with the settings of that run.
        *overrides: See `read_spec`.
        progress: See `run`.
        registry: See `read_spec`.

    Returns:
        The metrics, overall and for each row.

    Raises:
        UserError: The spec, the models or the data are invalid.
    """
    from kdcore.jobs.evaluate import evaluate as measured
    from kdcore.jobs.evaluate import spec_of

    if isinstance(spec, Path | str) and not _names_a_file(Path(spec)):
        spec = Run(spec)
    if isinstance(spec, Run):
        spec = spec_of(spec)
    asked: Any = read_spec(spec, *overrides, registry=registry)
    if not isinstance(asked, EvaluateSpec):
        raise UserError(
            f"the spec names the job {asked.job}, not evaluate", "call kdcore.run with the spec"
        )
    with _placing(spec, overrides):
        return measured(asked, registry=registry, progress=progress)


def _names_a_file(path: Path) -> bool:
    """Whether a path is meant as a spec file, and not as a run folder."""
    return path.is_file() or (path.suffix in (".yaml", ".yml") and not path.is_dir())


def report(
    *folders: Run | Path | str, out: Path | str | None = None, overwrite: bool = False
) -> Path:
    """Write an HTML page about runs, which opens from disk and requires no network.

    Args:
        *folders: Runs or their folders, finished or not.
        out: Page to write (default: report.html in the run's folder; in the working directory for
            several runs).
        overwrite: Whether to replace the file even if it is not a report.

    Returns:
        The absolute path of the page.

    Raises:
        UserError: A folder does not contain a run, or the page cannot be written.
    """
    from kdcore.reporting.page import report as page_of

    runs = [each.folder if isinstance(each, Run) else Path(each) for each in folders]
    place = Path(out or (runs[0] / "report.html" if len(runs) == 1 else "report.html"))
    _refuse_other(place, overwrite)
    page = page_of(runs)
    try:
        write_text(place, page)
    except OSError as fault:
        raise unwritable(place, fault, "name another file (out=FILE)") from fault
    return place.resolve()


def table(
    *folders: Run | Path | str, form: TableFormat = "markdown", metrics: str | Sequence[str] = ()
) -> str:
    """Write the results of runs as a table for a paper or another program.

    One run gives the table of its own job: held-out figures, a comparison or a benchmark. Several
    finished runs are compared with the first one, from their stored held-out rows; runs that differ
    only in their seed and folder are the seeds of one arm.

    Args:
        *folders: Runs or their folders.
        form: ``"markdown"``, ``"latex"`` (for the package booktabs), or ``"csv"``, which has one
            line for each figure, with full precision.
        metrics: Names of the figures of a comparison to show, in this order, or one name (default:
            all).

    Returns:
        The text, with the intervals of all differences.

    Raises:
        UserError: A folder does not contain a run, a run has no results, the runs were measured on
            different rows, or the format or a metric is unknown.
    """
    from kdcore.reporting.table_text import as_text, tables_of_runs

    places = [each.folder if isinstance(each, Run) else Path(each) for each in folders]
    chosen = [metrics] if isinstance(metrics, str) else metrics
    return as_text(tables_of_runs(places, chosen), form)


def _refuse_other(place: Path, overwrite: bool) -> None:
    """Raise UserError if the path exists and is not a report, unless it may be replaced."""
    from kdcore.reporting.page import is_report

    if not place.exists():
        return
    if not place.is_file():
        raise UserError(f"{place} is not a regular file", "name another file (out=FILE)")
    try:
        ours = overwrite or is_report(place)
    except OSError:
        ours = False
    if not ours:
        raise UserError(
            f"{place} already exists and is not a report of kdcore",
            "name another file (out=FILE), or replace it (overwrite=True)",
        )


def load_model(
    model: Path | str,
    *,
    revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
    trust_remote_code: bool = False,
    **fields: Any,
) -> LoadedModel:
    """Load a frozen language model with its tokenizer, in evaluation mode.

    Args:
        model: Hub id, folder or GGUF file, as in a spec.
        revision: Revision on the hub.
        dtype: Dtype of the weights in memory.
        trust_remote_code: Whether to run the Python code in the model's repository.
        **fields: Other fields of a model in a spec: ``attention``, ``device``, ``quantization``,
            ``adapter``, ``subfolder``, ``template`` and ``template_arguments``.

    Returns:
        The model, its tokenizer, its name and the digest of its files.

    Raises:
        UserError: A field is unknown or invalid, the model does not exist, or it is not a
            decoder-only model with safetensors weights.
    """
    from kdcore.models.loading.load import load_model as loaded

    asked = {"model": str(model), "revision": revision, "dtype": dtype, **fields}
    try:
        spec = ModelSpec.model_validate(asked | {"trust_remote_code": trust_remote_code})
    except ValidationError as wrong:
        first = mistakes(wrong, ModelSpec)[0]
        raise UserError(f"{first.dotted}: {first.what}", first.cure) from wrong
    return loaded(spec)


def load_drafter(
    folder: Path | str,
    target: LoadedModel | PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    registry: Registry | None = None,
) -> Drafter:
    """Load a trained drafter, bound to its target.

    Args:
        folder: Folder ``drafter`` of a train-drafter run.
        target: Model that the drafter was trained for, from `load_model` or ``from_pretrained``.
        dtype: Dtype of the drafter's weights (default: the stored dtype).
        registry: Known components (default: the installed ones).

    Returns:
        The drafter, ready to propose, e.g. inside `speculative`.

    Raises:
        UserError: The folder does not contain a drafter, or the drafter has another target.
    """
    from kdcore.decoding.drafters.files import load_drafter as loaded
    from kdcore.models.loading.load import already_loaded
    from kdcore.models.loading.loaded import LoadedModel

    known = target if isinstance(target, LoadedModel) else already_loaded(target)
    return loaded(Path(folder), known, registry or installed(), dtype=dtype)
