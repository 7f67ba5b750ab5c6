"""Exported chats without the turns that nobody learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kdcore.data.conversation import Message
from kdcore.data.templates.rendering import REASONING

BLANK = "blank turns are left out (tidy)"
UNANSWERED = "user turns after the last response are left out (tidy)"
UNASKED = "a response before the first prompt is left out (tidy)"
_CALLING = {"tool_calls", "tool_call_id", "content"}
"""Fields of turns that are not joined: they call a tool, answer a call, or have no content."""
_SAYING = {"tool_calls", "tool_call_id", *REASONING}
"""Fields by which a turn without content is not blank."""


def opened(
    messages: Sequence[Message], text: str | None, role: str
) -> tuple[list[Message], list[Message]]:
    """Put a system turn before turns, and name the role of system turns.

    Args:
        messages: Turns.
        text: Text of the system turn, or None.
        role: Role of system turns in the chat template.

    Returns:
        The system turn that opens the conversation, if it has a role of its own, and the turns.
    """
    opening = [] if text is None else [Message("system", text)]
    if role == "system":
        return opening, [*messages]
    turns = (*opening, *messages)
    return [], [replace(each, role=role) if each.role == "system" else each for each in turns]


def tidied(messages: Sequence[Message]) -> tuple[list[Message], tuple[str, ...]]:
    """Leave out turns that nobody learns from, and join successive turns of one role.

    Blank turns, responses before the first user turn, and user turns after the last response are
    left out. ShareGPT's exports have all of them.

    Args:
        messages: Turns.

    Returns:
        The turns, and notes about those that were left out before a response; turns around tool
        calls are not joined, and fields are those of the first turn.
    """
    said = [each for each in messages if each.content.strip() or _SAYING & each.fields.keys()]
    prompt = next((place for place, each in enumerate(said) if each.role == "user"), 0)
    answering = [place >= prompt or each.role != "assistant" for place, each in enumerate(said)]
    notes = {BLANK: len(said) < len(messages), UNASKED: not all(answering)}
    found: list[Message] = []
    for message in (each for each, kept in zip(said, answering, strict=True) if kept):
        last = found[-1] if found else None
        alike = last is not None and (last.role, last.learned) == (message.role, message.learned)
        if last is None or not alike or _CALLING & {*last.fields, *message.fields}:
            found.append(message)
        else:
            text = f"{last.content}\n{message.content}"
            found[-1] = replace(last, content=text, ended=message.ended, tokens=())
    first = next((place for place, each in enumerate(found) if each.role == "user"), len(found))
    while any(each.role == "assistant" for each in found[first:]) and found[-1].role == "user":
        notes[UNANSWERED] = found.pop().role == "user"
    return found, tuple(note for note, applies in notes.items() if applies)
