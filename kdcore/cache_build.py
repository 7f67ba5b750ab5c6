"""Make a teacher cache, by running the teacher once over the rows of a spec, and check one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from kdcore.assembly import Assembly
from kdcore.data.best_classes import best_classes
from kdcore.data.collate import batch_of, collate, padding
from kdcore.data.row_key import row_key
from kdcore.data.teacher_cache import (
    Manifest,
    TeacherCache,
    refuse_difference,
    write_shard,
)
from kdcore.distill import read_rows
from kdcore.errors import UserError
from kdcore.models import LoadedModel
from kdcore.objective import Objective
from kdcore.progress import Progress, Silent
from kdcore.protocols import DataSource
from kdcore.records import Row
from kdcore.registry import Registry, installed
from kdcore.runs import Run
from kdcore.specs import DistillSpec
from kdcore.teacher_and_student import TeacherAndStudent
from kdcore.training_arguments import training_arguments
from kdcore.views import ModelView

SHARD = 16_384
"""Learned positions of a shard, at least: what a killed build has to do again."""


def build_cache(
    spec: DistillSpec,
    folder: Path,
    *,
    k: int = 32,
    shard: int = SHARD,
    registry: Registry | None = None,
    progress: Progress | None = None,
) -> TeacherCache:
    """Add the rows of ``data.train`` that the cache lacks to it; make it if there is none.

    k: classes kept at each position. shard: learned positions of a shard, at least.
    Raises UserError for what is wrong with the spec's models and data, when the folder holds
    something else or a cache of another origin, or when another process is building it.
    """
    progress = progress or Silent()
    asked = _Asked.by(spec, registry or installed(), progress)
    manifest = Manifest.of(asked.teacher, asked.classes, k)
    file = folder / "manifest.json"
    if folder.exists() and not file.exists() and any(_others(folder)):
        raise UserError(f"{folder} holds something else", "name another folder (--out)")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            if file.exists():
                refuse_difference(folder, TeacherCache(folder).manifest, asdict(manifest))
            else:
                beside = folder / "manifest.json.part"
                beside.write_text(json.dumps(asdict(manifest), indent=2) + "\n", "utf-8")
                beside.replace(file)
            _fill(folder, manifest, asked, shard, progress)
    except Timeout:
        raise UserError(
            f"another process is building {folder}", "wait for it, or name another folder (--out)"
        ) from None
    return TeacherCache(folder)


def validate_cache(
    folder: Path,
    spec: DistillSpec,
    *,
    registry: Registry | None = None,
    progress: Progress | None = None,
) -> TeacherCache:
    """Check a cache against a spec: its origin, the method's needs, its rows, what it stores.

    Raises UserError for the first thing that is wrong.
    """
    registry = registry or installed()
    cache = TeacherCache(folder)
    cache.check_shards()
    cache.refuse_method(Objective.build(spec.method, Assembly(registry)))
    asked = _Asked.by(spec, registry, progress or Silent())
    cache.refuse_other_origin(asked.teacher, asked.classes)
    cache.refuse_other_rows(asked.rows)
    return cache


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a spec says is to be cached."""

    spec: DistillSpec
    teacher: LoadedModel
    classes: int
    rows: Sequence[Row]

    @classmethod
    def by(cls, spec: DistillSpec, registry: Registry, progress: Progress) -> _Asked:
        if spec.data.responses.by == "teacher" and spec.data.responses.folder is None:
            raise UserError(
                "the teacher's responses would be in the run folder, before there is a run",
                "set data.responses.folder, which the cache and its runs then share",
            )
        source: DataSource = Assembly(registry).build(spec.data.train)
        models = TeacherAndStudent.load(spec, source, progress=progress)
        if models.teacher is None:
            raise UserError("there is no teacher to cache", "name one in the spec: teacher")
        rows, _ = read_rows(source, "train", spec, models.teacher, Run(spec.run), progress)
        return cls(spec, models.teacher, models.classes, rows.rows)


def _others(folder: Path) -> Iterator[Path]:
    """What a build that was killed at its very beginning would not have left."""
    return (path for path in folder.iterdir() if path.name not in ("lock", "manifest.json.part"))


@torch.no_grad()
def _fill(folder: Path, manifest: Manifest, asked: _Asked, shard: int, progress: Progress) -> None:
    """Write the shards of the rows that are not there yet."""
    teacher: Any = asked.teacher.model
    teacher.to(training_arguments(asked.spec, Run(asked.spec.run)).device)
    view, training = ModelView(teacher, asked.classes), asked.spec.training
    known = TeacherCache(folder)
    keyed = {row_key(row): row for row in asked.rows}  # equal rows are one
    missing = [(key, row) for key, row in keyed.items() if key not in known]
    with progress.stage("the teacher reads", len(keyed), len(keyed) - len(missing)) as stage:
        for part in _shards(missing, shard):
            best = []
            for start in range(0, len(part), training.batch_size):
                rows = [row for _, row in part[start : start + training.batch_size]]
                padded = collate(list(enumerate(rows)), padding(asked.teacher.tokenizer))
                batch = batch_of({name: each.to(teacher.device) for name, each in padded.items()})
                logits = view(teacher, batch)
                for place in range(0, int(batch.mask.sum()), training.chunk):
                    linear = logits.linear(slice(place, place + training.chunk))
                    best.append(best_classes(logits.logits(linear), manifest.k))
                stage.advance(len(rows))
            counted = [(key, int(row.mask.sum())) for key, row in part]
            write_shard(folder, manifest, counted, best)


def _shards(rows: Sequence[tuple[bytes, Row]], least: int) -> Iterator[list[tuple[bytes, Row]]]:
    """Rows in their order, as many together as have the least number of learned positions."""
    part: list[tuple[bytes, Row]] = []
    positions = 0
    for key, row in rows:
        part.append((key, row))
        positions += int(row.mask.sum())
        if positions >= least:
            yield part
            part, positions = [], 0
    if part:
        yield part
