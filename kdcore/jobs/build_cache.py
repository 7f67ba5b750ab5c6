"""Make a teacher cache, by running the teacher once over the rows of a spec, and check one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from filelock import FileLock, Timeout

from kdcore.data.best_classes import Best, best_classes
from kdcore.data.responses.endpoint_logprobs import EndpointLogprobs
from kdcore.data.rows import batch_of, collate, padding
from kdcore.data.store import grouped, row_key
from kdcore.data.teacher_cache import Manifest, TeacherCache, refuse_difference, write_shard
from kdcore.errors import UserError
from kdcore.jobs.resolved import ResolvedDistill
from kdcore.method.records import Row
from kdcore.method.registry import Registry, installed
from kdcore.models.loaded import LoadedModel
from kdcore.runs.folder import Run
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.whole_files import write_whole
from kdcore.specs.distill import DistillSpec
from kdcore.specs.generate_data import EndpointSpec
from kdcore.training.arguments import training_arguments
from kdcore.training.rows import read_rows
from kdcore.training.views import ModelView

_Scorer: TypeAlias = Callable[[Sequence[Row]], Iterator[tuple[int, Best]]]
"""Gives (place, best classes at its learned positions) of each of some rows, in any order."""

SHARD = 16_384
"""Learned positions of a shard, at least: what a killed build has to do again."""


def build_cache(
    spec: DistillSpec,
    folder: Path,
    *,
    endpoint: EndpointSpec | None = None,
    k: int = 32,
    shard: int = SHARD,
    registry: Registry | None = None,
    progress: Progress | None = None,
) -> TeacherCache:
    """Add the rows of ``data.train`` that the cache lacks to it; make it if there is none.

    endpoint: where the teacher is, if it is no model here; the spec then names none.
    k: classes kept at each position. shard: learned positions of a shard, at least.
    Raises UserError for what is wrong with the spec's models and data, when the folder holds
    something else or a cache of another origin, or when another process is building it.
    """
    progress = progress or Silent()
    asked = _Asked.by(spec, registry or installed(), progress, endpoint)
    if endpoint is None:
        if spec.teacher is None:
            raise UserError(
                "there is no teacher to cache",
                "name one in the spec (teacher), or one behind an endpoint (--endpoint)",
            )
        manifest = Manifest.of(asked.first, asked.classes, k)
        best_of = _local(asked, manifest.k)
    else:
        manifest = Manifest.of(asked.first, asked.classes, k, endpoint.model)
        at_once = spec.data.responses.batch_size
        best_of = EndpointLogprobs(endpoint, manifest.k, asked.classes, at_once).best
    file = folder / "manifest.json"
    if folder.exists() and not file.exists() and any(_others(folder)):
        raise UserError(f"{folder} holds something else", "name another folder (--out)")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            if file.exists():
                refuse_difference(folder, TeacherCache(folder).manifest, asdict(manifest))
            else:
                write_whole(file, json.dumps(asdict(manifest), indent=2) + "\n")
            _fill(folder, manifest, asked.rows, shard, best_of, progress)
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
    asked = _Asked.by(spec, registry, progress or Silent())
    cache.refuse_method(asked.resolved.method.objective)
    cache.refuse_other_origin(asked.first, asked.classes, is_teacher=spec.teacher is not None)
    cache.keys_of(asked.rows)
    return cache


@dataclass(frozen=True, slots=True)
class _Asked:
    """The rows that a spec's cache is made of, and the models that read them."""

    resolved: ResolvedDistill
    rows: Sequence[Row]

    @property
    def first(self) -> LoadedModel:
        """The teacher or, where the cache takes its place, the student, whose tokenizer it has."""
        return self.resolved.models.first

    @property
    def classes(self) -> int:
        """V, how many classes are compared."""
        return self.resolved.models.classes

    @classmethod
    def by(
        cls,
        spec: DistillSpec,
        registry: Registry,
        progress: Progress,
        endpoint: EndpointSpec | None = None,
    ) -> _Asked:
        if spec.data.responses.by == "teacher" and spec.data.responses.folder is None:
            raise UserError(
                "the teacher's responses would be in the run folder, before there is a run",
                "set data.responses.folder, which the cache and its runs then share",
            )
        if endpoint is not None and spec.teacher is not None:
            raise UserError(
                f"the spec's teacher is {spec.teacher.model}, and the one to ask is behind "
                f"{endpoint.endpoint}",
                "remove teacher from the spec: the cache takes its place",
            )
        run = Run(spec.run)
        resolved = ResolvedDistill.of(
            spec,
            registry,
            run,
            weights=spec.teacher is not None,
            before_cache=True,
            progress=progress,
        )
        models = resolved.models
        if endpoint is not None and not models.first.model.can_generate():
            raise UserError(
                f"{models.first.name} reads no tokens that an endpoint could score",
                "name a local teacher for a classifier: teacher",
            )
        train = resolved.sources["train"]
        rows, _ = read_rows(train, "train", spec, resolved.readers, run, progress)
        return cls(resolved, rows.rows)


def _others(folder: Path) -> Iterator[Path]:
    """What a build that was killed at its very beginning would not have left."""
    return (path for path in folder.iterdir() if path.name not in ("lock", "manifest.json.part"))


def _fill(
    folder: Path,
    manifest: Manifest,
    rows: Sequence[Row],
    shard: int,
    best_of: _Scorer,
    progress: Progress,
) -> None:
    """Write the shards of the rows that are not there yet."""
    known = TeacherCache(folder)
    keyed = {row_key(row): row for row in rows}  # equal rows are one
    missing = [(key, row) for key, row in keyed.items() if key not in known]
    with progress.stage("the teacher reads", len(keyed), len(keyed) - len(missing)) as stage:
        for part in grouped(missing, lambda row: int(row.mask.sum()), shard):
            best: dict[int, Best] = {}
            for place, each in best_of([row for _, row in part]):
                best[place] = each
                stage.advance()
            counted = [(key, int(row.mask.sum())) for key, row in part]
            write_shard(folder, manifest, counted, [best[place] for place in range(len(part))])


def _local(asked: _Asked, k: int) -> _Scorer:
    """Runs the teacher, a batch of rows at a time."""
    teacher: Any = asked.first.model
    asked.first.to(training_arguments(asked.resolved.spec, Run(asked.resolved.spec.run)).device)
    view, training = ModelView(teacher, asked.classes), asked.resolved.spec.training

    @torch.no_grad()
    def best_of(rows: Sequence[Row]) -> Iterator[tuple[int, Best]]:
        for start in range(0, len(rows), training.batch_size):
            part = rows[start : start + training.batch_size]
            padded = collate(list(enumerate(part)), padding(asked.first.tokenizer))
            batch = batch_of({name: each.to(teacher.device) for name, each in padded.items()})
            logits, positions = view(teacher, batch), int(batch.mask.sum())
            chunks = (slice(at, at + training.chunk) for at in range(0, positions, training.chunk))
            best = [best_classes(logits.logits(chunk), k) for chunk in chunks]
            counts = [int(row.mask.sum()) for row in part]
            whole = (torch.cat(each) for each in zip(*best, strict=True))
            by_row = zip(*(torch.split(each, counts) for each in whole), strict=True)
            yield from enumerate(by_row, start)

    return best_of
