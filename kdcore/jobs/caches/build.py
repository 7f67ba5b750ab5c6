"""Build a teacher cache by running the teacher once over the rows of a spec; validate a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kdcore.components.registry import Registry, installed
from kdcore.data.best_classes import Best, best_classes, refuse_more_classes
from kdcore.data.caches.manifest import Manifest, manifest_of
from kdcore.data.caches.shard_folder import (
    MANIFEST,
    SHARD_BYTES,
    Location,
    names_in,
    next_shard,
)
from kdcore.data.caches.teacher_cache import TeacherCache, write_shard
from kdcore.data.responses.endpoint.logprobs import EndpointLogprobs
from kdcore.data.rows import batch_of, collate, lengths_of, padding, row_keys
from kdcore.data.store import grouped
from kdcore.errors import UserError
from kdcore.jobs.caches.writing import being_written
from kdcore.jobs.ray_workers import Cluster, connected, differs_here, spread
from kdcore.jobs.resolution.resolved import ResolvedDistill
from kdcore.method.records import Row
from kdcore.models.device import chunk_on
from kdcore.models.facts import not_finite
from kdcore.models.loading.load import digest_of
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.folder import Run
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.today import pinned, today
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.endpoint import EndpointSpec
from kdcore.training.arguments import training_arguments
from kdcore.training.model_view import ModelView
from kdcore.training.rows import read_rows

_Scorer: TypeAlias = Callable[[Sequence[Row]], Iterator[tuple[int, Best]]]
"""Yields (place, best classes at the learned positions) for each of the rows, in any order."""
_Part: TypeAlias = list[tuple[bytes, int]]
"""Keys and places of the rows of a shard."""
_Advance: TypeAlias = Callable[[int], None]
_Parts: TypeAlias = Callable[[Sequence[_Part], _Advance], Iterator[tuple[int, list[Best]]]]
"""Yields (place of a part, best classes of its rows), and tells the number of rows."""

SHARD, MOST_SHARDS = 16_384, 10_000
"""Minimum of learned positions per shard, which is the work that a killed build must repeat; and
the number of shards above which it is larger. `SHARD_BYTES` ends a shard in any case."""


def build_cache(
    spec: DistillSpec,
    folder: Location,
    *,
    endpoint: EndpointSpec | None = None,
    k: int = 32,
    shard: int | None = None,
    share: tuple[int, int] = (1, 1),
    registry: Registry | None = None,
    progress: Progress | None = None,
    on: Cluster | None = None,
) -> TeacherCache:
    """Create the cache if the folder has none, and add the missing rows of ``data.train``.

    Chat templates print the date of the first build.

    Args:
        spec: The distill spec whose training rows are cached.
        folder: The cache's folder, or its URL.
        endpoint: The endpoint that serves the teacher, if the spec does not name one.
        k: Number of classes kept at each position.
        shard: Minimum of learned positions per shard (default: `least_of_shard`).
        share: (n, m): add the n-th of m shares of the rows; other builders add the others, to the
            same URL or each to a folder of its own (see `kdcore.jobs.caches.merge`).
        registry: The components that the spec may name (default: the installed ones).
        progress: The display of stages and notes (default: none).
        on: The cluster whose workers compute the shards (default: this process).

    Returns:
        The completed cache.

    Raises:
        UserError: The spec's models or data are wrong, the folder holds other files or a cache of
            a different origin, another process is building the cache, or the cluster cannot be
            used.
    """
    endpoint = endpoint or spec.served_teacher
    if on and endpoint is not None:
        raise UserError(
            "the teacher is behind an endpoint, which computes wherever the command runs",
            "remove --on",
        )
    known = manifest_of(folder).date if MANIFEST in names_in(folder) else None
    with pinned(known or str(today().date())), connected(on):
        reads, progress = registry or installed(), progress or Silent()
        answers = spec.data.responses.by == "teacher"
        asked = _Asked.by(spec, reads, progress, endpoint, weights=on is None or answers)
        _build(asked, folder, endpoint, k, shard, share, progress, on)
    return TeacherCache(folder)


def _build(
    asked: _Asked,
    folder: Location,
    endpoint: EndpointSpec | None,
    k: int,
    shard: int | None,
    share: tuple[int, int],
    progress: Progress,
    on: Cluster | None,
) -> None:
    spec = asked.resolved.spec
    if endpoint is None:
        if spec.local_teacher is None:
            raise UserError(
                "the spec does not name a teacher to cache",
                "set teacher in the spec, or name a teacher behind an endpoint with --endpoint",
            )
        teacher = asked.first
        if on:  # it has no weights in this process
            teacher = replace(teacher, digest=digest_of(spec.local_teacher))
        manifest = Manifest.of(teacher, asked.classes, k)
        best_of = (
            _on_ray(spec, manifest, progress)
            if on
            else _here(asked.rows, _local(asked, manifest.k))
        )
    else:
        manifest = Manifest.of(asked.first, asked.classes, k, endpoint.model)
        scorer = EndpointLogprobs(endpoint, manifest.k, asked.classes)
        best = partial(scorer.best, at_once=spec.data.responses.batch_size)
        best_of = _here(asked.rows, best)
    try:
        objective = asked.resolved.method.objective
        stored = f"{folder} will contain only"
        refuse_more_classes(objective, manifest.k, manifest.classes, stored, "set --k")
    except UserError as narrow:  # other methods can read the cache
        progress.note(f"warning: {narrow.cause}; for this spec's method, {narrow.cure}")
    with being_written(folder, manifest) as refuse_other:
        _fill(folder, manifest, asked.rows, shard, share, best_of, progress, refuse_other)


def validate_cache(
    folder: Location,
    spec: DistillSpec,
    *,
    registry: Registry | None = None,
    progress: Progress | None = None,
) -> TeacherCache:
    """Check a cache against a spec: origin, number of classes, rows and contents of the shards.

    Args:
        folder: The cache's folder, or its URL.
        spec: The distill spec that would read the cache.
        registry: The components that the spec may name (default: the installed ones).
        progress: The display of stages and notes (default: none).

    Returns:
        The cache, opened.

    Raises:
        UserError: A check failed; the message states the first failure.
    """
    registry = registry or installed()
    cache = TeacherCache(folder)
    cache.check_shards()
    with pinned(cache.manifest.date or ""):
        asked = _Asked.by(spec, registry, progress or Silent())
        cache.refuse_method(asked.resolved.method.objective)
        cache.refuse_other_origin(
            asked.first, asked.classes, is_teacher=spec.local_teacher is not None
        )
        cache.keys_of(asked.rows)
    return cache


@dataclass(frozen=True, slots=True)
class _Asked:
    """The rows that a spec's cache is built from, and the models that read them."""

    resolved: ResolvedDistill
    rows: Sequence[Row]

    @property
    def first(self) -> LoadedModel:
        """The teacher, or the student that replaces it: both have the tokenizer of the rows."""
        return self.resolved.models.answerer

    @property
    def classes(self) -> int:
        """V, the number of classes that are compared."""
        return self.resolved.models.answered_classes

    @classmethod
    def by(
        cls,
        spec: DistillSpec,
        registry: Registry,
        progress: Progress,
        endpoint: EndpointSpec | None = None,
        *,
        weights: bool = True,
    ) -> _Asked:
        if spec.data.responses.by == "teacher" and spec.data.responses.folder is None:
            raise UserError(
                "the teacher's responses belong in the run folder, which does not exist yet",
                "set data.responses.folder, so that the cache and its runs share the responses",
            )
        if spec.teachers:
            raise UserError(
                f"the spec names {len(spec.teachers)} teachers, and a cache has the logits of one",
                "write a spec with one of them as teacher, and with the rows that it teaches",
            )
        if endpoint is not None and spec.teacher not in (None, endpoint):
            raise UserError(
                f"the spec names the teacher {spec.teacher.model}, and --endpoint names another "
                f"teacher behind {endpoint.endpoint}",
                "remove teacher from the spec: the cache takes its place",
            )
        run = Run(spec.run, planned=True)
        resolved = ResolvedDistill.of(
            spec,
            registry,
            run,
            weights=weights and spec.local_teacher is not None,
            before_cache=True,
            progress=progress,
        )
        models = resolved.models
        if endpoint is not None and not models.answerer.model.can_generate():
            raise UserError(
                f"{models.answerer.name} is a classifier, and an endpoint scores only text",
                "set teacher to a local model, and remove --endpoint",
            )
        train = resolved.sources["train"]
        readers = [models.answerer] if models.aligned else resolved.readers
        rows = read_rows(train, "train", spec, readers, run, progress, registry)
        return cls(resolved, rows.encoded.rows)


