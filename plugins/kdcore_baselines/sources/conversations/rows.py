"""Rows of data as conversations: the fields of a row determine its format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from itertools import zip_longest
from typing import Any

from kdcore.data.conversation import Conversation, Message
from kdcore.data.templates.rendering import REASONING
from kdcore.errors import UserError
from kdcore_baselines.sources.components import ConversationParams
from kdcore_baselines.sources.conversations.content_parts import read_content
from kdcore_baselines.sources.conversations.tidying import opened, tidied
from kdcore_baselines.sources.conversations.tools import are_calls, calls_of, from_json, tools_of
from kdcore_baselines.sources.conversations.turn_names import (
    KNOWN,
    ROLES,
    SHAREGPT,
    exchanged,
    filled_in,
    line_of,
)

ANSWERS = {
    "prompt": ("response", "completion"),
    "instruction": ("output", "response"),
    "question": ("answer", "response", "solutions", "answers"),
    "query": ("response", "answer", "answers"),
    "problem": ("solution", "solutions"),
    "input": ("output", "target"),
    "inputs": ("targets",),
}
"""Fields of the response by the field of its prompt."""
_RESPONSES = {name for each in ANSWERS.values() for name in each}
TURNS = ("messages", "conversations", "conversation")
"""Fields that hold a list of turns."""
_SYSTEM = ("system", "system_prompt")
_OWN = {"id", "plain", "tokenizer", "chat_template_kwargs"}
_BESIDE = {"instruction": ("input", "context"), "question": ("context", "passage")}
"""Fields of what a prompt is about, by the field of the prompt."""
_SEVERAL = {"solutions", "answers", "responses"}
"""Fields whose JSON text is a list of responses; in others it is one response."""
_SEEN = ("image", "images", "video", "videos", "audio", "audios")
"""Fields of what a language model does not read, and on which the conversation depends."""
FIRST = "only the first of several responses is learned"


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
        _refuse_unseen(said, self._params, place)
        used, notes = set(_OWN), list[str]()
        messages = self._messages(said, place, used, notes)
        text = self._system(said, messages, used)
        opening, messages = opened(messages, text, self._params.roles.get("system", "system"))
        if self._params.tidy:
            messages, left_out = tidied(messages)
            notes += left_out
        elif not any(message.role == "user" for message in messages):
            raise UserError(
                f"{place} has no user turn",
                "add a prompt, remove the line, or set tidy: true in the source, which leaves out "
                "such conversations",
            )
        own, teacher = said.get("id"), said.get(self._params.teacher or "teacher", "")
        used |= {self._params.teacher or "teacher"}
        return Conversation(
            place if own is None else str(own),
            (*opening, *messages),
            self._params.template == "none" or said.get("plain") is True,
            self._arguments(said, place, used),
            str(said.get("tokenizer", "")),
            tuple(name for name in said if name not in used and name not in self._params.keep),
            {name: said[name] for name in self._params.keep if name in said},
            tuple(notes),
            teacher if isinstance(teacher, str) else json.dumps(_known(teacher), default=str),
        )

    def _system(
        self, row: Mapping[str, Any], messages: list[Message], used: set[str]
    ) -> str | None:
        """The text of the system turn of a row without one among its turns."""
        if messages and messages[0].role == "system":
            return None
        used |= set(_SYSTEM)
        system = next((name for name in _SYSTEM if str(row.get(name, "")).strip()), None)
        return self._params.system if system is None else str(row[system])

    def _arguments(self, row: Mapping[str, Any], place: str, used: set[str]) -> dict[str, Any]:
        """The arguments of the chat template in a row: its tools and others."""
        field = self._tools_field(row)
        used.add(field)
        tools = tools_of(row.get(field), field, place)
        others = from_json(row.get("chat_template_kwargs") or {}, "chat_template_kwargs", place)
        if not isinstance(others, dict):
            raise UserError(
                f"{place}: 'chat_template_kwargs' must be a mapping", "write {name: value}"
            )
        return ({"tools": tools} if tools else {}) | others

    def _tools_field(self, row: Mapping[str, Any]) -> str:
        known = ("tools", "functions")
        return self._params.tools or next((name for name in known if name in row), "tools")

    def _messages(
        self, row: Mapping[str, Any], place: str, used: set[str], notes: list[str]
    ) -> list[Message]:
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
        return self._pair(row, place, used, notes)

    def _turns(self, value: Any, field: str, place: str) -> list[Message]:
        if isinstance(value, str) and value.lstrip().startswith("["):  # a column of a .csv file
            value = from_json(value, field, place)
        if value is None and self._params.tidy:  # a cut row
            return []
        turns, named = _list(value, field, place), self._params.content
        if turns and all(isinstance(turn, str) for turn in turns):  # the user's, the assistant's
            return _alternating(turns[::2], turns[1::2], field, place)
        if named is None and self._params.role is None and (pairs := exchanged(turns)):
            prompts, responses = (list(each) for each in zip(*pairs, strict=True))
            return _alternating(prompts, responses, field, place)
        names = {named} if named else {"content", "value"}
        # a table drops the field of a blank turn; if all turns lack it, it has another name
        blank = self._params.tidy and bool(
            named or any(isinstance(turn, dict) and names & turn.keys() for turn in turns)
        )
        return [self._message(turn, field, place, blank) for turn in turns]

    def _pair(
        self, row: Mapping[str, Any], place: str, used: set[str], notes: list[str]
    ) -> list[Message]:
        """Read a prompt and its response."""
        prompt = self._params.prompt or next((name for name in ANSWERS if name in row), "prompt")
        if self._params.tidy and self._is_cut(row, prompt):
            return []
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
            if isinstance(answer, str):
                return before + ([Message("assistant", answer)] if answer.strip() else [])
            return before + (self._turns(answer, response, place) if answer else [])
        if isinstance(asked, list):
            used.add("reference")
            return _alternating(asked, row.get("reference"), prompt, place)
        beside = [name for name in _BESIDE.get(prompt, ()) if isinstance(row.get(name), str)]
        used |= {*beside}
        if extra := next((row[name] for name in beside if row[name]), None):
            asked = f"{asked}\n\n{extra}"
        answer = self._one_of(answer, response, row, notes)
        if are_calls(answer):
            fields = {"content": None, "tool_calls": calls_of(answer, response, place)}
            return [*_exchange(asked, None, place), Message("assistant", "", fields=fields)]
        return _exchange(asked, answer, place)

    def _is_cut(self, row: Mapping[str, Any], prompt: str) -> bool:
        """Whether a row lacks the prompt that others have."""
        if prompt in row:
            return isinstance(row[prompt], str) and not row[prompt].strip()
        return self._params.prompt is not None or not row or bool(_RESPONSES & row.keys())

    def _one_of(self, answer: Any, field: str, row: Mapping[str, Any], notes: list[str]) -> Any:
        """A response: of a list of several the first one, and JSON text of tool calls as calls."""
        if isinstance(answer, dict):  # SQuAD, TriviaQA
            answer = answer.get("text", answer.get("value", answer))
        listed = answer
        tools = bool(row.get(self._tools_field(row)))
        if isinstance(answer, str) and answer.lstrip().startswith("["):
            with suppress(ValueError, RecursionError):
                listed = json.loads(answer)
        if tools and are_calls(listed):
            return listed
        if isinstance(answer, str) and field not in _SEVERAL:
            return answer
        if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
            return answer
        notes += [FIRST] if len(listed) > 1 else []
        return listed[0] if listed else None

    def _message(self, turn: Any, field: str, place: str, blank: bool) -> Message:
        """Read one turn; ``blank`` allows one without content."""
        shape = "{role, content}"
        if not isinstance(turn, Mapping):
            raise _not_a_message(place, shape)
        said = {name: value for name, value in turn.items() if value is not None}
        role_field = self._params.role or ("role" if "role" in said else "from")
        content_field = self._params.content or ("content" if "content" in said else "value")
        named = said.pop(role_field, None)
        calls = calls_of(said.pop("tool_calls", None), "tool_calls", place)
        calls += calls_of(said.pop("function_call", None), "function_call", place)
        value = said.pop(content_field, "" if blank and not calls else None)
        if turn.get(role_field) == "function_call":  # its text is the call
            calls, value = calls_of(value, content_field, place), None
        content, thought = read_content(value, place)
        ended, tokens = said.pop("ended", True), said.pop("tokens", ())
        silent = blank and not (content and content.strip()) and not calls
        if silent and not self._knows(named):
            return Message("user", "")  # a cut row, which `tidied` leaves out
        role = self._role(named, role_field, place)
        if thought is not None:
            if role != "assistant" or any(name in said for name in REASONING):
                raise UserError(
                    f"{place}: a message of role {role} has a thought among the parts of its "
                    "content, but it is not a response, or it has a second thought",
                    "remove one of the thoughts, or the row",
                )
            said[REASONING[0]] = thought
        if role is None or not isinstance(ended, bool) or not (content is not None or calls):
            if "role" in turn or self._params.role:
                raise _not_a_message(place, shape)
            line = line_of(field, [turn], self._source)
            raise _not_a_message(place, shape, line)
        learned = _learned(said, role, place)
        fields = ({"content": None} if content is None else {}) | said
        fields |= {"tool_calls": calls} if calls else {}
        return Message(role, content or "", ended, learned, tuple(tokens), fields)

    def _knows(self, role: Any) -> bool:
        """Whether a role has a meaning, whatever its field is called."""
        return isinstance(role, str) and role in {*self._params.roles, *SHAREGPT, *KNOWN}

    def _role(self, role: Any, field: str, place: str) -> str | None:
        if not isinstance(role, str):
            return None
        named = self._params.roles
        if role in named and role != "system":  # which `read` names when the turns are complete
            return named[role]
        if field == "role" and not named and role not in ("function", "function_call"):
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


def _exchange(prompt: Any, response: Any, place: str) -> list[Message]:
    """Return a user turn, and an assistant turn if the response is not blank."""
    if not isinstance(prompt, str):
        raise UserError(f"{place}: the prompt must be a string, not {prompt!r}", "put it in quotes")
    if not prompt.strip():
        raise UserError(f"{place}: the prompt is blank", "write a prompt, or remove the row")
    if not isinstance(response, str | None):
        raise UserError(
            f"{place}: the response must be a string, not {response!r:.60}",
            "write it as text, or name the field with the response (response: FIELD)",
        )
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
            f"{place}: a message of role {role} sets train or weight, "
            "but only responses are learned",
            "remove train and weight from all messages but responses",
        )
    return all(values)


def _refuse_unseen(row: Mapping[str, Any], params: ConversationParams, place: str) -> None:
    """Raises UserError for a row with images or the like; a table has empty fields in others."""
    empty: list[Any] = [None, "", [], {}]
    for name in (name for name in _SEEN if name in row and name not in params.keep):
        if not any(row[name] is each or row[name] == each for each in empty):
            raise UserError(
                f"{place} has '{name}', which language models do not read",
                f"remove {place} from the data, and rows like it; or remove the field '{name}' if "
                "the text is complete without it",
            )


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
