"""All mistakes of a spec that could not be resolved, each with its field."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from kdcore.components.registry import Registry
from kdcore.data.source import DataSource
from kdcore.errors import Mistakes, UserError, in_field
from kdcore.jobs.preflight.rows import sampled
from kdcore.models.assembly import Assembly
from kdcore.models.fit.pair import model_kind
from kdcore.models.loading.load import load_model, load_student
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.training import source_field
from kdcore.specs.train_drafter import TrainedSpec
from kdcore.training.arguments import training_arguments
from kdcore.training.method import build_objective

Judge = Callable[[DataSource, str, Any, Sequence[LoadedModel]], Any]
"""`kdcore.jobs.preflight.rows.judge`"""


def raise_all(
    first: UserError, spec: TrainedSpec, registry: Registry, run: Run, judge: Judge
) -> NoReturn:
    """Look for further mistakes in the parts of a spec that do not depend on the first one.

    Args:
        first: The mistake that stopped the preflight.
        spec: The spec.
        registry: The components that the spec may name.
        run: The spec's run folder, which need not exist.
        judge: The function that encodes the rows of a source.

    Raises:
        Mistakes: The first one, and the others.
    """
    found = {first.cause: first}
    for mistake in _mistakes(spec, registry, run, judge):
        if mistake.cause not in found or not found[mistake.cause].field:
            found[mistake.cause] = mistake
    raise Mistakes([*found.values()]) from first


def _mistakes(spec: TrainedSpec, registry: Registry, run: Run, judge: Judge) -> list[UserError]:
    """The mistakes of the method, the training section, the sources, the models and the rows."""
    assembly, wrong = Assembly(registry), list[UserError]()

    def tried(field: str, work: Callable[[], Any]) -> Any:
        try:
            with in_field(field):
                return work()
        except UserError as mistake:
            wrong.append(mistake)
            return None

    tried("method", lambda: build_objective(spec.method, assembly))
    tried("training", lambda: training_arguments(spec, run))
    built: dict[str, DataSource] = {}
    for name, choice in spec.data.sources.items():
        source = tried(source_field(name), partial(assembly.build, choice))
        built |= {} if source is None else {name: source}
    built = sampled(built)
    unread = {name for name, each in built.items() if tried(source_field(name), each.read) is None}
    readers = _models(spec, built["train"], tried) if "train" in built else []
    for name, source in built.items() if readers else ():
        if name in unread:
            continue
        tried(source_field(name), partial(judge, source, name, spec, readers))
    return wrong


def _models(spec: TrainedSpec, rows: DataSource, tried: Callable[..., Any]) -> list[LoadedModel]:
    """The models of a spec, without weights; empty if one cannot be loaded."""
    kind = model_kind(rows)
    if not isinstance(spec, DistillSpec):
        target = tried("target", lambda: load_model(spec.target, weights=False))
        return [target] if target is not None else []
    asked = spec.local_teacher
    teacher = (
        tried("teacher", lambda: load_model(asked, kind=kind, weights=False)) if asked else None
    )
    if teacher is None and (asked or spec.student.model == "teacher"):
        return []
    labels = getattr(rows, "classes", ())
    student = tried(
        "student",
        lambda: load_student(spec.student, teacher, kind=kind, labels=labels, weights=False),
    )
    return [model for model in (teacher, student) if model is not None] if student else []
