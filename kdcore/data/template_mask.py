"""Encoding of a conversation as tokens, and the mask of the learned ones: the assistant's turns.

A turn is learned from the place where generation would start to its first end token, after which
generation would stop. The ``{% generation %}`` marks of the template show where turns start;
without marks, the messages before each turn are rendered on their own. The tokens before a response
are always those of the generation prompt: a token that would cross the border is split there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch

from kdcore.data import bounded_template
from kdcore.data.conversation import Conversation, Message
from kdcore.errors import UserError
from kdcore.method.records import Row

MASK_RULE = 1
"""Version of the rule above; a teacher cache built under another version does not fit."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = (Message("user", "a"), Message("assistant", "kdcore"))


def encode(conversation: Conversation, tokenizer: Any, max_length: int) -> Row:
    """Encode a whole conversation.

    The row ends with the last learned token, or after ``max_length`` positions. A response that is
    not `Message.ended` is learned without its end token.

    Args:
        conversation: A conversation with all its responses.
        tokenizer: A tokenizer with a chat template, unless the conversation is plain.
        max_length: Maximum number of positions T.

    Returns:
        The tokens, shifted labels and mask, [T] each; the mask is all False when the truncation
        removes every response.

    Raises:
        UserError: A response is missing; or the chat template is missing, rejects the
            conversation, does not end a turn, or renders the messages before a turn in two ways.
    """
    responses = [message for message in conversation.messages if message.role == "assistant"]
    if conversation.needs_response or not responses:
        raise UserError(
            f"{conversation.id} lacks a response to train on",
            "add a response, or let the teacher generate it (data.responses.by: teacher)",
        )
    text, starts, end_token = (_plain if conversation.plain else _templated)(
        conversation, tokenizer
    )
    spans = [
        (start, _end(text, start, end_token, response.ended))
        for start, response in zip(starts, responses, strict=True)
    ]
    ids, learned = _tokens(text, spans, tokenizer)
    if conversation.plain:
        first = _first(tokenizer)
        ids, learned = first + ids, [False] * len(first) + learned
    size = min(len(ids) - 1, max_length)
    return Row(
        inputs={
            "input_ids": torch.tensor(ids[:size], dtype=torch.int64),
            "attention_mask": torch.ones(size, dtype=torch.int64),
        },
        labels=torch.tensor(ids[1 : size + 1], dtype=torch.int64),
        mask=torch.tensor(learned[1 : size + 1], dtype=torch.bool),
        id=conversation.id,
    )


def prompt_ids(conversation: Conversation, tokenizer: Any) -> list[int]:
    """The generation prompt of the first missing response or, without one, of the last response.

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
            f"{conversation.id} contains bytes that are not valid UTF-8", "encode it in UTF-8"
        ) from None
    place = conversation.unanswered
    if place is None:
        turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        place = max(turns, default=len(conversation.messages))
    before = conversation.messages[:place]
    if conversation.plain:
        return _first(tokenizer) + _ids("".join(m.content for m in before), tokenizer)
    return _ids(_render(before, tokenizer, conversation.id, prompt=True)[0], tokenizer)


def _templated(conversation: Conversation, tokenizer: Any) -> tuple[str, list[int], str]:
    """The rendered text, the start of each response in it, and the end token."""
    text, marked = _render(conversation.messages, tokenizer, conversation.id)
    turns = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    starts = [start for start, _ in marked] or list(_starts(conversation, turns, text, tokenizer))
    if len(starts) != len(turns):
        raise UserError(
            f"{conversation.id}: the chat template marks {len(starts)} of {len(turns)} responses",
            "fix its {% generation %} marks, or remove them all",
        )
    return text, starts, _end_token(tokenizer, tokenizer.get_chat_template())


def _plain(conversation: Conversation, tokenizer: Any) -> tuple[str, list[int], str]:
    """The joined text, the start of each response in it, and the end token."""
    text, starts = "", []
    for message in conversation.messages:
        if message.role == "assistant":
            starts.append(len(text))
            text += message.content + tokenizer.eos_token
        else:
            text += message.content
    return text, starts, tokenizer.eos_token


def _end(text: str, start: int, end_token: str, ended: bool) -> int:
    end = text.find(end_token, start)
    return len(text) if end < 0 else end + len(end_token) * ended


def _starts(
    conversation: Conversation, turns: Sequence[int], text: str, tokenizer: Any
) -> Iterator[int]:
    """The places in the text where generation would start each assistant turn."""
    for turn in turns:
        before, _ = _render(conversation.messages[:turn], tokenizer, conversation.id, prompt=True)
        if not text.startswith(before):
            raise UserError(
                f"{conversation.id}: the chat template renders the messages before a response "
                "differently for generation and for training",
                "use a template that marks responses with {% generation %}",
            )
        yield len(before)


def _render(
    messages: Sequence[Message], tokenizer: Any, id: str, prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, and the spans of its ``{% generation %}`` parts."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path} does not have a chat template",
            "use an instruction-tuned model, or set template: none in the chat source",
        )
    template = tokenizer.get_chat_template()
    (text,), marks = bounded_template.render(
        template,
        id,
        conversations=[[{"role": m.role, "content": m.content} for m in messages]],
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=_MARKS.search(template) is not None,
        **tokenizer.special_tokens_map,
    )
    return text, marks[0] if marks else []


@functools.lru_cache(maxsize=8)
def _end_token(tokenizer: Any, template: str) -> str:
    """The special token that ends a response in a template."""
    text, _ = _render(_PROBE, tokenizer, "a probe")
    if _PROBE[1].content not in text:
        raise UserError(
            "the chat template does not print the content of a response",
            "use the chat template of the model's authors, or print message['content'] in it",
        )
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    known = "|".join(map(re.escape, sorted(special | set(tokenizer.all_special_tokens))))
    found = re.match(rf"\s*({known})", text[text.rindex("kdcore") + len("kdcore") :])
    if not known or found is None:
        raise UserError(
            "the chat template does not put a special token after a response, so the end of a "
            "response cannot be learned",
            "add the tokenizer's eos_token to the template",
        )
    return found[1]


def _tokens(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Any
) -> tuple[list[int], list[bool]]:
    """Token ids up to the end of the last span, and for each whether it is in a span."""
    borders = list(chain.from_iterable(spans))
    prefixes = [text[:border] for border in borders]
    before = tokenizer(prefixes, add_special_tokens=False, verbose=False)["input_ids"]
    if any(before[-1][: len(prefix)] != prefix for prefix in before):
        pieces = [_ids(text[start:end], tokenizer) for start, end in pairwise([0, *borders])]
        before = list(accumulate(pieces))
    learned = [False] * len(before[-1])
    for start, end in zip(before[::2], before[1::2], strict=True):
        learned[len(start) : len(end)] = [True] * (len(end) - len(start))
    return before[-1], learned


def _ids(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _first(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, or an empty list."""
    ids: list[int] = tokenizer("")["input_ids"]
    return ids[:1]
