"""Conversations of rows, with unique ids, and which of them the params select."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeVar

from kdcore import Row
from kdcore.data.conversation import Conversation
from kdcore.data.templates.mask import encode
from kdcore.errors import UserError, counted, nearest
from kdcore_baselines.sources.components import WHOLE, ConversationParams
from kdcore_baselines.sources.conversations.rows import ConversationRows, is_answered
from kdcore_baselines.sources.parts import beside, by_content

Rows = TypeVar("Rows", bound=Sized)
LeftOut = dict[str, str]
"""Place of a conversation that is left out -> what it asks; "" where the whole file is read."""


class ConversationSource:
    """What sources of conversations share: how one becomes a row, and what ``tidy`` leaves out."""

    _left_out: Mapping[str, str] = {}

    @property
    def left_out(self) -> Sequence[str]:
        """The places of the conversations that the last `read` left out of its part."""
        return [*self._left_out]

    def encode(self, example: Conversation, tokenizer: Any, max_length: int) -> Row:
        return encode(example, tokenizer, max_length)


def conversations(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    params: ConversationParams,
    source: str,
    origin: str,
    left_out: LeftOut,
) -> Iterator[tuple[int, Conversation]]:
    """Read rows as conversations with unique ids.

    Args:
        rows: Place and fields of each row.
        params: Names of the fields.
        source: Name of the source in messages.
        origin: Name of the data in messages.
        left_out: Receives the conversations that ``tidy`` leaves out.

    Yields:
        The number of a row, from 0, and its conversation; those that ``tidy`` leaves out are not
        there.

    Raises:
        UserError: A row is not a conversation, an id occurs twice, or there are no rows.
    """
    reader, found = ConversationRows(params, source), set[bytes]()
    for number, (place, row) in enumerate(rows):
        conversation = reader.read(row, place)
        if params.tidy and not is_answered(conversation):
            left_out[place] = "" if params.part == WHOLE else conversation.asked
            continue
        known = hashlib.blake2b(conversation.id.encode(), digest_size=16).digest()
        if known in found:
            raise UserError(
                f"{place}: the id '{conversation.id}' already exists",
                "give each row a unique id, or no id",
            )
        found.add(known)
        yield number, conversation
    if left_out and not found:
        raise UserError(
            f"{origin}: no conversation has a prompt and its response ({len(left_out)} are left "
            "out by tidy)",
            "check the parameters of the source, such as role, content and roles",
        )
    some(found, origin)


def selects(params: ConversationParams) -> bool:
    """Whether params leave out or join rows, so that the first ``limit`` ones do not suffice."""
    return params.tidy or params.group is not None or params.part != WHOLE


def selection(
    found: Iterable[tuple[int, Conversation]],
    params: ConversationParams,
    origin: str,
    left_out: LeftOut,
) -> Sequence[int]:
    """Select the conversations of the params' part and limit.

    Args:
        found: Number of each row, and its conversation; all are read.
        params: Part and limit.
        origin: Name of the data in messages.
        left_out: What ``tidy`` leaves out; that of other parts is removed.

    Returns:
        The numbers of the selected rows, sorted.

    Raises:
        UserError: There are none.
    """
    numbers, asked = array("q"), list[str]()
    for number, conversation in found:
        numbers.append(number)
        if params.part != WHOLE:
            asked.append(conversation.asked)
    if params.part == WHOLE:
        return numbers[: params.limit]
    left = list(left_out)
    of_part = {left[number] for number in beside([*left_out.values()], asked, *params.part)}
    for place in (place for place in left if place not in of_part):
        del left_out[place]
    chosen = array("q", (numbers[place] for place in by_content(asked, *params.part)))
    if asked and not chosen:
        different = len(set(asked))
        raise UserError(
            f"part {list(params.part)} of {origin} has no rows: its "
            f"{counted(len(asked), 'conversation')} have {counted(different, 'different prompt')}, "
            "and those of one prompt are in one part",
            f"take a part of at least {math.ceil(100 / different)} % (heldout: "
            f"{math.ceil(100 / different)} %), or name another file"
            if different > 1
            else "name another file for the held-out rows",
        )
    return some(chosen, f"part {list(params.part)} of {origin}")[: params.limit]


def grouped(
    rows: Iterable[tuple[str, Mapping[str, Any]]], field: str, params: ConversationParams
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Join rows of one turn each, which share the value of a field, to conversations.

    Args:
        rows: Place and fields of each row.
        field: Name of the field.
        params: Names of the fields of a turn.

    Yields:
        The place of each conversation's first row, and its fields; the turns are in order.

    Raises:
        UserError: A row lacks the field, or two rows of a conversation answer the same message.
    """
    answered = set[tuple[str, str]]()
    read = {params.role, params.content} - {None} | {"role", "from", "content", "value"}
    said = [params.content] if params.content else ["content", "value"]
    turns: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    for place, row in rows:
        if row.get(field) is None:
            if params.tidy and not any(str(row.get(name) or "").strip() for name in said):
                continue  # a cut row
            raise UserError(
                f"{place} has no '{field}', which names its conversation (group)",
                nearest(field, row),
            )
        if row.get("parent_id") is not None:
            answers = str(row[field]), str(row["parent_id"])
            if answers in answered:
                raise UserError(
                    f"{place} answers the same message as an earlier row ('parent_id'): the rows "
                    "are a tree, and not one conversation",
                    "write each path through it as a conversation of its own",
                )
            answered.add(answers)
        turn = {name: value for name, value in row.items() if name in read}
        turns.setdefault(str(row[field]), (place, []))[1].append(turn)
    for key, (place, found) in turns.items():
        yield place, {"id": key, params.messages or "messages": found}


def in_memory(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    params: ConversationParams,
    source: str,
    origin: str,
    left_out: LeftOut,
) -> list[Conversation]:
    """The selected conversations of rows that come once, or of which several are a conversation.

    Args:
        rows: See `conversations`.
        params: See `conversations`.
        source: See `conversations`.
        origin: See `conversations`.
        left_out: See `conversations`.

    Returns:
        The conversations, in order.
    """
    rows = rows if params.group is None else grouped(rows, params.group, params)
    found = dict(conversations(rows, params, source, origin, left_out))
    return [found[number] for number in selection(found.items(), params, origin, left_out)]


def some(rows: Rows, origin: str) -> Rows:
    """Return rows. Raises UserError when there are none."""
    if not rows:
        raise UserError(f"{origin} has no rows", "name a file with at least one row")
    return rows
