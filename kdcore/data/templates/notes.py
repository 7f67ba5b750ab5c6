"""Notes about what a chat template leaves out of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kdcore.data.conversation import Conversation, Message
from kdcore.data.templates.rendering import REASONING, names

NOTES_RULE = 2
"""Version of the notes, which are stored with encoded rows; those under another version are encoded
again."""

NOT_WHOLE = "the chat template does not render {} of a response as written"
NOT_READ = "the chat template does not read {}"
NOT_SHOWN = "the chat template does not render a turn of role '{}' as written"
UNREAD = "the source does not read {} of a row"
OTHER_START = (
    "the chat template starts a response in another way than the generation prompt does; it is "
    "learned from where the two differ"
)
NOT_AS_GENERATED = (
    "the chat template renders a generated response in another way once another turn follows; "
    "it is not learned there"
)
OPENING_AS_END = (
    "the chat template does not end the last response; {}, which begins the next turn, ends it"
)
NO_END = (
    "the chat template marks a response and puts no end token after it, so the student does not "
    "learn to stop; print eos_token within the marks"
)
NO_PROMPT = (
    "it begins with a response, which is learned without a prompt; tidy: true in the source leaves "
    "it out"
)
OTHER_TOKENIZER = "a response was generated with another tokenizer; its text is learned"
PADDING = "a response has ids from the padding of a vocabulary; its text is learned instead"


def lost(message: Message, shown: str, template: str) -> tuple[str, ...]:
    """Compare a response with the text that a template renders for it; spaces do not count.

    Args:
        message: The response.
        shown: The rendered text of the response.
        template: The chat template.

    Returns:
        A note for each part that the text does not show as written, except for fields that the
        template never reads.
    """
    visible = _squeezed(shown)
    parts = {"the content": [message.content]}
    parts |= {name: list(_texts(message.fields.get(name))) for name in REASONING}
    parts["tool_calls"] = list(_texts(_spoken(message.fields.get("tool_calls"))))
    return tuple(
        NOT_WHOLE.format(name)
        for name, texts in parts.items()
        if (name == "the content" or names(template, name))
        and any(not any(_squeezed(form) in visible for form in _forms(text)) for text in texts)
    )


def unseen(conversation: Conversation, text: str) -> tuple[str, ...]:
    """Notes about the turns before the last response that its prompt does not show.

    Args:
        conversation: The conversation.
        text: The rendered text.

    Returns:
        A note for each role with such a turn.
    """
    visible, messages = _squeezed(text), conversation.messages
    last = max(at for at, message in enumerate(messages) if message.role == "assistant")
    missing = (
        message.role
        for message in messages[:last]
        if message.role != "assistant"
        and not any(_squeezed(form) in visible for form in _forms(message.content))
    )
    return tuple(NOT_SHOWN.format(role) for role in dict.fromkeys(missing))


def is_all(message: Message, shown: str) -> bool:
    """Whether a text shows the content of a response and nothing else; spaces do not count."""
    return _squeezed(shown) == _squeezed(message.content)


def unread(conversation: Conversation, template: str) -> tuple[str, ...]:
    """Notes about fields and arguments that a template does not name.

    Args:
        conversation: The conversation.
        template: The chat template.

    Returns:
        A note for each of them.
    """
    fields = (name for message in conversation.messages for name in message.fields)
    said = dict.fromkeys([*fields, *conversation.arguments])
    wanting = [name for name in said if name != "content" and not names(template, name)]
    return tuple(NOT_READ.format(f"'{name}'") for name in wanting)


def _spoken(calls: Any) -> Any:
    """Names and arguments of tool calls: a template need not print their ids and types."""
    functions = [call.get("function", call) for call in calls or () if isinstance(call, dict)]
    return [
        [function.get("name"), function.get("arguments")]
        for function in functions
        if isinstance(function, dict)
    ]


def _texts(value: Any) -> Iterator[str]:
    """The texts in plain data."""
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, Mapping) else ():
        yield from _texts(each)
    for each in value if isinstance(value, list | tuple) else ():
        yield from _texts(each)


def _forms(text: str) -> Iterator[str]:
    """A text as templates print it: as it is, or inside JSON."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]


def _squeezed(text: str) -> str:
    return "".join(text.split())
