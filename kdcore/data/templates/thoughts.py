"""The thought before an answer, by the marks between which a chat template prints it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kdcore.data.conversation import Conversation, Message
from kdcore.data.templates.changed_messages import alike
from kdcore.data.templates.rendering import REASONING, render, special_tokens, template_of
from kdcore.errors import UserError

_CONTENT, _THOUGHT = "kdcore", "kdthought"
_TAG = r"<[^<>\s]+>|\[[^\[\]\s]+\]"


@dataclass(frozen=True, slots=True)
class Thoughts:
    """The marks of thoughts.

    Attributes:
        opening: Text before a thought; empty if it is unknown.
        closing: Text between the last thought and the answer.
        begun: Whether the generation prompt opens a thought.
        of_template: Whether the chat template has these marks, so that one of them is no text.
    """

    opening: str
    closing: str
    begun: bool = False
    of_template: bool = False

    def answer_in(self, text: str) -> str | None:
        """What follows the thoughts of a text.

        Args:
            text: The generated text, with its special tokens.

        Returns:
            The rest of the text, all of it without a thought; None if a thought does not end.
        """
        rest = text
        opened = self.begun
        if self.of_template and self.closing in rest:
            rest, opened = rest.partition(self.closing)[2], False
        while opened or self._opens(rest):
            _, closed, rest = rest.partition(self.closing)
            if not closed:
                return None
            opened = False
        return rest

    def _opens(self, text: str) -> bool:
        return bool(self.opening) and text.lstrip().startswith(self.opening)


PLAIN = Thoughts("<think>", "</think>")
"""Of a text whose template does not know thoughts; the opening mark at its start says so."""


def thoughts_of(conversation: Conversation, tokenizer: Any) -> Thoughts:
    """The marks of the thoughts in answers to a conversation.

    Args:
        conversation: The conversation.
        tokenizer: A tokenizer with a chat template, unless the conversation is plain.

    Returns:
        The marks of the chat template, else `PLAIN`.

    Raises:
        UserError: The chat template is missing.
    """
    if conversation.plain:
        return PLAIN
    _, others = conversation.tools_and_others()
    template = template_of(conversation, tokenizer)
    return _marks(tokenizer, template, json.dumps(others, sort_keys=True, default=str))


@functools.lru_cache(maxsize=64)
def _marks(tokenizer: Any, template: str, arguments: str) -> Thoughts:
    """Render a thought and its answer, and read off what the template prints around them."""
    asked = Message("user", "a")
    response = Message("assistant", _CONTENT)
    thinking = Message("assistant", _CONTENT, fields={REASONING[0]: _THOUGHT})
    probe = Conversation("a probe", (asked,), arguments=json.loads(arguments))
    prompt = whole = plain = ""
    with suppress(UserError):
        prompt = render(probe, [asked], tokenizer, prompt=True)[0]
        plain = render(probe, [asked, response], tokenizer)[0]
        whole = render(probe, [asked, thinking], tokenizer)[0]
    start, end = whole.find(_THOUGHT), whole.rfind(_CONTENT)
    between = whole[start + len(_THOUGHT) : end].strip() if 0 <= start < end else ""
    if not between:
        known = PLAIN.closing in template  # it drops thoughts, or leaves them in the content
        return Thoughts(PLAIN.opening, PLAIN.closing, _ends(prompt, PLAIN.opening), known)
    before = plain[alike(plain, prompt) : plain.rfind(_CONTENT)].strip()
    shared = alike(between[::-1], before[::-1])  # a response without a thought has it, too
    closing = between[len(between) - shared :].strip() or between
    if opening := whole[len(prompt) : start].strip() if whole.startswith(prompt) else "":
        return Thoughts(opening, closing, of_template=True)
    tags = re.findall(rf"{special_tokens(tokenizer).pattern}|{_TAG}", whole[:start])
    opening = tags[-1] if tags and whole[:start].rstrip().endswith(tags[-1]) else ""
    return Thoughts(opening, closing, _ends(prompt, opening), of_template=True)


def _ends(prompt: str, opening: str) -> bool:
    return bool(opening) and prompt.rstrip().endswith(opening)


def answer_of(ids: Sequence[int], thoughts: Thoughts, tokenizer: Any) -> tuple[str, bool | None]:
    """Decode the answer of a generated response, which follows its thought.

    Args:
        ids: The generated tokens.
        thoughts: The marks of thoughts.
        tokenizer: The tokenizer of the tokens.

    Returns:
        The text without special tokens, empty if the thought does not end; and whether there is a
        thought, None for one that does not end.
    """
    text = str(tokenizer.decode(ids, skip_special_tokens=False))
    rest = thoughts.answer_in(text)
    if rest is None:
        return "", None
    if rest == text:
        return str(tokenizer.decode(ids, skip_special_tokens=True)), False
    thought = text[: len(text) - len(rest)].strip() != thoughts.closing
    return special_tokens(tokenizer).sub("", rest), thought
