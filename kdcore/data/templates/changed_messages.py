"""Messages in place of others: a rendering that changes with one shows where that one is."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from kdcore.data.conversation import Conversation, Message
from kdcore.data.templates.rendering import REASONING, names

OTHERS = ("kdcore", "answer", "text")
"""Responses in place of a real one, whose first or last letter is that of two of them at most."""
_OPENS, _CLOSES = "<think>", "</think>"


def alike(left: str, right: str) -> int:
    """The length of the common beginning of two texts."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))


def instead(message: Message, content: str) -> Message:
    """A response of plain text in place of another one."""
    kept = {k: v for k, v in message.fields.items() if k not in (*REASONING, "content")}
    return Message(message.role, content, fields=kept)


def without_calls(message: Message) -> Message:
    """A response without its tool calls."""
    kept = {name: value for name, value in message.fields.items() if name != "tool_calls"}
    return replace(message, fields=kept)


def longer(message: Message) -> Message | None:
    """A response with a longer end.

    Args:
        message: A response.

    Returns:
        The response whose last tool call has one more argument, or whose thought goes on if it was
        cut there; None for a response that ends with its content.
    """
    calls: Any = message.fields.get("tool_calls")
    last: Any = calls[-1] if isinstance(calls, list) and calls else None
    function = last.get("function", last) if isinstance(last, dict) else {}
    if not isinstance(function.get("arguments"), dict):
        return None if calls else _longer_thought(message)
    more = function | {"arguments": function["arguments"] | {OTHERS[0]: OTHERS[0]}}
    changed = last | {"function": more} if "function" in last else more
    return replace(message, fields={**message.fields, "tool_calls": [*calls[:-1], changed]})


def _longer_thought(message: Message) -> Message | None:
    thoughts = {name: message.fields[name] for name in REASONING if message.fields.get(name)}
    if message.ended or message.content.strip() or not thoughts:
        return None
    ends = {str(each).strip()[-1:] for each in thoughts.values()}
    other = next(each for each in OTHERS if each[-1] not in ends)
    more = {name: f"{each}{other}" for name, each in thoughts.items()}
    return replace(message, fields={**message.fields, **more})


def with_cut_thought(conversation: Conversation, template: str) -> Conversation:
    """A conversation whose last response, a thought that was cut, is not its answer.

    A template that reads thoughts would print an empty one before the text.

    Args:
        conversation: The conversation.
        template: The chat template.

    Returns:
        The conversation, with the cut thought as ``reasoning_content``.
    """
    last = conversation.messages[-1]
    opened = re.match(rf"\s*{_OPENS}\n?", last.content)
    apart = opened and not (last.ended or last.tokens or _CLOSES in last.content)
    if not apart or _OPENS not in template or not names(template, REASONING[0]):
        return conversation
    assert opened is not None  # as apart says
    thought = {"reasoning_content": last.content[opened.end() :]}
    message = replace(last, content="", fields={**last.fields, **thought})
    return replace(conversation, messages=(*conversation.messages[:-1], message))
