"""What the face offers to do: a spec checked and carried out, runs drawn, models loaded.

It imports no torch; each function imports what it needs when it is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import ValidationError

from kdcore.errors import UserError
from kdcore.method.registry import Registry, installed
from kdcore.runs.folder import Run, is_run
from kdcore.runs.progress import Progress
from kdcore.runs.whole_files import beside, write_whole
from kdcore.specs.evaluate import EvaluateSpec
from kdcore.specs.fields import ModelSpec, SpecModel
from kdcore.specs.reading import file
from kdcore.specs.reading.mistakes import mistakes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kdcore.jobs.evaluate import Evaluation
    from kdcore.jobs.preflight.distill import Report
    from kdcore.method.protocols import Drafter
    from kdcore.models.loaded import LoadedModel

Spec: TypeAlias = Path | str | Mapping[str, Any] | SpecModel
"""A spec: the path of its file, what that would hold, or the model that `read_spec` returns."""

_OVERRIDE = "the override"


def read_spec(spec: Spec, *overrides: str, registry: Registry | None = None) -> SpecModel:
    """Read and validate a spec.

    Args:
        spec: A path, a mapping or a spec model. Relative paths in a file are taken from its folder,
            those in a mapping from the working directory.
        *overrides: Assignments such as ``"training.steps=50"``, applied before validation.
        registry: The known components; by default what is installed.

    Returns:
        The spec as a frozen pydantic model.

    Raises:
        UserError: Lists each mistake, with its line or assignment.
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
    """What a run would do, as `check` found out.

    Attributes:
        job: The name of its job.
        spec: The spec as it would be carried out, every default included.
        trainings: What each training would build, learn from and cost: those of a comparison by
            their arms, the only one of another spec by its job; empty where kdcore trains nothing.
        facts: The whole report as plain data, of whichever job.
    """

    job: str
    spec: SpecModel
    trainings: Mapping[str, Report]
    facts: Mapping[str, Any]

    @property
    def training(self) -> Report:
        """The only training.

        Raises:
            UserError: There is none, or there are several.
        """
        if len(self.trainings) != 1:
            raise UserError(
                f"the job {self.job} has {len(self.trainings)} trainings", "read trainings or facts"
            )
        return next(iter(self.trainings.values()))


def check(spec: Spec, *overrides: str, registry: Registry | None = None) -> Plan:
    """Find out what a run would do, without training: what it builds, learns from and costs.

    Args:
        spec: See `read_spec`.
        *overrides: See `read_spec`.
        registry: See `read_spec`.

    Returns:
        The report of the job's preflight.

    Raises:
        UserError: For what would stop the run, and for a job that only measures.
    """
    asked: Any = read_spec(spec, *overrides, registry=registry)
    known = registry or installed()
    job = known.job(asked.job)
    if job.preflight is None:
        raise UserError(f"the job {asked.job} trains nothing to check", "run it")
    found = job.look_ahead(asked, registry=known)
    from kdcore.jobs.preflight.distill import Report

    arms = found if isinstance(found, Mapping) else {job.name: found}
    return Plan(
        job=job.name,
        spec=asked,
        trainings={name: arm for name, arm in arms.items() if isinstance(arm, Report)},
        facts=_plain(found),
    )


def _plain(found: Any) -> Any:
    """A record as a mapping, also where it stands in a mapping."""
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
) -> Run:
    """Carry out the job of a spec.

    Args:
        spec: See `read_spec`.
        *overrides: See `read_spec`.
        resume: Go on with the run in the spec's folder.
        overwrite: Replace that run. What would stop the new one is found out first, where the job
            has a preflight.
        progress: Is told how far the work is; by default nobody is.
        registry: See `read_spec`.

    Returns:
        The run: its folder, its results.

    Raises:
        UserError: For what is wrong with the spec, its inputs or the folder, and for a job that
            leaves no folder: see `evaluate`.
    """
    if resume and overwrite:
        raise UserError("resume and overwrite exclude each other", "give one of them")
    asked: Any = read_spec(spec, *overrides, registry=registry)
    known = registry or installed()
    job = known.job(asked.job)
    if isinstance(asked, EvaluateSpec):
        raise UserError("the job evaluate leaves no run folder", "call kdcore.evaluate with it")
    if not job.run_folder:
        raise UserError(
            f"the job {job.name} leaves no run folder", f"carry it out with `kdcore {job.name}`"
        )
    if overwrite and job.preflight:  # what would stop the new run costs no old one
        job.look_ahead(asked, registry=known)
    done: Run = job.carry_out(
        asked, registry=known, overwrite=overwrite, resume=resume, progress=progress
    )
    return done


