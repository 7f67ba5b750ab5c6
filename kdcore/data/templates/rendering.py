"""Rendering of conversations by chat templates."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from jinja2.exceptions import TemplateError, UndefinedError

from kdcore.data.conversation import Conversation, Message
from kdcore.data.templates import bounded as bounded_template
from kdcore.errors import UserError

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of one field, the thoughts before a response; templates read one or another of them."""

_CONTENT, _THOUGHT = "kdcore", "kdthought"
_ALL = ("all roles",)
_PROBE = Conversation("a probe", (Message("user", "a"), Message("assistant", _CONTENT)))
_TURNS = [{"role": "user", "content": "kduser"}, {"role": "assistant", "content": _CONTENT}]
_NO_TEXT = re.compile("[\ud800-\udfff]")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASKS_FOR_NONE = re.compile(r"""content['"\]]*\s+is\s+(not\s+)?none""", re.IGNORECASE)


def end_token(tokenizer: Any, conversation: Conversation) -> str:
    """The end token of plain text.

    Args:
        tokenizer: The tokenizer.
        conversation: The conversation without a template, which the message names.

    Returns:
        The token as text.

    Raises:
        UserError: The tokenizer does not have one.
    """
    if tokenizer.eos_token is None:
        raise UserError(
            f"{conversation.id} sets template: none, and its responses end with the end token, "
            "which the tokenizer does not have",
            "set eos_token in its tokenizer_config.json",
        )
    return str(tokenizer.eos_token)


def template_of(conversation: Conversation, tokenizer: Any) -> str:
    """The tokenizer's chat template for a conversation, which may depend on its tools.

    Args:
        conversation: The conversation.
        tokenizer: The tokenizer.

    Returns:
        The template.

    Raises:
        UserError: The tokenizer does not have a chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path} does not have a chat template",
            "use an instruction-tuned model, or set template: none in the chat source",
        )
    return str(tokenizer.get_chat_template(tools=conversation.arguments.get("tools")))


def render(
    conversation: Conversation,
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Render messages of a conversation.

    A last response ends with `opening_as_end`, if the template does not end it.

    Args:
        conversation: The conversation, with the arguments of the template.
        messages: The messages.
        tokenizer: A tokenizer with a chat template.
        prompt: Whether the generation prompt follows the messages.

    Returns:
        The text, and the start and end of each of its ``{% generation %}`` parts.

    Raises:
        UserError: The chat template is missing, or rejects the messages.
    """
    template = template_of(conversation, tokenizer)
    text, marks = _accepted(messages, template, conversation, tokenizer, prompt)
    if messages and messages[-1].role == "assistant" and not prompt:
        text += opening_as_end(tokenizer, template)
    if len(marks) > sum(message.role == "assistant" for message in messages):
        marks = _joined(marks, text, special_tokens(tokenizer))
    return text, marks


def _joined(
    marks: Sequence[tuple[int, int]], text: str, special: re.Pattern[str]
) -> list[tuple[int, int]]:
    """Marks with nothing but special tokens and spaces between them, as one each.

    Some templates mark the parts of a response and its end token one by one.
    """
    joined: list[tuple[int, int]] = []
    for start, end in marks:
        between = text[joined[-1][1] : start] if joined else "a response"
        if re.fullmatch(rf"(?:\s|{special.pattern})*", between):
            start, _ = joined.pop()
        joined.append((start, end))
    return joined


def _accepted(
    messages: Sequence[Message],
    template: str,
    conversation: Conversation,
    tokenizer: Any,
    prompt: bool,
) -> tuple[str, list[tuple[int, int]]]:
    """The text and the marks, in the form of messages that the template accepts."""
    said = [_with_reasoning(_with_content(message.said, template)) for message in messages]
    try:
        return _rendered(said, template, conversation, tokenizer, prompt)
    except UserError as refusal:
        if type(refusal.__cause__) is TemplateError:  # of raise_exception
            cure = _what_it_accepts(said, template, conversation, tokenizer, prompt)
            raise UserError(refusal.cause, cure or refusal.cure) from refusal
        if not isinstance(refusal.__cause__, TypeError | UndefinedError):
            raise
    # some templates read the arguments of a tool call as text, or a content where none is
    texts = [_with_text_arguments(each) for each in said]
    with suppress(UserError):
        return _rendered(texts, template, conversation, tokenizer, prompt)
    blank = [each | {"content": ""} if each["content"] is None else each for each in said]
    return _rendered(blank, template, conversation, tokenizer, prompt)


