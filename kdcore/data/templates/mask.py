"""Encoding of a conversation as tokens, and the mask of the learned ones: the assistant's turns.

A turn is learned from the place where generation would start to its end token, after which
generation would stop. Its place in the rendered text comes from rendering, not from a search for
its content: the messages before it with the generation prompt give its start, the same
conversation with another response gives the end of what the response says, and the messages up to
it give the end of the turn. ``{% generation %}`` marks of a template give both ends themselves. The
tokens before a response are always those of the generation prompt: a token that would cross the
border is split there. A response that a model generated is learned as the tokens that it generated.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import torch

from kdcore.data.conversation import Conversation, Message
from kdcore.data.templates.bounded import FIX
from kdcore.data.templates.changed_messages import (
    OTHERS,
    alike,
    instead,
    longer,
    with_cut_thought,
    without_calls,
)
from kdcore.data.templates.notes import (
    NO_END,
    NO_PROMPT,
    NOT_AS_GENERATED,
    NOT_WHOLE,
    OPENING_AS_END,
    OTHER_START,
    OTHER_TOKENIZER,
    PADDING,
    UNREAD,
    is_all,
    lost,
    unread,
    unseen,
)
from kdcore.data.templates.rendering import (
    end_of_response,
    end_token,
    names,
    opening_as_end,
    render,
    special_tokens,
    template_of,
)
from kdcore.data.templates.response_tokens import Response, first_token, ids_of, tokens_of
from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.models.facts import tokenizer_digest

MASK_RULE = 8
"""Version of the rule above; a teacher cache built under another version does not fit."""


def encode(conversation: Conversation, tokenizer: Any, max_length: int) -> Row:
    """Encode a whole conversation.

    The row ends with the last response, or after ``max_length`` positions. A response that is not
    `Message.ended` is learned without its end token, one that is not `Message.learned` not at all.

    Args:
        conversation: A conversation with all its responses.
        tokenizer: A tokenizer with a chat template, unless the conversation is plain.
        max_length: Maximum number of positions T.

    Returns:
        The tokens, shifted labels and mask, [T] each; the mask is all False when the truncation
        removes every response. The notes tell what the template leaves out.

    Raises:
        UserError: A response or the template is missing, or the template rejects the conversation.
    """
    if conversation.needs_response or not _turns(conversation):
        raise UserError(
            f"{conversation.id} lacks a response to train on",
            "add a response, let the teacher generate it (data.responses.by: teacher), or set "
            "tidy: true in the source for chats as they are exported",
        )
    conversation, notes = _with_known_tokens(conversation, tokenizer)
    if not conversation.plain:
        conversation = with_cut_thought(conversation, template_of(conversation, tokenizer))
    text, responses = (_plain if conversation.plain else _templated)(conversation, tokenizer)
    ids, learned = tokens_of(text, responses, tokenizer)
    if conversation.plain:
        first = first_token(tokenizer)
        ids, learned = first + ids, [False] * len(first) + learned
    else:
        template = template_of(conversation, tokenizer)
        notes += unread(conversation, template) + unseen(conversation, text)
        if next(m.role for m in conversation.messages if m.role != "system") == "assistant":
            notes += (NO_PROMPT,)
        if ending := opening_as_end(tokenizer, template):
            notes += (OPENING_AS_END.format(ending),)
    if conversation.unread:
        notes += (UNREAD.format(", ".join(f"'{name}'" for name in conversation.unread)),)
    size = min(len(ids) - 1, max_length)
    return Row(
        inputs={
            "input_ids": torch.tensor(ids[:size], dtype=torch.int64),
            "attention_mask": torch.ones(size, dtype=torch.int64),
        },
        labels=torch.tensor(ids[1 : size + 1], dtype=torch.int64),
        mask=torch.tensor(learned[1 : size + 1], dtype=torch.bool),
        id=conversation.id,
        notes=tuple(dict.fromkeys(chain(conversation.notes, notes, *(r.notes for r in responses)))),
        teacher=conversation.teacher,
    )


def prompt_ids(conversation: Conversation, tokenizer: Any) -> list[int]:
    """The generation prompt of the first missing response or, without one, of the last response.

    The text is read as in `encode` and as a server reads it: what spells a special token is one.

    Args:
        conversation: The conversation.
        tokenizer: A tokenizer with a chat template, unless the conversation is plain.

    Returns:
        Token ids.

    Raises:
        UserError: The conversation is not valid UTF-8, or the chat template is missing or rejects
            the conversation.
    """
    try:
        "".join(message.content for message in conversation.messages).encode()
    except UnicodeEncodeError:  # bytes from a terminal that Python could not decode
        raise UserError(
            f"{conversation.id} contains bytes that are not valid UTF-8",
            "write the conversation in UTF-8",
        ) from None
    place = conversation.unanswered
    if place is None:
        place = max(_turns(conversation), default=len(conversation.messages))
    before = conversation.messages[:place]
    if conversation.plain:
        return first_token(tokenizer) + ids_of("".join(m.content for m in before), tokenizer)
    return ids_of(render(conversation, before, tokenizer, prompt=True)[0], tokenizer)


@functools.lru_cache(maxsize=8)
def digest_of(tokenizer: Any) -> str:
    """The digest of a tokenizer's tokens and ids, see `Conversation.tokenizer`."""
    return tokenizer_digest(tokenizer)