def evaluate(
    spec: Spec | Run,
    *overrides: str,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> Evaluation:
    """Measure a model: the job ``evaluate``, which leaves no folder.

    Args:
        spec: See `read_spec`; or a distillation's run or its folder, whose student is measured
            again as that run did.
        *overrides: See `read_spec`.
        progress: See `run`.
        registry: See `read_spec`.

    Returns:
        The figures, with each row's.

    Raises:
        UserError: For what is wrong with the spec, the models or the data.
    """
    from kdcore.jobs.evaluate import evaluate as measured
    from kdcore.jobs.evaluate import spec_of

    if isinstance(spec, Path | str) and is_run(Path(spec)):
        spec = Run(spec)
    if isinstance(spec, Run):
        spec = spec_of(spec)
    asked = read_spec(spec, *overrides, registry=registry)
    if not isinstance(asked, EvaluateSpec):
        raise UserError("this spec is of another job than evaluate", "call kdcore.run with it")
    return measured(asked, registry=registry, progress=progress)


def report(
    *folders: Run | Path | str, out: Path | str | None = None, overwrite: bool = False
) -> Path:
    """Draw runs as one HTML page, which opens from disk and loads nothing.

    Args:
        *folders: Runs or their folders, finished or not.
        out: The page; by default report.html in the run's folder, of several in this one.
        overwrite: Replace that file even if it is no such page.

    Returns:
        The absolute path of the page.

    Raises:
        UserError: For folders that hold no run, and for a page that cannot be written.
    """
    from kdcore.reporting.page import report as page_of

    runs = [each.folder if isinstance(each, Run) else Path(each) for each in folders]
    place = Path(out or (runs[0] / "report.html" if len(runs) == 1 else "report.html"))
    _refuse_other(place, overwrite)
    page = page_of(runs)
    try:
        write_whole(place, page)
    except OSError as fault:
        beside(place).unlink(missing_ok=True)
        raise UserError(
            f"{place} cannot be written: {fault.strerror}", "name another file (out=FILE)"
        ) from fault
    return place.resolve()


def _refuse_other(place: Path, overwrite: bool) -> None:
    """Raises UserError for what is there and is no page of ours, unless it may be replaced."""
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
            f"{place} already exists and is not a page of kdcore report",
            "name another file (out=FILE), or replace it (overwrite=True)",
        )


def load_model(
    model: Path | str,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a frozen language model with its tokenizer, in evaluation mode.

    Args:
        model: A hub id, a folder or a GGUF file, as a spec names one.
        revision: Of a hub id.
        dtype: Of the weights in memory.
        trust_remote_code: Run code that the model's repository ships.

    Returns:
        The model, its tokenizer, its name and the digest of its files.

    Raises:
        UserError: When it is not there, or is no decoder-only model with safetensors weights.
    """
    from kdcore.models.loading import load_model as loaded

    asked = {"model": str(model), "revision": revision, "dtype": dtype}
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
        folder: The folder ``drafter`` of a train-drafter run.
        target: The model that it was trained for, loaded by `load_model` or ``from_pretrained``.
        dtype: Of its weights; by default as they are stored.
        registry: The known components; by default what is installed.

    Returns:
        The drafter, ready to propose, e.g. inside `speculative`.

    Raises:
        UserError: When the folder holds none, or one of another target.
    """
    from kdcore.decoding.drafters.files import load_drafter as loaded
    from kdcore.models.loaded import LoadedModel
    from kdcore.models.loading import already_loaded

    known = target if isinstance(target, LoadedModel) else already_loaded(target)
    return loaded(Path(folder), known, registry or installed(), dtype=dtype)
