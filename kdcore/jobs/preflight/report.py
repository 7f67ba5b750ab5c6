"""The findings of the preflight of a job that trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kdcore.jobs.preflight.drafter_cost import DrafterCost
from kdcore.jobs.preflight.rows import DataFacts
from kdcore.jobs.preflight.teachers import TeacherFacts
from kdcore.method.schedule import Points
from kdcore.models.facts import ModelFacts


@dataclass(frozen=True, slots=True)
class Report:
    """The findings about a spec that trains a student or a drafter.

    Attributes:
        components: Kind, name and distribution with version of each chosen component.
        terms: Term of the loss -> scheduled weight.
        streams: Stream -> the terms that share a backward pass.
        models: Role, e.g. teacher or student -> facts of the model.
        classes: V, the number of classes that the loss compares.
        train: The training rows.
        heldout: The held-out rows, or None.
        auxiliary: The auxiliary rows, or None.
        example: The first row's tokens, each with whether it is learned.
        steps: Optimizer steps of the run.
        memory: Purpose -> bytes.
        seconds: Purpose -> seconds; see `kdcore.jobs.preflight.estimates`.
        disk: Purpose -> maximum of bytes, beside the run's own files.
        teacher_cache: The folder or URL of the teacher cache that training reads, or None.
        aligned: Whether teacher and student read their own tokens of the same text.
        served_teacher: The name and the servers of a served teacher, or None.
        sampler: The name and the server of what samples the student's responses, or None.
        warnings: What the spec allows but is probably a mistake.
        adapted: Parameters that LoRA trains; None for a student without adapters.
        teachers: The several teachers; empty for a single one.
        drafting: The cost of an untrained drafter's rounds here; None for a student.
        servers: Whether the run waits for servers too, whose time ``seconds`` leaves out.
        auxiliary_terms: Term of the loss on auxiliary rows -> scheduled weight.
        matched: What each matcher compares, as a line.
    """

    components: tuple[tuple[str, str, str], ...]
    terms: Mapping[str, float | Points]
    streams: Mapping[str, tuple[str, ...]]
    models: Mapping[str, ModelFacts]
    classes: int
    train: DataFacts
    heldout: DataFacts | None
    example: tuple[tuple[str, bool], ...]
    steps: int
    memory: Mapping[str, int]
    seconds: Mapping[str, float]
    disk: Mapping[str, int] = field(default_factory=dict)
    teacher_cache: Path | str | None = None
    aligned: bool = False
    served_teacher: str | None = None
    sampler: str | None = None
    warnings: tuple[str, ...] = ()
    adapted: int | None = None
    teachers: tuple[TeacherFacts, ...] = ()
    drafting: DrafterCost | None = None
    servers: bool = False
    auxiliary: DataFacts | None = None
    auxiliary_terms: Mapping[str, float | Points] = field(default_factory=dict)
    matched: tuple[str, ...] = ()

    @property
    def rows(self) -> dict[str, DataFacts]:
        """Field of ``data`` -> its rows, those that there are."""
        every = {"train": self.train, "auxiliary": self.auxiliary, "heldout": self.heldout}
        return {name: facts for name, facts in every.items() if facts is not None}
