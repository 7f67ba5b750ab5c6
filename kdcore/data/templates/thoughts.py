"""The thought before an answer, by the marks between which a chat template prints it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from kdcore.data.conversation import Conversation, Message
from kdcore.data.templates.changed_messages import alike
from kdcore.data.templates.rendering import REASONING, render, special_tokens, template_of
from kdcore.errors import UserError

_CONTENT, _THOUGHT = "kdcore", "kdthought"
_ASKED = Message("user", "a")
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"a": "b"}}}
_THINKING = (
    Message("assistant", _CONTENT, fields={REASONING[0]: _THOUGHT}),
    Message("assistant", "", fields={REASONING[0]: _THOUGHT, "tool_calls": [_CALL]}),
)
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

    def answer_in(self, text: str, *, ended: bool = False) -> str | None:
        """What follows the thoughts of a text.

        Args:
            text: The generated text, with its special tokens.
            ended: Whether the response ended by itself. One that then lacks the mark after the
                thought that the prompt has opened is an answer without a thought: a model that
                was trained without thoughts gives such answers.

        Returns:
            The rest of the text, all of it without a thought; None if a thought does not end.
        """
        has_mark = self.closing in text
        marked = (self.begun and (has_mark or not ended)) or (self.of_template and has_mark)
        rest, closing = text, self.closing if marked else self._closing_of(text)
        while closing:
            _, closed, rest = rest.partition(closing)
            if not closed:
                return None
            closing = self._closing_of(rest)
        return rest

    def reference_in(self, text: str) -> str:
        """What follows the thoughts of a response in the data.

        A mark within it is text, unless the prompt opens the thought.

        Args:
            text: The content of the response.

        Returns:
            The rest of the text; empty if a thought does not end.
        """
        return replace(self, of_template=False).answer_in(text, ended=True) or ""

    def _closing_of(self, text: str) -> str:
        """The mark after the thought with which a text begins; empty without one."""
        begins = text.lstrip().startswith
        for marks in (self, PLAIN):
            if begins(marks.closing) or (marks.opening and begins(marks.opening)):
                return marks.closing
        return ""


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
    """Render a thought and its answer, and read off what the template prints around them.

    Some templates print the thought before a tool call only.
    """
    probe = Conversation("a probe", (_ASKED,), arguments=json.loads(arguments))

    def rendered(*messages: Message, prompt: bool = False) -> str:
        with suppress(UserError):
            return render(probe, [_ASKED, *messages], tokenizer, prompt=prompt)[0]
        return ""

    prompt = rendered(prompt=True)
    tag = rf"{special_tokens(tokenizer).pattern}|{_TAG}"
    for thinking in _THINKING:
        whole = rendered(thinking)
        lead, shown, rest = whole.partition(_THOUGHT)
        between, answered, _ = rest.rpartition(_CONTENT)
        closing = re.match(rf"\s*({tag})", rest)
        if answered and between.strip():
            plain = rendered(Message("assistant", _CONTENT))
            before = plain[alike(plain, prompt) : plain.rfind(_CONTENT)].strip()
            marks = _opening(lead, prompt, tag), _shared_end(between.strip(), before)
        elif shown and closing:
            marks = _opening(lead, prompt, tag), closing[1]
        else:
            continue
        return Thoughts(*marks, begun=_ends(prompt, marks[0]), of_template=True)
    known = PLAIN.closing in template  # it drops thoughts, or leaves them in the content
    return Thoughts(PLAIN.opening, PLAIN.closing, _ends(prompt, PLAIN.opening), known)


def _shared_end(between: str, before: str) -> str:
    """The end of what precedes an answer that a response without a thought has, too; else all."""
    shared = alike(between[::-1], before[::-1])
    return between[len(between) - shared :].strip() or between


def _opening(lead: str, prompt: str, tag: str) -> str:
    """What begins a thought after the generation prompt, or what the prompt begins it with."""
    if generated := lead[len(prompt) :].strip() if lead.startswith(prompt) else "":
        return generated
    *_, last = (0, *(found.start() for found in re.finditer(tag, lead)))
    return lead[last:].strip()


def _ends(prompt: str, opening: str) -> bool:
    return bool(opening) and prompt.rstrip().endswith(opening)


def answer_of(
    ids: Sequence[int], thoughts: Thoughts, tokenizer: Any, ends: Collection[int]
) -> tuple[str, bool | None]:
    """Decode the answer of a generated response, which follows its thought.

    Args:
        ids: The generated tokens.
        thoughts: The marks of thoughts.
        tokenizer: The tokenizer of the tokens.
        ends: The tokens that end a response.

    Returns:
        The text without special tokens, empty if the thought does not end; and whether there is a
        thought, None for one that does not end.
    """
    if not len(ids):  # of a prompt without room
        return "", False
    text = str(tokenizer.decode(ids, skip_special_tokens=False))
    rest = thoughts.answer_in(text, ended=ids[-1] in ends)
    if rest is None:
        return "", None
    if rest == text:
        return str(tokenizer.decode(ids, skip_special_tokens=True)), False
    thought = text[: len(text) - len(rest)].strip() not in (thoughts.closing, PLAIN.closing)
    return special_tokens(tokenizer).sub("", rest), thought
