"""The rows of a teacher that reads its own tokens of the student's examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcore.data.alignment.spans import AlignedRow, align
from kdcore.data.alignment.token_bytes import TokenBytes
from kdcore.data.rows import RowDataset, collate
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


class PairedSource:
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
        self._source, self._teacher, self._alignment = source, teacher, alignment
        self._bytes = TokenBytes(student), TokenBytes(teacher)
        self.found: dict[bytes, AlignedRow] = {}

    def read(self) -> Sequence[Any]:
        """The examples of the source."""
        return self._source.read()

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
        theirs = self._source.encode(example, self._teacher, max_length)
        found, whole = align(ours, theirs, *self._bytes, self._alignment)
        self.found[row_key(ours)] = found
        return ours if whole else replace(ours, notes=(*ours.notes, _OTHER_TEXT))


class PairedRows:
    """The teacher's rows, in the order of the student's.

    Args:
        source: The source that encoded the student's rows.
        rows: The student's rows.
        pad: Padding values of the teacher's inputs, see `kdcore.data.rows.collate`.

    Attributes:
        aligned_rows: The teacher's row of each of the student's, with the spans of both.
    """

    def __init__(self, source: PairedSource, rows: RowDataset, pad: Mapping[str, int]) -> None:
        self.aligned_rows = [source.found[row_key(row)] for row in rows.rows]
        self._pad = pad

    @property
    def rows(self) -> list[Row]:
        """The teacher's rows."""
        return [each.row for each in self.aligned_rows]

    def collated(self, index: Tensor) -> dict[str, Any]:
        """The teacher's rows of the student's with some indices [B], see `collate`."""
        rows = [(number, self.aligned_rows[number].row) for number in index.tolist()]
        return collate(rows, self._pad)

    def aligned(self, ours: Batch, theirs: Batch, logits: TeacherLogits) -> AlignedLogits:
        """The teacher's logits at the student's positions.

        Args:
            ours: The batch of the student's rows.
            theirs: The batch of the teacher's rows.
            logits: The teacher's logits at the M learned positions of its rows.

        Returns:
            The logits at the N learned positions of the student's rows.
        """
        spans, own_spans, places = [], [], []
        before = own_before = 0
        rows = [self.aligned_rows[number] for number in ours.index.tolist()]
        for each in rows:
            spans.append(each.span + before)
            own_spans.append(each.own_span.where(each.own_span < 0, each.own_span + before))
            places.append(each.place + own_before)
            before, own_before = before + len(each.span), own_before + len(each.own_span)
        span, place, device = torch.cat(spans), torch.cat(places), ours.mask.device
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