def names(template: str, field: str) -> bool:
    """Whether a chat template names a field of messages; reasoning has several names."""
    wanted = REASONING if field in REASONING else (field,)
    return any(re.search(rf"\b{re.escape(name)}\b", template) for name in wanted)


def prints_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template prints the present date."""
    return "strftime_now" in str(tokenizer.chat_template)


@functools.lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Compile a pattern of a tokenizer's special tokens."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    known = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, known)) or "(?!)")


@functools.lru_cache(maxsize=8)
def end_of_response(tokenizer: Any, template: str) -> str:
    """The special token that ends the last response in a template.

    Args:
        tokenizer: The tokenizer, whose chat template it is.
        template: The template.

    Returns:
        The token as text.

    Raises:
        UserError: The template does not print the content of a response, or no token after it.
    """
    text, _ = render(_PROBE, _PROBE.messages, tokenizer)
    after = _after_content(text)
    if after is None:
        raise UserError(
            "the chat template does not print the content of a response",
            "name another template (template: FILE beside the model), or print message['content'] "
            "in this one",
        )
    special = special_tokens(tokenizer).pattern
    found = re.match(rf"\s*({special})((?:{special})*)", after)
    if found is None:
        raise UserError(
            "the chat template does not put a special token after a response, so the end of a "
            "response cannot be learned",
            "name another template (template: FILE beside the model), or print eos_token after a "
            "response in this one",
        )
    last = tokenizer.eos_token  # Command R7B ends its response, and then its turn
    return str(last) if last and last in found[2] else found[1]


@functools.lru_cache(maxsize=8)
def opening_as_end(tokenizer: Any, template: str) -> str:
    """The special token that begins a user's turn, if it is also what ends the response before it.

    GLM-4 generates the token of the next turn as its end token, and its template prints it with
    that turn, so that the last response of a conversation lacks it.

    Args:
        tokenizer: The tokenizer, whose chat template it is.
        template: The template.

    Returns:
        The token as text; empty for a template that prints an end token after a response.
    """
    after = []
    for messages in (_PROBE.messages, (*_PROBE.messages, Message("user", "a"))):
        try:
            text, _ = _accepted(messages, template, _PROBE, tokenizer, prompt=False)
        except UserError:
            return ""
        after.append(_after_content(text))
    alone, followed = after
    if alone is None or followed is None:
        return ""
    special = special_tokens(tokenizer)
    begins = re.match(rf"\s*({special.pattern})", followed)
    return begins[1] if begins and not special.search(alone) else ""


def _after_content(text: str) -> str | None:
    """What a template prints after the response of a probe; None if it does not print that."""
    _, printed, after = text.rpartition(_CONTENT)
    return after if printed else None


def _rendered(
    said: list[dict[str, Any]],
    template: str,
    conversation: Conversation,
    tokenizer: Any,
    prompt: bool,
) -> tuple[str, list[tuple[int, int]]]:
    """The text and the marks, with each content in the form that the template reads."""
    given = _in_parts(said, _read_in_parts(tokenizer, template))
    if _reads_thoughts_in_parts(tokenizer, template):
        given = [_with_thought_in_parts(each) for each in given]
    return _rendered_as_given(given, template, conversation, tokenizer, prompt)


@functools.lru_cache(maxsize=8)
def _read_in_parts(tokenizer: Any, template: str) -> Collection[str]:
    """The roles whose content a template reads as a list of parts only: none, the user's, all.

    Templates of models that see images often do, and ignore or refuse a content that is a text.
    """
    for roles in ((), ("user",), _ALL):
        with suppress(UserError):
            given = _in_parts(_TURNS, roles)
            text, _ = _rendered_as_given(given, template, _PROBE, tokenizer, False)
            if all(turn["content"] in text for turn in _TURNS):
                return roles
    return ()


@functools.lru_cache(maxsize=8)
def _reads_thoughts_in_parts(tokenizer: Any, template: str) -> bool:
    """Whether a template reads the thought of a response as a part of its content, as Mistral's."""
    if "thinking" not in template:
        return False
    turn = _with_reasoning(_TURNS[1] | {REASONING[0]: _THOUGHT})
    shown = []
    for response in (turn, _with_thought_in_parts(turn)):
        text = ""
        with suppress(UserError):
            given = [*_in_parts(_TURNS[:1], _read_in_parts(tokenizer, template)), response]
            text, _ = _rendered_as_given(given, template, _PROBE, tokenizer, False)
        shown.append(_THOUGHT in text and _CONTENT in text)
    return shown == [False, True]


