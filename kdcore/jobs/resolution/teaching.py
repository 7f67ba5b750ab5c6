"""What teaches the student of a distillation: its `Teacher`, made of a resolved spec."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import numpy as np

from kdcore.data.alignment.paired_rows import PairedRows, PairedSource
from kdcore.data.alignment.prompted_rows import PromptedRows, PromptedSource
from kdcore.data.responses.on_policy import prompt_of
from kdcore.data.rows import padding, refuse_long_rows, teachers_of
from kdcore.errors import UserError
from kdcore.jobs.resolution.resolved import ResolvedDistill
from kdcore.method.records import Row
from kdcore.models.anatomy import context_of
from kdcore.models.facts import positions_of
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.folder import Run
from kdcore.runs.inputs import settle
from kdcore.runs.progress import Progress
from kdcore.specs.distill import DistillSpec
from kdcore.training.rows import TrainingRows
from kdcore.training.teachers.following import FollowingTeacher
from kdcore.training.teachers.kinds import (
    AlignedTeacher,
    CachedTeacher,
    LiveTeacher,
    NoTeacher,
    PromptedTeacher,
    RequestedTeacher,
    Teacher,
)
from kdcore.training.teachers.mixture import Mixture
from kdcore.training.teachers.row_weights import RowWeights
from kdcore.training.trainer.matching import matched_by


def teacher_of(
    resolved: ResolvedDistill,
    train: TrainingRows,
    progress: Progress,
    connections: ExitStack,
) -> Teacher:
    """Open what teaches the student of a spec.

    Args:
        resolved: The resolved spec.
        train: The training rows.
        progress: Receiver of notes.
        connections: Closes the connections to servers.

    Returns:
        The teacher.

    Raises:
        UserError: The teacher does not have all rows, cannot read the longest, or cannot be
            reached.
    """
    models, rows = resolved.models, train.encoded.rows
    pad = padding(models.answerer.tokenizer)
    if isinstance(train.source, PairedSource):
        context = context_of(models.answerer.model)
        theirs = PairedRows(train.source, train.encoded, pad, context)
        refuse_long_rows(theirs.rows, [models.answerer])
        return AlignedTeacher(_local(resolved, theirs.rows), theirs)
    if isinstance(train.source, PromptedSource):
        prompted = PromptedRows(train.source, train.encoded, pad)
        refuse_long_prompts(prompted.rows, models.answerer, resolved.spec)
        return PromptedTeacher(_local(resolved, prompted.rows), prompted)
    served = resolved.served(connections, progress)
    examples = train.examples() if served else ()
    for each in served.values():
        arguments = resolved.spec.student.template_arguments
        each.refuse_other_text(models.first.tokenizer, examples, arguments)
    if not resolved.spec.teachers:
        requested = map(RequestedTeacher, served.values())
        return next(requested, None) or _local(resolved, rows)
    weights, said = RowWeights.of(resolved.spec), teachers_of(rows)
    found: dict[str, Teacher] = {n: RequestedTeacher(each) for n, each in served.items()}
    for name, model in models.several.items():
        found[name] = LiveTeacher.of(model.model, models.classes)
    for name, cache in resolved.caches.items():
        taught = np.array([name in weights.teaches(each) for each in said])
        found[name] = CachedTeacher(cache, cache.keys_of(rows, taught))
    return Mixture({n: found[n] for n in weights.names}, weights, models.classes)


def refuse_long_prompts(rows: Iterable[Row], teacher: LoadedModel, spec: DistillSpec) -> None:
    """Check that a teacher can read its own rows, whose prompts ``data.teacher_prompt`` writes.

    Args:
        rows: The teacher's rows.
        teacher: The teacher.
        spec: The spec, which says how long sampled responses may be.

    Raises:
        UserError: A row is longer than the teacher's context.
    """
    context, sampled = context_of(teacher.model), spec.data.on_policy
    for row in rows:
        positions = positions_of(row)
        if sampled is not None and sampled.probability:
            positions = max(positions, len(prompt_of(row)) - 1 + sampled.max_new_tokens)
        if context is not None and positions > context:
            raise UserError(
                f"{row.id} has {positions} tokens with the teacher's prompt, but the context of "
                f"{teacher.name} is {context}",
                "shorten data.teacher_prompt or the row, or set a smaller "
                "data.on_policy.max_new_tokens",
                "data.teacher_prompt",
            )


def settle_teachers(run: Run, name: str, spec: DistillSpec, rows: Sequence[Row]) -> None:
    """Check which teachers rows name, and record it as an input of a run.

    Args:
        run: The run.
        name: The source's field in ``data``.
        spec: The spec of the run.
        rows: The rows of the source.

    Raises:
        UserError: A row names a teacher that the spec lacks.
        OtherInput: The rows named other teachers when the run started.
    """
    if not spec.teachers:
        return
    said = teachers_of(rows)
    first = {each: place for place, each in reversed([*enumerate(said)]) if each}
    RowWeights.of(spec).refuse((rows[first[each]].id, each) for each in reversed(first))
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    settle(run, f"the teachers of data.{name}", spec.data.sources[name].dump(), digest)


def _local(resolved: ResolvedDistill, rows: Sequence[Row]) -> Teacher:
    """The teacher of rows in its own tokens, which asks no server."""
    models, cache, live = resolved.models, resolved.cache, None
    if models.teacher is not None:
        _, matched = matched_by(resolved.method.objective)
        live = LiveTeacher.of(models.teacher.model, models.answered_classes, matched)
        if (rate := resolved.spec.method.teacher_follows) is not None:
            live = FollowingTeacher(live.view, live.model, rate)
    if cache is not None:
        return CachedTeacher(cache, cache.keys_of(rows), live)
    return live or NoTeacher()
