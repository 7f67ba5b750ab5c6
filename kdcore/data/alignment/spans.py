"""The spans of text that end in both of two tokenizations.

A teacher with another tokenizer reads its own row of each example. The learned tokens of both rows
are walked together: where both have read the same bytes of a response, a span ends. The walk stops
where the texts differ, e.g. where a template leaves out a part; what follows has no counterpart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from kdcore.data.alignment.token_bytes import TokenBytes
from kdcore.method.records import Row
from kdcore.specs.parts.training import Alignment


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of a span of text.

    Attributes:
        ours: Indices of the student's tokens.
        theirs: Indices of the teacher's tokens.
    """

    ours: range
    theirs: range


@dataclass(frozen=True, slots=True)
class AlignedRow:
    """A teacher's row with its relation to the student's row of the same example.

    Attributes:
        row: The teacher's row, with M learned tokens.
        own_span: [M] int64, the number of the span of each, or -1 for a token without counterpart.
        span: [N] int64, the number of the span of each of the student's N learned tokens.
        place: [N] int64, the index among the M of the token that each one is compared with.
        compared: [N] bool, the student's tokens that are compared.
        lacks_last: Whether the student's last response is not in the teacher's row, which was cut
            before it.
    """

    row: Row
    own_span: Tensor
    span: Tensor
    place: Tensor
    compared: Tensor
    lacks_last: bool = False


def align(
    ours: Row, theirs: Row, our_bytes: TokenBytes, their_bytes: TokenBytes, alignment: Alignment
) -> tuple[AlignedRow, bool]:
    """Align the learned tokens of two rows of one example, response by response.

    Args:
        ours: The student's row.
        theirs: The teacher's row. If it has no response, its last token counts as learned, which is
            compared with nothing.
        our_bytes: The bytes of the student's tokens.
        their_bytes: The bytes of the teacher's tokens.
        alignment: Which tokens are compared.

    Returns:
        The teacher's row with the spans, and whether the walk ended where a response ends.
    """
    our_runs, their_runs = _responses(ours), _responses(theirs)
    if not their_runs:
        theirs = replace(theirs, mask=torch.arange(len(theirs.mask)) == len(theirs.mask) - 1)
    count, own_count = int(ours.mask.sum()), int(theirs.mask.sum())
    span, place = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    own_span, compared = torch.full((own_count,), -1), torch.zeros(count, dtype=torch.bool)
    base = -1 if alignment == "spans_last" else 0
    whole = True
    for (first, our_run), (own_first, their_run) in zip(our_runs, their_runs, strict=False):
        if alignment == "positions":
            pairs = min(len(our_run), len(their_run))
            spans = [Span(range(n, n + 1), range(n, n + 1)) for n in range(pairs)]
        else:
            spans, same = walk(our_bytes(our_run), their_bytes(their_run))
            whole &= same
        for each in spans:
            start, stop = first + each.ours.start, first + each.ours.stop
            span[start:stop] = start
            place[start:stop] = own_first + each.theirs[base]
            own_span[own_first + each.theirs.start : own_first + each.theirs.stop] = start
            compared[first + each.ours[base]] = True
    place = place.cummax(0).values  # near for near positions where there is no counterpart
    lacks_last = len(their_runs) < len(our_runs)
    return AlignedRow(theirs, own_span, span, place, compared, lacks_last), whole


def walk(ours: Sequence[bytes | None], theirs: Sequence[bytes | None]) -> tuple[list[Span], bool]:
    """Cut two tokenizations of a text at their common borders.

    Args:
        ours: The bytes of each token; None for a special token, which has only a special token as
            its counterpart.
        theirs: The same of the other tokenization.

    Returns:
        The spans from the start, and whether they reach the end of a tokenization: else the texts
        differ. One space that only one of the texts begins with does not count.
    """
    ours, theirs = _without_leading_space(ours, theirs)
    spans: list[Span] = []
    read, of = [b"", b""], (ours, theirs)
    starts, places = [0, 0], [0, 0]
    while all(
        place < len(each) or text for place, each, text in zip(places, of, read, strict=True)
    ):
        shorter = 0 if len(read[0]) <= len(read[1]) else 1
        if read[0] == read[1] != b"":
            spans.append(Span(*(range(s, p) for s, p in zip(starts, places, strict=True))))
            starts, read = list(places), [b"", b""]
            continue
        if places[shorter] == len(of[shorter]):
            return spans, True  # one of them was cut inside the span
        piece = of[shorter][places[shorter]]
        if piece is None:
            other = of[1 - shorter][places[1 - shorter]] if read == [b"", b""] else b""
            if other is not None:
                return spans, False
            spans.append(Span(*(range(place, place + 1) for place in places)))
            places = [place + 1 for place in places]
            starts = list(places)
            continue
        read[shorter] += piece
        places[shorter] += 1
        common = min(map(len, read))
        if read[0][:common] != read[1][:common]:
            return spans, False
    return spans, True


def _without_leading_space(
    ours: Sequence[bytes | None], theirs: Sequence[bytes | None]
) -> tuple[Sequence[bytes | None], Sequence[bytes | None]]:
    """SentencePiece puts a space before a text, which other tokenizers do not."""
    first, other = (next(iter(each), None) or b"" for each in (ours, theirs))
    if first.startswith(b" ") and not other.startswith(b" "):
        ours = [first[1:], *ours[1:]]
    elif other.startswith(b" ") and not first.startswith(b" "):
        theirs = [other[1:], *theirs[1:]]
    return ours, theirs


def _responses(row: Row) -> list[tuple[int, list[int]]]:
    """The learned tokens of each response, after the number of those before it."""
    learned = row.mask.nonzero()[:, 0].tolist()
    tokens = row.labels[row.mask].tolist()
    breaks = [n for n, (a, b) in enumerate(pairwise(learned), start=1) if b != a + 1]
    runs = pairwise([0, *breaks, len(tokens)]) if tokens else ()
    return [(start, tokens[start:stop]) for start, stop in runs]
