"""The prompts of a benchmark: each turn of a row, after the target's own answers to those before.

The answers are those of greedy plain decoding, at every temperature and for every method, so that
all methods decode the same prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.model import generated_message
from kdcore.data.templates.mask import prompt_ids
from kdcore.decoding.baseline import DecodedBatch
from kdcore.errors import UserError, in_field
from kdcore.models.anatomy import context_of, short_length_of
from kdcore.models.facts import refuse_crossing
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.folder import Run
from kdcore.runs.progress import Progress
from kdcore.runs.record_files import RecordFile
from kdcore.specs.bench import BenchSpec

Decode = Callable[[Sequence[Sequence[int]], int], DecodedBatch]
"""Function from prompts and a seed to their answers."""
Turns = dict[str, list[list[list[int]]]]
"""Task set -> the prompts of each turn."""
ANSWERS = RecordFile("answers.json", list[list[int]])
"""The tokens of the answers that stand in prompts, in the order in which they are asked for."""


def read_questions(source: Any, name: str, spec: BenchSpec) -> list[Conversation]:
    """Read ``limit`` rows of a task set, spread evenly over it, without their responses.

    Args:
        source: The source of the set.
        name: Name of the set.
        spec: The bench spec.

    Returns:
        The rows.

    Raises:
        UserError: The set does not contain conversations.
    """
    examples = source.read()
    if not isinstance(examples[0], Conversation):
        raise UserError(
            f"sets.{name} does not contain conversations",
            "choose a source of conversations, e.g. chat",
        )
    rows = min(spec.limit, len(examples))
    return [examples[place * len(examples) // rows].questions() for place in range(rows)]


def encoded(
    asked: Sequence[Conversation], name: str, spec: BenchSpec, target: LoadedModel
) -> list[list[int]]:
    """Encode the prompt of the first missing answer of each row.

    Args:
        asked: Rows of a task set.
        name: Name of the set.
        spec: The bench spec.
        target: The target.

    Returns:
        The token ids of each prompt.

    Raises:
        UserError: A prompt leaves no room in the context for an answer.
    """
    context, short = context_of(target.model), short_length_of(target.model)
    prompts = []
    for row in asked:
        with in_field(f"sets.{name}"):
            ids = prompt_ids(row, target.tokenizer)
        turn = 1 + sum(message.role == "assistant" for message in row.messages)
        place = f"sets.{name}: {row.id}" + (f", turn {turn}," if turn > 1 else "")
        if context is not None and len(ids) + spec.max_new_tokens > context:
            raise UserError(
                f"{place} has {len(ids)} tokens; with {spec.max_new_tokens} new tokens it exceeds "
                f"the target's context of {context}",
                "lower max_new_tokens, or remove that prompt"
                + (", or set turns: 1" if turn > 1 else ""),
            )
        refuse_crossing(short, len(ids), spec.max_new_tokens, place)
        prompts.append(ids)
    return prompts


def prompt_count(asked: Sequence[Conversation], spec: BenchSpec) -> int:
    """The number of prompts of a task set, of all turns."""
    return sum(min(row.turns, spec.turns or row.turns) for row in asked)


def prompts_by_turn(
    run: Run,
    spec: BenchSpec,
    target: LoadedModel,
    questions: Mapping[str, Sequence[Conversation]],
    first: Mapping[str, list[list[int]]],
    plain: Callable[[], Decode],
    progress: Progress,
    *,
    begun: bool,
) -> Turns:
    """Encode the prompts of all turns.

    Args:
        run: The run, whose folder keeps the answers in prompts.
        spec: The bench spec.
        target: The target.
        questions: Task set -> its rows.
        first: Task set -> the prompts of their first turns; see `encoded`.
        plain: Function that builds greedy plain decoding of one prompt.
        progress: The display of stages.
        begun: Whether batches are measured already, so that the kept answers hold.

    Returns:
        The prompts.

    Raises:
        UserError: As for `encoded`.
    """
    missing = sum(prompt_count(rows, spec) - len(rows) for rows in questions.values())
    kept = run.read(ANSWERS) if begun else None
    if not missing or kept is not None:
        known = iter(kept or ())
        return _encoded_turns(spec, target, questions, first, lambda _: next(known))
    answers: list[list[int]] = []
    with progress.stage("answers before later turns", missing) as stage:
        decode = plain()

        def answer(prompt: list[int]) -> list[int]:
            answers.extend(decode([prompt], spec.seed).answers or ())
            stage.advance()
            return answers[-1]

        turns = _encoded_turns(spec, target, questions, first, answer)
    run.write(ANSWERS, answers)
    return turns


def _encoded_turns(
    spec: BenchSpec,
    target: LoadedModel,
    questions: Mapping[str, Sequence[Conversation]],
    first: Mapping[str, list[list[int]]],
    answer: Callable[[list[int]], list[int]],
) -> Turns:
    """Encode turn by turn; ``answer`` is called for each turn that another one follows."""
    turns: Turns = {}
    for name, asked in questions.items():
        of = turns[name] = [first[name]]
        while len(of) != spec.turns:
            asked = [
                row.answered(generated_message(answer(prompt), target))
                for row, prompt in zip(asked, of[-1], strict=True)
                if row.answered(Message("assistant", "")).needs_response
            ]
            if not asked:
                break
            of.append(encoded(asked, name, spec, target))
    return turns