def _fill(
    folder: Location,
    manifest: Manifest,
    rows: Sequence[Row],
    shard: int | None,
    share: tuple[int, int],
    best_of: _Parts,
    progress: Progress,
    refuse_other: Callable[[], None],
) -> None:
    """Write the shards of the missing rows."""
    known, (number, shares) = TeacherCache(folder), share
    keyed = {  # equal rows are one
        key: place
        for place, key in enumerate(row_keys(rows))
        if int.from_bytes(key[:8], "little") % shares == number - 1
    }
    missing = [(key, place) for key, place in keyed.items() if key not in known]
    least = shard or least_of_shard(int(lengths_of(rows).sum()), manifest)
    parts = list(grouped(missing, lambda place: int(rows[place].mask.sum()), least))
    with progress.stage("run the teacher", len(keyed), len(keyed) - len(missing)) as stage:
        first = next_shard(folder)
        for number, best in best_of(parts, stage.advance):
            counted = [(key, int(rows[place].mask.sum())) for key, place in parts[number]]
            refuse_other()
            write_shard(folder, manifest, counted, best, first + number)


def least_of_shard(positions: int, manifest: Manifest) -> int:
    """The minimum of learned positions of a shard; the last row goes beyond it.

    Args:
        positions: Number of learned positions of the cache.
        manifest: Its manifest.
    """
    least = max(SHARD, positions // MOST_SHARDS)
    return max(1, min(least, SHARD_BYTES // manifest.bytes_per_position))


def _here(rows: Sequence[Row], best_of: _Scorer) -> _Parts:
    """Return a function that scores the rows of parts in this process."""

    def scored(parts: Sequence[_Part], advance: _Advance) -> Iterator[tuple[int, list[Best]]]:
        for number, part in enumerate(parts):
            best: dict[int, Best] = {}
            for place, each in best_of([rows[place] for _, place in part]):
                best[place] = each
                advance(1)
            yield number, [best[place] for place in range(len(part))]

    return scored


def _on_ray(spec: DistillSpec, manifest: Manifest, progress: Progress) -> _Parts:
    """Return a function that scores the rows of parts on a cluster, in any order."""

    def scored(parts: Sequence[_Part], advance: _Advance) -> Iterator[tuple[int, list[Best]]]:
        asked, date = spec.model_dump(mode="json"), str(today().date())
        work = BestOfWorker(asked, manifest.teacher, manifest.k, date)

        def died(number: int, line: str) -> None:
            progress.note(f"shard {number + 1} of {len(parts)}: {line}")

        for number, best in spread(work, parts, died=died):
            if isinstance(best, UserError):
                raise best
            advance(len(parts[number]))
            yield number, best

    return scored


@dataclass
class BestOfWorker:
    """What a worker of a cluster does: it loads the teacher once, and scores parts of the rows.

    Attributes:
        asked: The distill spec as plain data.
        teacher: Digest of the teacher.
        k: Number of classes kept at each position.
        date: The date that chat templates print.
    """

    asked: dict[str, Any]
    teacher: str
    k: int
    date: str

    def __call__(self, part: _Part) -> list[Best]:
        """Score the rows of a part, joined; see `best_classes`."""
        with pinned(self.date):
            rows, best_of = self._loaded
        own = [rows[place] for _, place in part if place < len(rows)]
        if list(row_keys(own)) != [key for key, _ in part]:
            raise differs_here("the rows of data.train")
        best = dict(best_of(own))
        joined = zip(*(best[place] for place in range(len(part))), strict=True)
        ids, logp, tail = (torch.cat(each).cpu() for each in joined)
        return [(ids, logp, tail)]

    @cached_property
    def _loaded(self) -> tuple[Sequence[Row], _Scorer]:
        asked = _Asked.by(DistillSpec.model_validate(self.asked), installed(), Silent())
        if asked.first.digest != self.teacher:
            raise differs_here("the teacher's files")
        return asked.rows, _local(asked, self.k)


def _local(asked: _Asked, k: int) -> _Scorer:
    """Return a scorer that runs the local teacher on batches of rows."""
    teacher: Any = asked.first.model
    asked.first.to(
        training_arguments(asked.resolved.spec, Run(asked.resolved.spec.run, planned=True)).device
    )
    view, training = ModelView(teacher, asked.classes), asked.resolved.spec.training
    length = chunk_on(teacher.device, training.chunk, asked.classes)

    def finite(values: Tensor) -> Tensor:
        if not values.amax(-1).isfinite().all():
            raise not_finite(asked.first.name)
        return values

    @torch.no_grad()
    def best_of(rows: Sequence[Row]) -> Iterator[tuple[int, Best]]:
        for start in range(0, len(rows), training.batch_size):
            part = rows[start : start + training.batch_size]
            padded = collate(list(enumerate(part)), padding(asked.first.tokenizer))
            batch = batch_of(padded, teacher.device)
            logits, positions = view(teacher, batch), int(batch.mask.sum())
            chunks = (slice(at, at + length) for at in range(0, positions, length))
            best = [best_classes(finite(logits.logits(chunk)), k) for chunk in chunks]
            counts = [int(row.mask.sum()) for row in part]
            whole = (torch.cat(each) for each in zip(*best, strict=True))
            by_row = zip(*(torch.split(each, counts) for each in whole), strict=True)
            yield from enumerate(by_row, start)

    return best_of
