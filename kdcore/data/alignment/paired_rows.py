"""The rows of a teacher that reads its own tokens of the student's examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kdcore.data.alignment.other_tokens import OtherTokens
from kdcore.data.alignment.second_reading import SecondReading
from kdcore.data.alignment.spans import AlignedRow, align
from kdcore.data.alignment.token_bytes import TokenBytes
from kdcore.data.responses.on_policy import answered, last_response, prompt_of
from kdcore.data.rows import RowDataset, batch_of, collate
from kdcore.data.source import DataSource
from kdcore.data.store import row_key
from kdcore.method.logits import AlignedLogits, TeacherLogits
from kdcore.method.records import Batch, Row
from kdcore.models.device import sent
from kdcore.specs.parts.training import Alignment

_OTHER_TEXT = (
    "the two tokenizers do not give its response the same text, and only the beginning that they "
    "share is compared"
)
_CUT = (
    "in the teacher's tokens it is longer than data.max_length, and its last response is cut off "
    "and not compared"
)


class PairedSource(SecondReading):
    """A source whose rows a teacher with another tokenizer reads too.

    Args:
        source: The source.
        student: The student's tokenizer.
        teacher: The teacher's tokenizer.
        alignment: Which tokens are compared, see
            `kdcore.specs.parts.student_method.StudentMethodSpec`.

    Attributes:
        found: The teacher's row of each encoded row, by the `row_key` of the student's.
    """

    def __init__(
        self, source: DataSource, student: Any, teacher: Any, alignment: Alignment
    ) -> None:
        super().__init__(source)
        self._teacher, self._alignment = teacher, alignment
        self._bytes = TokenBytes(student), TokenBytes(teacher)
        self.found: dict[bytes, AlignedRow] = {}

    def encode(self, example: Any, tokenizer: Any, max_length: int) -> Row:
        """Encode an example for the student, and keep the teacher's row of it.

        Args:
            example: The example.
            tokenizer: The student's tokenizer.
            max_length: Maximum number of positions of a row.

        Returns:
            The student's row.
        """
        ours = self._source.encode(example, tokenizer, max_length)
        if not ours.mask.any():
            return ours  # training skips it
        theirs = self._source.encode(example, self._teacher, max_length)
        found, whole = self.aligned(ours, theirs)
        self.found[row_key(ours)] = found
        said = {_CUT: found.lacks_last, _OTHER_TEXT: not whole}
        return replace(ours, notes=(*ours.notes, *(note for note, is_so in said.items() if is_so)))

    def aligned(self, ours: Row, theirs: Row) -> tuple[AlignedRow, bool]:
        """The teacher's row with its relation to the student's, see `align`."""
        return align(ours, theirs, *self._bytes, self._alignment)

    def other_tokens(self, known: Iterable[Sequence[int]]) -> OtherTokens:
        """What writes sampled responses in the teacher's tokens.

        Args:
            known: Responses of the data in these tokens.
        """
        ours, theirs = self._bytes
        return OtherTokens(ours, self._teacher, theirs, known)


class PairedRows:
    """The teacher's rows, in the order of the student's.

    Args:
        source: The source that encoded the student's rows.
        rows: The student's rows.
        pad: Padding values of the teacher's inputs, see `kdcore.data.rows.collate`.
        context: Maximum number of positions of a teacher's row, for sampled responses; None if
            there is no maximum.

    Attributes:
        aligned_rows: The teacher's row of each of the student's, with the spans of both.
    """

    def __init__(
        self,
        source: PairedSource,
        rows: RowDataset,
        pad: Mapping[str, int],
        context: int | None = None,
    ) -> None:
        self.aligned_rows = [source.found[row_key(row)] for row in rows.rows]
        self._source, self._ours, self._pad, self._context = source, rows.rows, pad, context

    @property
    def rows(self) -> list[Row]:
        """The teacher's rows."""
        return [each.row for each in self.aligned_rows]

    def collated(self, index: Tensor) -> dict[str, Any]:
        """The teacher's rows of the student's with some indices [B], see `collate`."""
        rows = [(number, self.aligned_rows[number].row) for number in index.tolist()]
        return collate(rows, self._pad)

    def sampled(self, ours: Batch) -> tuple[list[AlignedRow], Batch]:
        """The teacher's rows of a batch, with the responses that the student sampled.

        Args:
            ours: The batch of the student's rows, which learn their last response alone.

        Returns:
            The rows, and their batch. A response ends where the teacher's context does.
        """
        read, found = ours.on_cpu or ours, []
        for number, labels, mask in zip(ours.index.tolist(), read.labels, read.mask, strict=True):
            known, tokens = self.aligned_rows[number], labels[mask].tolist()
            theirs = replace(known.row, mask=torch.zeros_like(known.row.mask))
            if not known.lacks_last:
                prompt, said = prompt_of(known.row), last_response(known.row)
                room = None if self._context is None else self._context + 1 - len(prompt)
                written = self._other_tokens(tokens, last_response(self._ours[number]), said)
                theirs = answered(known.row, prompt, written[:room])
            found.append(self._source.aligned(Row({}, labels, mask, known.row.id), theirs)[0])
        rows = [(n, each.row) for n, each in zip(ours.index.tolist(), found, strict=True)]
        return found, batch_of(collate(rows, self._pad), ours.mask.device)

    def aligned(self, ours: Batch) -> list[AlignedRow]:
        """The teacher's row of each row of a batch with the responses of the data."""
        return [self.aligned_rows[number] for number in ours.index.tolist()]

    @cached_property
    def _other_tokens(self) -> OtherTokens:
        whole = (each.row for each in self.aligned_rows if not each.lacks_last)
        return self._source.other_tokens(map(last_response, whole))


def aligned_logits(
    rows: Sequence[AlignedRow], theirs: Batch, logits: TeacherLogits
) -> AlignedLogits:
    """The teacher's logits at the student's positions.

    Args:
        rows: The teacher's row of each row of the student's batch.
        theirs: The batch of these rows.
        logits: The teacher's logits at the M learned positions of its rows.

    Returns:
        The logits at the N learned positions of the student's rows.
    """
    spans, own_spans, places = [], [], []
    before = own_before = 0
    for each in rows:
        spans.append(each.span + before)
        own_spans.append(each.own_span.where(each.own_span < 0, each.own_span + before))
        places.append(each.place + own_before)
        before, own_before = before + len(each.span), own_before + len(each.own_span)
    span, place, device = torch.cat(spans), torch.cat(places), theirs.mask.device
    return AlignedLogits(
        logits,
        sent(place, device),
        place,
        theirs.labels.flatten()[theirs.positions],
        sent(torch.cat(own_spans), device),
        sent(span, device),
        span,
        sent(torch.cat([each.compared for each in rows]), device),
    )
