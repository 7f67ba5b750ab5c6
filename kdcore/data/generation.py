"""Responses that the teacher generates, once, into a file that a killed run takes up again.

The file has one conversation a line, as the chat source reads them; beside it a manifest says
what the responses depend on. Batches are planned from the prompts alone and taken up whole, so
that a resumed run generates what the unbroken one would have.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kdcore.data.continuation import continue_prompts, pick
from kdcore.data.conversation import Conversation, Message
from kdcore.data.template_mask import prompt_ids
from kdcore.errors import UserError
from kdcore.models import LoadedModel
from kdcore.progress import Progress
from kdcore.specs import ResponsesSpec


def respond(
    conversations: Sequence[Conversation],
    teacher: LoadedModel,
    spec: ResponsesSpec,
    path: Path,
    progress: Progress,
    seed: int,
) -> list[Conversation]:
    """The conversations, in their order, with every response the teacher's own.

    Responses they had are replaced. One that reaches ``max_new_tokens`` has no end token and is
    not `Message.ended`. A conversation too long for the teacher is left out, with a note.

    path: the JSONL file; what it holds is kept, except a line or a batch that was cut short.
    Raises UserError when that was made by another teacher or with other settings.
    """
    _check_manifest(path.with_suffix(".manifest.json"), teacher, spec, seed)
    batches = _plan([c.questions() for c in conversations], teacher, spec)
    known = {answer.id: answer for answer in _read(path)}
    whole = [
        number
        for number, batch in enumerate(batches)
        if all(c.id in known and known[c.id].questions() == c for c in batch)
    ]
    answers = {c.id: known[c.id] for number in whole for c in batches[number]}
    _replace(path, json_lines(answers.values()))
    total = sum(map(len, batches))
    with progress.stage("the teacher answers", total, done=len(answers)) as stage:
        for number, batch in enumerate(batches):
            if number in whole:
                continue
            began = time.perf_counter()
            fresh, tokens = _answer(batch, teacher, spec, seed + 1_000_003 * number)
            _append(path, fresh)
            answers |= {answer.id: answer for answer in fresh}
            speed = tokens / (time.perf_counter() - began)
            stage.advance(len(batch), tokens_per_second=round(speed, 1))
    if len(answers) < len(conversations):
        progress.note(
            f"{len(conversations) - len(answers)} of {len(conversations)} conversations left out: "
            f"too long for {teacher.name} to answer"
        )
    return [answers[c.id] for c in conversations if c.id in answers]


def generate(
    prompts: Sequence[list[int]],
    loaded: LoadedModel,
    spec: ResponsesSpec,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, up to and with its first end token.

    All prompts at once; greedy at temperature 0, else drawn with the generator (on the model's
    device; torch's own if None) from the softmax at that temperature, uncut, whatever the model's
    own generation_config recommends.
    """
    return continue_prompts(
        prompts,
        [loaded.model],
        lambda logits: pick(logits[0], spec.temperature, generator),
        ends=end_ids(loaded),
        limits=[spec.max_new_tokens] * len(prompts),
    )


def end_ids(loaded: LoadedModel) -> list[int]:
    """The tokens that end a response: those of the model's generation_config and tokenizer."""
    config: Any = loaded.model.generation_config
    known = config.eos_token_id
    own = known if isinstance(known, list) else [known]
    return sorted({*own, loaded.tokenizer.eos_token_id} - {None})


def _plan(
    asked: Sequence[Conversation], teacher: LoadedModel, spec: ResponsesSpec
) -> list[list[Conversation]]:
    """Batches of prompts of like length; the longest first, so that memory fails early."""
    lengths = {c.id: len(prompt_ids(c, teacher.tokenizer)) for c in asked}
    fitting = [c for c in asked if lengths[c.id] <= room(teacher, spec)]
    order = sorted(fitting, key=lambda c: -lengths[c.id])
    size = spec.batch_size
    return [order[start : start + size] for start in range(0, len(order), size)]


def _answer(
    batch: Sequence[Conversation], teacher: LoadedModel, spec: ResponsesSpec, seed: int
) -> tuple[list[Conversation], int]:
    """The conversations answered turn by turn, and how many tokens that took."""
    done: list[Conversation] = []
    tokens = 0
    pending = list(batch)
    generator = torch.Generator(teacher.model.device).manual_seed(seed)
    while pending:
        prompts = [prompt_ids(c, teacher.tokenizer) for c in pending]
        generated = generate(prompts, teacher, spec, generator)
        tokens += sum(map(len, generated))
        answered = [
            c.answered(_message(ids, teacher)) for c, ids in zip(pending, generated, strict=True)
        ]
        done += [c for c in answered if not c.needs_response]
        pending = [
            c
            for c in answered
            if c.needs_response and len(prompt_ids(c, teacher.tokenizer)) <= room(teacher, spec)
        ]
    return done, tokens


def _message(ids: Sequence[int], teacher: LoadedModel) -> Message:
    text = teacher.tokenizer.decode(list(ids), skip_special_tokens=True)
    return Message("assistant", str(text), ended=ids[-1] in end_ids(teacher))


def room(teacher: LoadedModel, spec: ResponsesSpec) -> float:
    """The longest prompt that leaves room for a response."""
    config: Any = teacher.model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return float("inf") if context is None else context - spec.max_new_tokens


def _check_manifest(path: Path, teacher: LoadedModel, spec: ResponsesSpec, seed: int) -> None:
    asked = {
        "teacher": teacher.digest,
        "max_new_tokens": spec.max_new_tokens,
        "temperature": spec.temperature,
    } | ({"seed": seed} if spec.temperature else {})
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(asked, indent=2) + "\n")
        return
    made = json.loads(path.read_text())
    changed = [key for key in made | asked if made.get(key) != asked.get(key)]
    if changed:
        raise UserError(
            f"{path.parent} holds responses made with another {' and '.join(changed)}",
            "go back to those settings, or start again (--overwrite, or another folder)",
        )


def _read(path: Path) -> Iterator[Conversation]:
    """The conversations of whole lines."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                row = json.loads(line)
                messages = tuple(Message(**message) for message in row["messages"])
                yield Conversation(row["id"], messages, row.get("plain", False))


def json_lines(conversations: Iterable[Conversation]) -> str:
    """A line for each conversation, as the chat source reads them."""
    rows = [
        {
            "id": c.id,
            "messages": [
                {"role": m.role, "content": m.content} | ({} if m.ended else {"ended": False})
                for m in c.messages
            ],
        }
        | ({"plain": True} if c.plain else {})
        for c in conversations
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _append(path: Path, conversations: Iterable[Conversation]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json_lines(conversations))
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, text: str) -> None:
    """Write beside, then rename over."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