def _turns(conversation: Conversation) -> list[int]:
    """The places of the responses among the messages."""
    return [at for at, message in enumerate(conversation.messages) if message.role == "assistant"]


@functools.lru_cache(maxsize=8)
def _known_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(tokenizer.get_vocab().values())


def _with_known_tokens(
    conversation: Conversation, tokenizer: Any
) -> tuple[Conversation, tuple[str, ...]]:
    """The conversation without tokens that are not the tokenizer's, with a note about them.

    A model whose logits are padded may sample a class of the padding; another model of the same
    tokenizer may have no such class.
    """
    if conversation.tokenizer and conversation.tokenizer != digest_of(tokenizer):
        strange, note = [True] * len(conversation.messages), OTHER_TOKENIZER
    else:
        said = (message.tokens for message in conversation.messages)
        strange, note = [not _known_ids(tokenizer).issuperset(ids) for ids in said], PADDING
    if not any(strange):
        return conversation, ()
    messages = (
        replace(message, tokens=()) if is_so else message
        for message, is_so in zip(conversation.messages, strange, strict=True)
    )
    return replace(conversation, messages=tuple(messages)), (note,)


def _plain(conversation: Conversation, tokenizer: Any) -> tuple[str, list[Response]]:
    """The joined text and the responses in it. Raises UserError without an end token."""
    text, responses, ending = "", [], end_token(tokenizer, conversation)
    for message in conversation.messages:
        start = len(text)
        text += message.content
        if message.role == "assistant":
            end = len(text) + len(ending) * message.ended
            text += ending
            end = _cut(text, start, end, ending, message.ended)
            responses.append(Response(start, end, message.learned, message.tokens))
    return text, responses


def _templated(conversation: Conversation, tokenizer: Any) -> tuple[str, list[Response]]:
    """The rendered text and the responses in it."""
    *earlier, last = turns = _turns(conversation)
    messages = conversation.messages
    if messages[last].tokens:  # the row continues the generation prompt with them
        text, marks = render(conversation, messages[:last], tokenizer, prompt=True)
        turns = earlier
    else:
        text, marks = render(conversation, messages, tokenizer)
    rendering = _Rendering(conversation, tokenizer, text, messages[last].tokens != ())
    if marks and len(marks) != len(turns):
        raise UserError(
            f"{conversation.id}: the chat template marks {len(marks)} of {len(turns)} responses",
            "fix its {% generation %} marks, or remove them all",
        )
    responses = [
        rendering.marked(turn, *marks[number]) if marks else rendering.response(turn)
        for number, turn in enumerate(turns)
    ]
    if any(after.start < before.end for before, after in pairwise(responses)):
        raise _disordered(conversation)
    if messages[last].tokens:
        generated = messages[last]
        responses.append(Response(len(text), len(text), generated.learned, generated.tokens))
    return text, responses


