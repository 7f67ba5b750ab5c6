"""The content of a message as a list of parts: its text, and the thought before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcore.errors import UserError

_TEXT = ("text", "input_text", "output_text")
_THOUGHT = ("thinking", "reasoning")
_ELSEWHERE = {
    "tool_use": "write the call into tool_calls of the message: [{name, arguments}]",
    "tool_result": "write the result as a message of its own: {role: tool, content: ...}",
}


def read_content(content: Any, place: str) -> tuple[str | None, str | None]:
    """Read the content of a message.

    Args:
        content: A text, or a list of parts ``{type: text, text: ...}``, of which the first ones may
            be thoughts, ``{type: thinking, thinking: ...}`` or ``{type: reasoning, text: ...}``.
        place: Name of the row in messages.

    Returns:
        The text and the thought, each the joined texts of its parts; None for what is not there or
        has another form.

    Raises:
        UserError: A part has another type, or a thought follows a text.
    """
    if isinstance(content, str):
        return content, None
    parts = content if isinstance(content, list) else []
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        return None, None
    kinds = [part.get("type") for part in parts]
    if other := next((k for k in kinds if k not in (*_TEXT, *_THOUGHT) and k is not None), None):
        raise UserError(
            f"{place}: a message has a part of type '{other}', which language models do not read",
            _ELSEWHERE.get(str(other), f"remove {place} from the data, and rows like it"),
        )
    thoughts = [_thought_of(part) for part in parts if part.get("type") in _THOUGHT]
    texts = [part.get("text") for part in parts if part.get("type") in _TEXT]
    if any(kind in _THOUGHT for kind in kinds[len(thoughts) :]):
        raise UserError(
            f"{place}: a message has a thought after a text, but templates print thoughts first",
            "make a separate message of the rest, or remove the row",
        )
    said = [*thoughts, *texts]
    if len(said) < len(parts) or not all(isinstance(each, str) for each in said):
        return None, None
    text, thought = ("".join(map(str, each)) if each else None for each in (texts, thoughts))
    return text, thought


def _thought_of(part: Mapping[str, Any]) -> Any:
    """The text of a thought; Mistral's is a list of parts itself."""
    fields = ("thinking", "reasoning", "text")
    value = next((part[name] for name in fields if part.get(name) is not None), None)
    if not isinstance(value, list):
        return value
    texts = [each.get("text") if isinstance(each, Mapping) else None for each in value]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
