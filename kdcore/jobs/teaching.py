"""What teaches the student of a distillation: its `Teacher`, made of a resolved spec."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from kdcore.data.alignment.paired_rows import PairedRows, PairedSource
from kdcore.data.rows import padding, refuse_long_rows
from kdcore.jobs.resolved import ResolvedDistill
from kdcore.method.records import Row
from kdcore.runs.progress import Progress
from kdcore.training.matching import matched_states
from kdcore.training.rows import TrainingRows
from kdcore.training.teachers.kinds import (
    AlignedTeacher,
    CachedTeacher,
    LiveTeacher,
    NoTeacher,
    RequestedTeacher,
    Teacher,
)


def teacher_of(
    resolved: ResolvedDistill,
    train: TrainingRows,
    paired: PairedSource | None,
    progress: Progress,
    connections: ExitStack,
) -> Teacher:
    """Open what teaches the student of a spec.

    Args:
        resolved: The resolved spec.
        train: The training rows.
        paired: The source that encoded them for a teacher with another tokenizer, or None.
        progress: Receiver of notes.
        connections: Closes the connections to servers.

    Returns:
        The teacher.

    Raises:
        UserError: The teacher does not have all rows, cannot read the longest, or cannot be
            reached.
    """
    models, rows = resolved.models, train.encoded
    if paired is not None:
        theirs = PairedRows(paired, rows, padding(models.answerer.tokenizer))
        refuse_long_rows(theirs.rows, [models.answerer])
        return AlignedTeacher(_local(resolved, theirs.rows), theirs)
    served = resolved.served(progress)
    if served is None:
        return _local(resolved, rows.rows)
    connections.callback(served.close)
    arguments = resolved.spec.student.template_arguments
    served.refuse_other_text(models.first.tokenizer, train.examples(), arguments)
    return RequestedTeacher(served)


def _local(resolved: ResolvedDistill, rows: Sequence[Row]) -> Teacher:
    """The teacher of rows in its own tokens, which asks no server."""
    models, cache, live = resolved.models, resolved.cache, None
    if models.teacher is not None:
        _, states = matched_states(resolved.method.objective)
        live = LiveTeacher.of(models.teacher.model, models.answered_classes, states)
    if cache is not None:
        return CachedTeacher(cache, cache.keys_of(rows), live)
    return live or NoTeacher()