@dataclass(frozen=True)
class _Rendering:
    """A rendered conversation, in which responses are found by rendering it with changes.

    Attributes:
        conversation: The conversation.
        tokenizer: The tokenizer with its chat template.
        text: The rendered text.
        prompt: Whether the text ends with the generation prompt of the last response.
    """

    conversation: Conversation
    tokenizer: Any
    text: str
    prompt: bool

    def marked(self, turn: int, start: int, end: int) -> Response:
        """The response of a turn between two marks, with the end token in or after them."""
        message, text = self.conversation.messages[turn], self.text
        said = text[start:end]
        special = self._special
        inside = [found for found in special.finditer(said) if not said[found.end() :].strip()]
        after = re.compile(rf"\s*({special.pattern})").match(text, end)
        close = after.span(1) if after else None
        if inside:
            close = start + inside[0].start(), start + inside[0].end()
        whole = close[0] if close and inside else end
        if not message.ended and (cut := self._end_of_content(turn, start)) > start:
            whole = min(whole, cut)  # marks may close what the response left open
        found = self._until(turn, start, whole, close, message)
        unseen = NOT_WHOLE.format("the content") in found.notes
        if unseen and not start <= self._end_of_content(turn, start) <= end:
            cause = f"{self.conversation.id}: the chat template marks a text other than a response"
            raise UserError(cause, "fix its {% generation %} marks, or remove them all")
        return found

    def response(self, turn: int) -> Response:
        """The response of a turn in a template without marks."""
        message = self.conversation.messages[turn]
        prompt, _ = self._render(self.conversation.messages[:turn], prompt=True)
        starts_alike = self.text.startswith(prompt)
        start = len(prompt) if starts_alike else self._start(turn)
        if not starts_alike:
            before = self._end_of_content(turn - 1, 0) if turn else 0
            if before > start:
                raise _disordered(self.conversation)
            if begun := self._begun(turn, prompt, before, start):
                start, starts_alike = begun, True
        said = max(start, self._end_of_content(turn, start))
        close = self._close(turn, said) if message.ended else None
        found = self._until(turn, start, said, close, message)
        return found if starts_alike else replace(found, notes=(OTHER_START, *found.notes))

    def _until(
        self, turn: int, start: int, said: int, close: tuple[int, int] | None, message: Message
    ) -> Response:
        """The response from a start to its end token, if it is ended, or to the end of its text."""
        end = said
        if close is not None and message.ended:
            token = self.text[slice(*close)]
            # in a generated response the text of an end token is none: it would have ended it
            end = close[1] if message.tokens else _cut(self.text, start, close[1], token, True)
        shown = self.text[start : max(said, end)]
        missing = lost(message, shown, self._template)
        if not message.tokens:
            missing += (NO_END,) if close is None and message.ended and message.learned else ()
            calls = message.fields.get("tool_calls") and not names(self._template, "tool_calls")
            printed = not calls and NOT_WHOLE.format("tool_calls") not in missing
            return Response(start, end, message.learned and printed, notes=missing)
        if missing or not is_all(message, self.text[start:said]):
            return Response(start, end, False, notes=(NOT_AS_GENERATED,))
        return Response(start, end, message.learned, message.tokens)

    def _render(self, messages: Sequence[Message], prompt: bool) -> tuple[str, Any]:
        return render(self.conversation, messages, self.tokenizer, prompt=prompt)

    def _with(self, turn: int, message: Message) -> str:
        """The text with another message in place of a response."""
        messages = self.conversation.messages
        last = _turns(self.conversation)[-1] if self.prompt else len(messages)
        changed = (*messages[:turn], message, *messages[turn + 1 : last])
        return self._render(changed, prompt=self.prompt)[0]

    def _start(self, turn: int) -> int:
        """The place where the text changes with the response, whatever its first letter is."""
        message = self.conversation.messages[turn]
        changed = [instead(message, other) for other in OTHERS[:2]]
        texts = [self._with(turn, each) for each in changed]
        if "tool_calls" in message.fields:
            with suppress(UserError):  # a result may need the call that it answers
                texts += [self._with(turn, without_calls(each)) for each in changed]
        at = min(alike(self.text, text) for text in texts)
        across = (found.start() for found in self._special.finditer(self.text) if found.end() > at)
        return min(at, next(across, at))  # never within a special token

    def _begun(self, turn: int, prompt: str, before: int, start: int) -> int | None:
        """Where generation starts, if the text has its prompt between two places of it.

        Some templates print earlier turns in another way once a later one follows.
        """
        plain, _ = self._render(self.conversation.messages[:turn], prompt=False)
        opening = prompt[len(plain) :] if prompt.startswith(plain) else ""
        found = self.text.rfind(opening, before, start) if opening else -1
        return None if found < 0 else found + len(opening)

    def _end_of_content(self, turn: int, start: int) -> int:
        """The end of what the response says, or ``start`` if the template does not tell."""
        message = self.conversation.messages[turn]
        ends = {message.content[-1:], message.content.strip()[-1:]}
        other = next(each for each in OTHERS if each[-1] not in ends)
        try:
            text = self._with(turn, longer(message) or instead(message, other))
        except UserError:  # the template accepts this message, but not another in its place
            return start
        same = alike(self.text[::-1], text[::-1])
        return start if text == self.text else len(self.text) - same

    def _close(self, turn: int, said: int) -> tuple[int, int]:
        """The place of the end token after what a response says.

        Where another message follows, it is the last special token before the text of the messages
        up to this turn and the whole text part, or the one at which they part: some templates end
        their last turn with another token than earlier ones, and some then begin the next one.
        """
        messages = self.conversation.messages
        special = self._special
        if turn + 1 < len(messages) or self.prompt:
            alone, _ = self._render(messages[: turn + 1], prompt=False)
            same = alike(self.text, alone)
            inside = [f.span() for f in special.finditer(self.text, said) if f.end() <= same]
            following = special.search(self.text, said)
            if len(inside) > 1:
                token = end_of_response(self.tokenizer, self._template)
                inside = [span for span in inside if self.text[slice(*span)] == token] or inside
            if inside:
                return inside[-1]
            if following is not None:
                return following.span()
        token = end_of_response(self.tokenizer, self._template)
        found = [f.span() for f in special.finditer(self.text, said)]
        ends = [span for span in found if self.text[slice(*span)] == token] or found
        if not ends:
            raise UserError(
                f"{self.conversation.id}: the chat template does not end its last response",
                FIX,
            )
        return ends[0]

    @property
    def _template(self) -> str:
        return template_of(self.conversation, self.tokenizer)

    @property
    def _special(self) -> re.Pattern[str]:
        return special_tokens(self.tokenizer)


def _disordered(conversation: Conversation) -> UserError:
    cause = "the chat template does not print the messages once and in their order"
    return UserError(f"{conversation.id}: {cause}", FIX)


def _cut(text: str, start: int, end: int, token: str, ended: bool) -> int:
    """The end of a response up to the first end token in it, after which generation stops."""
    found = text.find(token, start, end)
    return end if found < 0 else found + len(token) * ended
