"""The starter spec of a job, filled in for a file of somebody's own data."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from kdcore.components.choice import Choice, SourceChoice
from kdcore.components.job import Job
from kdcore.components.registry import Registry
from kdcore.data.conversation import Conversation, Message
from kdcore.errors import UserError, counted, special_file, unreadable
from kdcore.models.assembly import Assembly

HELD_OUT = 500
"""Most rows that a starter spec holds out: more take long to measure."""
FEWEST = 10
"""Fewest rows of which some are held out."""
CHARACTERS = 3
"""Characters of a token, at least, for a guess at the length of rows."""
TEMPLATE = 64
"""Tokens of a chat template."""
ANSWER = 128
"""Longest answer that the model generates, in tokens."""
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
FEW = 200
"""Number of rows below which several epochs take minutes."""
SHOWN, WIDTH = 3, 60
"""Turns of the first conversation that are shown, and the characters of each."""
_HTML = re.compile(r"<(?:p|br|div|span|table|ul|ol|li)\b[^<>]*>|&(?:nbsp|amp|[a-zA-Z]uml);", re.I)
"""Marks of texts that a help desk exports as HTML."""
_SECTION = re.compile(r"^data:\n(?:[ #].*\n|\n(?=[ #]))*", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class OwnSpec:
    """A starter spec for a file.

    Attributes:
        text: The spec.
        findings: Sentences about the file.
    """

    text: str
    findings: tuple[str, ...]


def spec_of(job: Job, data: Path, file: Path, registry: Registry) -> OwnSpec:
    """Read a file, and fill in the starter spec of a job.

    Args:
        job: The job, whose starter spec has the section ``data``.
        data: The file.
        file: The file of the spec: the path of the data is relative to its folder, and the run
            folder has its name.
        registry: The installed components; one of the sources must read the file.

    Returns:
        The spec and what was found.

    Raises:
        UserError: The job does not have rows, no source reads the file, or a row is invalid.
    """
    text = next(iter(job.starter().values()))
    if not _SECTION.search(text):
        raise UserError(
            f"the starter spec of the job {job.name} does not have the section data",
            "remove --data, or use it with distill or train-drafter",
        )
    choice = _recognised(data, registry)
    read, rows = _read(choice, registry)
    different = len({row.asked for row in rows})
    share = _share(len(rows), different)
    path = os.path.relpath(data.resolve(), file.parent.resolve())
    given = {"path": path} | choice.params.model_dump(mode="json", exclude_defaults=True)
    source = {"name": choice.name, **given, "path": path}
    generated = any(row.needs_response for row in rows)
    length = _length(rows, ANSWER if generated else 0)
    section = _section(source, share, job, generated=generated, length=length)
    named = re.search(r"(?m)^run: (\S+)", text)
    if named:
        text = text.replace(named[1], "runs/" + re.sub(r"[^\w.-]+", "-", file.stem))
    text = _with_steps(_SECTION.sub(lambda _: section, text, count=1), len(rows), share)
    left_out = len(getattr(read, "left_out", ()))
    nameable = _nameable(choice, registry, rows)
    told = _findings(data, source, rows, left_out, share, different, nameable=nameable)
    return OwnSpec(text, tuple(told))


def _read(choice: Choice, registry: Registry) -> tuple[Any, list[Conversation]]:
    """A source, and its conversations; examples of another kind are left out."""
    source = Assembly(registry).build(choice)
    return source, [each for each in source.read() if isinstance(each, Conversation)]


def _nameable(choice: Choice, registry: Registry, rows: list[Conversation]) -> bool:
    """Whether a field that is not read could be named as that of the response to each prompt."""
    named = choice.params.model_fields_set & {"response", "messages", "group"}
    if named or "response" not in type(choice.params).model_fields:
        return False
    if any(_is_answered(row) for row in rows):
        return False
    return any(_is_response(choice, registry, name) for name in rows[0].unread)


def _is_response(choice: Choice, registry: Registry, name: str) -> bool:
    """Whether a source reads a field of its first row as the response, once it is named so."""
    params = choice.params.model_copy(update={"response": name, "limit": 1})
    try:
        _, rows = _read(replace(choice, params=params), registry)
    except UserError:
        return False
    return any(map(_is_answered, rows))


def _with_steps(text: str, rows: int, share: float) -> str:
    """A spec with a number of epochs that fits the rows, and a checkpoint each tenth of the run."""
    text = re.sub(r"(?m)^(  epochs:) \d+", rf"\1 {4 if rows <= FEW else 1}", text)
    numbers = dict(re.findall(r"(?m)^  (epochs|batch_size): (\d+)", text))
    batches = math.ceil(rows * (1 - share / 100) / int(numbers["batch_size"]))
    each_tenth = max(1, int(numbers["epochs"]) * batches // 10)
    return re.sub(r"(?m)^(  (?:save|eval)_every:) \d+", rf"\1 {each_tenth}", text)


def _recognised(data: Path, registry: Registry) -> Choice:
    """The first installed source that reads the file, with its params."""
    try:
        kind = data.stat().st_mode
    except OSError as fault:
        raise unreadable(data, fault, "the working directory") from fault
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise special_file(data)
    for component in (c for c, _ in registry.components() if c.kind == "source"):
        recognise = getattr(registry.attribute(component), "recognise", None)
        params = recognise(data) if recognise else None
        if params is not None:
            said = {"name": component.name, "path": str(data.resolve()), **params}
            context = {"registry": registry}
            adapter: TypeAdapter[Choice] = TypeAdapter(SourceChoice)
            return adapter.validate_python(said, context=context)
    raise UserError(
        f"no source recognises {data}", "use .jsonl, .json, .csv, .parquet or .arrow, also as .gz"
    )


def _share(rows: int, prompts: int) -> float:
    """The share of different prompts to hold out, in percent: at least one of them, or 0."""
    if rows < FEWEST or prompts < 2:
        return 0
    share = 10 if rows <= 10 * HELD_OUT else math.floor(1000 * HELD_OUT / rows) / 10
    return max(share, math.ceil(1000 / prompts) / 10)


def _length(asked: list[Conversation], answer: int) -> int:
    """A length that holds 99 of 100 rows with a generated answer, in tokens."""
    sizes = sorted(map(_characters, asked)) or [0]
    needed = sizes[math.ceil(0.99 * len(sizes)) - 1] / CHARACTERS + TEMPLATE + answer
    return next((length for length in LENGTHS if length >= needed), LENGTHS[-1])


def _characters(conversation: Conversation) -> int:
    """The characters of a conversation, with its tools and calls as JSON."""
    said: list[Any] = [message.fields for message in conversation.messages]
    said = [dict(each) for each in (*said, conversation.arguments) if each]
    content = sum(len(message.content) for message in conversation.messages)
    return content + sum(len(json.dumps(each, default=str)) for each in said)


def _section(
    source: Mapping[str, Any], share: float, job: Job, *, generated: bool, length: int
) -> str:
    """The section ``data`` of a spec."""
    who = "target" if job.name == "train-drafter" else "teacher"
    plain = yaml.safe_dump(dict(source), sort_keys=False, allow_unicode=True, width=10_000)
    lines = [
        "data:",
        "  # The path is relative to the folder of this file.",
        "  train:",
        *(f"    {line}" for line in plain.splitlines()),
    ]
    if share:
        what = "of these rows, never trained on; evaluated before and after"
        lines.append(f"  heldout: {share:g} %        # {what}")
    lines.append("  responses:")
    if generated:
        lines += [
            f"    by: {who}        # the {who} answers the prompts",
            f"    max_new_tokens: {ANSWER}",
        ]
    else:
        lines.append(
            f"    by: dataset        # the answers in the file; `{who}` generates new ones"
        )
    lines.append(f"  max_length: {length}      # maximum row length in tokens; longer rows are cut")
    return "\n".join(lines) + "\n"


def _is_answered(conversation: Conversation) -> bool:
    """Whether any of its turns has a response."""
    return any(message.role == "assistant" for message in conversation.messages)


def _called(message: Message) -> str:
    """The names of the tools that a message calls."""
    calls = message.fields.get("tool_calls") or ()
    named = [call.get("function", call).get("name") for call in calls]
    return f"(calls {', '.join(map(str, named))})" if named else ""


def _findings(
    data: Path,
    source: Mapping[str, Any],
    rows: list[Conversation],
    left_out: int,
    share: float,
    different: int,
    *,
    nameable: bool,
) -> Iterator[str]:
    yield f"{data}: {counted(len(rows), 'conversation')}, read by the source {source['name']}"
    for name, value in source.items():
        if isinstance(value, dict):
            yield f"  {name}: {', '.join(f'{own} is {meant}' for own, meant in value.items())}"
        elif name == "encoding":
            yield f"  encoding: {value}, as the file is not UTF-8"
        elif name not in ("name", "path", "tidy"):
            yield f"  {name}: the field '{value}'"
    if "tidy" in source:
        yield "  tidy: successive turns of one role are joined"
        if left_out:
            yield f"  left out for want of a response: {counted(left_out, 'conversation')}"
        every = counted(len(rows), "conversation")
        for note, count in Counter(note for row in rows for note in row.notes).items():
            yield f"  in {count} of {every}, {note.removesuffix(' (tidy)')}"
    yield "  the first conversation:"
    for message in rows[0].messages[:SHOWN]:
        text = " ".join(message.content.split()) or _called(message)
        yield f"    {message.role}: {text if len(text) <= WIDTH else text[: WIDTH - 3] + '...'}"
    unread = dict.fromkeys(name for row in rows for name in row.unread)
    if unread:
        yield f"  not read: the fields {', '.join(unread)}"
    unanswered = sum(row.needs_response for row in rows)
    if unanswered:
        if nameable:
            yield "  if one of them is the response, name it in the source: response: FIELD"
        yield f"  {unanswered} of {len(rows)} lack a response: the model will answer all prompts"
        replaced = sum(row.messages[-1].role == "user" and _is_answered(row) for row in rows)
        if replaced:
            yield f"  {replaced} of {len(rows)} end in a turn of the user, but have earlier answers"
            yield "  which the model will replace; to learn these answers instead, and to leave out"
            yield "  the last turn, set tidy: true in data.train, and responses.by: dataset"
    else:
        yield "  all have responses, which are kept (responses.by: dataset)"
    marked = sum(
        any(each.role == "assistant" and _HTML.search(each.content) for each in row.messages)
        for row in rows
    )
    if 10 * marked > len(rows):
        yield f"  {marked} of {len(rows)} have HTML in a response, which the student would learn to"
        yield "  write: export plain text, or strip the tags"
    if share:
        some = f": {different} different prompts" if different < len(rows) else ""
        yield f"  held out: {share:g} %, chosen by what the conversations ask{some}"
    elif len(rows) < FEWEST:
        yield f"  nothing is held out: there are fewer than {FEWEST} conversations"
    else:
        yield "  nothing is held out: all conversations ask the same"