def _with_thought_in_parts(said: dict[str, Any]) -> dict[str, Any]:
    """A response with its thought as the first part of its content."""
    thought, content = said.get("thinking"), said["content"]
    if not isinstance(thought, str):
        return said
    rest = _in_parts([said], _ALL)[0]["content"] if content else []
    return said | {"content": [{"type": "thinking", "thinking": thought}, *rest]}


def _in_parts(said: list[dict[str, Any]], roles: Collection[str]) -> list[dict[str, Any]]:
    """Messages of which those of some roles have a list with their text as content."""
    return [
        each | {"content": [{"type": "text", "text": each["content"]}]}
        if isinstance(each["content"], str) and (roles is _ALL or each["role"] in roles)
        else each
        for each in said
    ]


def _rendered_as_given(
    said: list[dict[str, Any]],
    template: str,
    conversation: Conversation,
    tokenizer: Any,
    prompt: bool,
) -> tuple[str, list[tuple[int, int]]]:
    (text,), marks = bounded_template.render(
        template,
        conversation.id,
        conversations=[said],
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=_MARKS.search(template) is not None,
        **tokenizer.special_tokens_map | dict(conversation.arguments),
    )
    if _NO_TEXT.search(text):
        raise UserError(
            f"{conversation.id}: the chat template prints half of a surrogate pair",
            "remove such escapes (\\uD...) from the template",
        )
    return text, marks[0] if marks else []


def _what_it_accepts(said: list[dict[str, Any]], *given: Any) -> str | None:
    """The cure for a refused conversation: which parameters of the source make it an accepted one.

    Many templates want turns of the user and the assistant by turns, and some no system turn.
    """
    parameters = {
        "tidy: true": said,
        "roles: {developer: system}": _renamed(said, "developer", "system"),
        "roles: {system: user}, tidy: true": _renamed(said, "system", "user"),
        "roles: {developer: user}, tidy: true": _renamed(said, "developer", "user"),
    }
    for line, changed in parameters.items():
        asked = _by_turns(changed) if "tidy" in line else changed
        if asked == said:
            continue
        with suppress(UserError):
            _rendered(asked, *given)
            joined = "successive turns of one role are then one, "
            what = joined if "tidy" in line else ""
            return f"set {line} in the source: {what}which the template accepts"
    return None


def _renamed(said: list[dict[str, Any]], role: str, by: str) -> list[dict[str, Any]]:
    return [each | {"role": by} if each["role"] == role else each for each in said]


def _by_turns(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of which successive ones of a role are one, from the first prompt on."""
    found: list[dict[str, Any]] = []
    for each in said:
        if found and found[-1]["role"] == each["role"] and "tool_calls" not in each:
            found[-1] = found[-1] | {"content": f"{found[-1]['content']}\n{each['content']}"}
        elif each["role"] != "assistant" or any(m["role"] == "user" for m in found):
            found.append(each)
    return found


def _with_content(said: dict[str, Any], template: str) -> dict[str, Any]:
    """A message with an empty content in place of null, which most templates print as None."""
    if said["content"] is None and not _ASKS_FOR_NONE.search(template):
        return said | {"content": ""}
    return said


def _with_reasoning(said: dict[str, Any]) -> dict[str, Any]:
    """A message with its reasoning under each of the names that templates read."""
    thought = next((said[name] for name in REASONING if said.get(name) is not None), None)
    return said if thought is None else dict.fromkeys(REASONING, thought) | said


def _with_text_arguments(said: dict[str, Any]) -> dict[str, Any]:
    """A message with the arguments of its tool calls as JSON text."""
    calls = said.get("tool_calls")
    if not isinstance(calls, list):
        return said
    return said | {"tool_calls": [_as_text(call) for call in calls]}


def _as_text(call: Any) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(function.get("arguments"), dict):
        return call
    text = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return call | {"function": text} if "function" in call else text
