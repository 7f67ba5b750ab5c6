"""Rows of data as conversations: the fields of a row determine its format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from kdcore.data.conversation import Conversation, Message
from kdcore.data.templates.rendering import REASONING
from kdcore.errors import UserError, nearest
from kdcore_baselines.sources.components import ConversationParams
from kdcore_baselines.sources.conversations.turn_names import (
    KNOWN,
    ROLES,
    SHAREGPT,
    filled_in,
    line_of,
)

ANSWERS = {
    "prompt": ("response", "completion"),
    "instruction": ("output", "response"),
    "question": ("answer", "response"),
    "query": ("response", "answer"),
    "problem": ("solution",),
    "input": ("output",),
    "inputs": ("targets",),
}
"""Fields of the response by the field of its prompt."""
TURNS = ("messages", "conversations", "conversation")
"""Fields that hold a list of turns."""
_SYSTEM = ("system", "system_prompt")
BLANK = "blank turns are left out (tidy)"
UNANSWERED = "user turns after the last response are left out (tidy)"
UNASKED = "a response before the first prompt is left out (tidy)"
_OWN = {"id", "plain", "tokenizer", "chat_template_kwargs"}
_CALLING = {"tool_calls", "tool_call_id", "content"}
"""Fields of turns that are not joined: they call a tool, answer a call, or have no content."""
_SAYING = {"tool_calls", "tool_call_id", *REASONING}
"""Fields by which a turn without content is not blank."""


class ConversationRows:
    """Reads rows as conversations.

    Args:
        params: Names of the fields, where they differ from the usual ones.
        source: Name of the source in messages.
    """

    def __init__(self, params: ConversationParams, source: str) -> None:
        self._params, self._source = params, source

    def read(self, row: Mapping[str, Any], place: str) -> Conversation:
        """Read one row.

        Args:
            row: The fields of the row.
            place: Name of the row in messages.

        Returns:
            The conversation.

        Raises:
            UserError: The row has no format that is known, or a field has another type.
        """
        said = {name: value for name, value in row.items() if value is not None}
        if (field := self._params.text) is not None:
            whole = said.get(field)
            if not isinstance(whole, str) or not whole.strip():
                cure = f"name the field of the text ({', '.join(row)}), or remove the row"
                raise UserError(f"{place} has no text in '{field}'", cure)
            return Conversation(str(said.get("id", place)), (Message("assistant", whole),), True)
        used = set(_OWN)
        messages = self._messages(said, place, used)
        notes: tuple[str, ...] = ()
        if self._params.tidy:
            messages, notes = tidied(messages)
        elif not any(message.role == "user" for message in messages):
            raise UserError(
                f"{place} has no user turn",
                "add a prompt, remove the line, or set tidy: true in the source, which leaves out "
                "such conversations",
            )
        if not messages or messages[0].role != "system":
            system = next((n for n in _SYSTEM if str(said.get(n, "")).strip()), None)
            text = self._params.system if system is None else str(said[system])
            messages = [*([] if text is None else [Message("system", text)]), *messages]
            used |= set(_SYSTEM)
        own, teacher = said.get("id"), said.get(self._params.teacher or "teacher", "")
        used |= {self._params.teacher or "teacher"}
        return Conversation(
            place if own is None else str(own),
            tuple(messages),
            self._params.template == "none" or said.get("plain") is True,
            self._arguments(said, place, used),
            str(said.get("tokenizer", "")),
            tuple(name for name in said if name not in used and name not in self._params.keep),
            {name: said[name] for name in self._params.keep if name in said},
            notes,
            teacher if isinstance(teacher, str) else json.dumps(_known(teacher), default=str),
        )

    def _arguments(self, row: Mapping[str, Any], place: str, used: set[str]) -> dict[str, Any]:
        """The arguments of the chat template in a row: its tools and others."""
        field = self._params.tools or "tools"
        used.add(field)
        tools = _from_json(row.get(field) or [], field, place)
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise UserError(
                f"{place}: '{field}' must be a list of mappings, the tools that can be called",
                "write a list of JSON schemas, or JSON text of one",
            )
        others = _from_json(row.get("chat_template_kwargs") or {}, "chat_template_kwargs", place)
        if not isinstance(others, dict):
            raise UserError(
                f"{place}: 'chat_template_kwargs' must be a mapping", "write {name: value}"
            )
        return ({"tools": tools} if tools else {}) | others

    def _messages(self, row: Mapping[str, Any], place: str, used: set[str]) -> list[Message]:
        """Read the turns of a row in any of the formats; add the fields read to ``used``."""
        field = self._params.messages
        if field is None and self._params.prompt is None:
            field = next((name for name in TURNS if isinstance(row.get(name), list)), None)
            field = "messages" if field is None and "messages" in row else field
        if field is not None:
            used.add(field)
            return self._turns(row.get(field), field, place)
        if self._params.prompt is None and "turns" in row:
            used |= {"turns", "reference"}
            return _alternating(row["turns"], row.get("reference"), "turns", place)
        return self._pair(row, place, used)

    def _turns(self, value: Any, field: str, place: str) -> list[Message]:
        if isinstance(value, str) and value.lstrip().startswith("["):  # a column of a .csv file
            value = _from_json(value, field, place)
        turns, named = _list(value, field, place), self._params.content
        names = {named} if named else {"content", "value"}
        # a table drops the field of a blank turn; if all turns lack it, it has another name
        blank = self._params.tidy and bool(
            named or any(isinstance(turn, dict) and names & turn.keys() for turn in turns)
        )
        return [self._message(turn, field, place, blank) for turn in turns]

    def _pair(self, row: Mapping[str, Any], place: str, used: set[str]) -> list[Message]:
        """Read a prompt and its response."""
        prompt = self._params.prompt or next((name for name in ANSWERS if name in row), "prompt")
        if prompt not in row:
            raise UserError(
                f"{place} has no prompt; its fields are {', '.join(row) or '(none)'}",
                filled_in(row, self._source)
                or f"use messages, conversations, turns, {', '.join(ANSWERS)}, or name the field: "
                "{prompt: ...}",
            )
        # Self-Instruct's seed tasks keep input and output in a list of instances
        instances = _list(row.get("instances") or [{}], "instances", place)
        row = {**row, **instances[0]}
        known = ANSWERS.get(prompt, ("response",))
        response = self._params.response or next((n for n in known if n in row), known[0])
        used |= {prompt, response, "instances"}
        asked, answer = row[prompt], row.get(response)
        if isinstance(asked, list) and all(isinstance(turn, dict) for turn in asked):
            before = [_context(message) for message in self._turns(asked, prompt, place)]
            return before + (self._turns(answer, response, place) if answer else [])
        if isinstance(asked, list):
            used.add("reference")
            return _alternating(asked, row.get("reference"), prompt, place)
        if prompt == "instruction":
            extra = next((name for name in ("input", "context") if row.get(name)), None)
            used |= {"input", "context"}
            asked = asked if extra is None else f"{asked}\n\n{row[extra]}"
        return _exchange(asked, answer, place)

    def _message(self, turn: Any, field: str, place: str, blank: bool) -> Message:
        """Read one turn; ``blank`` allows one without content."""
        shape = "{role, content}"
        if not isinstance(turn, Mapping):
            raise _not_a_message(place, shape)
        said = {name: value for name, value in turn.items() if value is not None}
        role_field = self._params.role or ("role" if "role" in said else "from")
        content_field = self._params.content or ("content" if "content" in said else "value")
        role = self._role(said.pop(role_field, None), role_field, place)
        calls = _calls(said.pop("tool_calls", None), place)
        content = _text_of(said.pop(content_field, "" if blank and not calls else None))
        ended, tokens = said.pop("ended", True), said.pop("tokens", ())
        if blank and role is None and not (content and content.strip()) and not calls:
            return Message("user", "")  # a cut row, which `tidied` leaves out
        if role is None or not isinstance(ended, bool) or not (content is not None or calls):
            if "role" in turn or self._params.role:
                raise _not_a_message(place, shape)
            line = line_of(field, [turn], self._source)
            raise _not_a_message(place, shape, line)
        learned = _learned(said, role, place)
        fields = ({"content": None} if content is None else {}) | said
        fields |= {"tool_calls": calls} if calls else {}
        return Message(role, content or "", ended, learned, tuple(tokens), fields)

    def _role(self, role: Any, field: str, place: str) -> str | None:
        if not isinstance(role, str):
            return None
        named = self._params.roles
        if role in named:
            return named[role]
        if field == "role" and not named:
            return role
        if role in SHAREGPT or role in KNOWN:
            return ROLES.get(role, role)
        raise UserError(
            f"{place}: the role '{role}' is unknown",
            f"name its role: roles: {{{role}: {ROLES.get(role.lower(), 'assistant')}}}",
        )


def is_answered(conversation: Conversation) -> bool:
    """Whether a conversation has user turns, and a response to each."""
    return conversation.turns > 0 and not conversation.needs_response


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
    turns: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    for place, row in rows:
        if row.get(field) is None:
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
    for key, (place, said) in turns.items():
        yield place, {"id": key, params.messages or "messages": said}


def _exchange(prompt: Any, response: Any, place: str) -> list[Message]:
    """Return a user turn, and an assistant turn if the response is not blank."""
    if not isinstance(prompt, str):
        raise UserError(f"{place}: the prompt must be a string, not {prompt!r}", "put it in quotes")
    if not prompt.strip():
        raise UserError(f"{place}: the prompt is blank", "write a prompt, or remove the row")
    if not isinstance(response, str | None):
        raise UserError(f"{place}: the response must be a string", "write a string")
    if response is None or not response.strip():
        return [Message("user", prompt)]
    return [Message("user", prompt), Message("assistant", response)]


def _alternating(asked: Any, answers: Any, field: str, place: str) -> list[Message]:
    """Several prompts with the responses that exist, in turns."""
    turns = _list(asked, field, place)
    given = _list(answers or [], "reference", place)[: len(turns)]
    pairs = zip_longest(turns, given)
    return [message for turn, answer in pairs for message in _exchange(turn, answer, place)]


def _context(message: Message) -> Message:
    """A message of a prompt, which is not learned."""
    return Message(message.role, message.content, learned=False, fields=message.fields)


def _learned(said: dict[str, Any], role: str, place: str) -> bool:
    """Take ``train`` and ``weight`` out of a message: whether it is learned."""
    values = [said.pop(name) for name in ("train", "weight") if name in said]
    if any(value not in (0, 1) for value in values):
        raise UserError(
            f"{place}: the weight of a message must be 0 or 1, not {values[0]!r}",
            "write weight: 0 (or train: false) for a response that is context only",
        )
    if role != "assistant" and any(values):
        raise UserError(
            f"{place}: a message of role {role} asks to be learned (train or weight)",
            "only responses are learned: remove train and weight from other messages",
        )
    return all(values)


def _text_of(content: Any) -> str | None:
    """A text or a list of text parts as one text; None for anything else."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    kinds = {part.get("type") for part in parts if isinstance(part, Mapping)}
    if texts and kinds == {"text"} and all(isinstance(text, str) for text in texts):
        return "".join(str(text) for text in texts)
    return None


def _calls(calls: Any, place: str) -> list[Any]:
    """Tool calls whose arguments are mappings: JSON text is read."""
    found = _from_json(calls or [], "tool_calls", place)
    if not isinstance(found, list) or not all(isinstance(call, dict) for call in found):
        raise UserError(
            f"{place}: 'tool_calls' must be a list of mappings",
            'write [{"function": {"name": ..., "arguments": {...}}}]',
        )
    return [_call(call) for call in found]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return call
    try:
        read = json.loads(arguments)
    except ValueError:
        return call  # not JSON: the template prints the text
    if not isinstance(read, dict):
        return call
    function = function | {"arguments": read}
    return call | {"function": function} if "function" in call else function


def _from_json(value: Any, field: str, place: str) -> Any:
    """A value, or the value of JSON text: columns of a table often hold such text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as fault:
        raise UserError(
            f"{place}: '{field}' is text that is not valid JSON: {fault}", "write valid JSON"
        ) from fault


def _known(value: Any) -> Any:
    """A mapping without the null fields that tables give each row."""
    if not isinstance(value, Mapping):
        return value
    return {name: each for name, each in value.items() if each is not None}


def _list(value: Any, field: str, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{place}: '{field}' must be a list", "write it in square brackets")
    return value


def _not_a_message(place: str, shape: str, line: str | None = None) -> UserError:
    return UserError(
        f"{place}: a message must be {shape} with two strings",
        line or 'write {"role": "user", "content": "..."}; ended, if set, must be true or false',
    )
