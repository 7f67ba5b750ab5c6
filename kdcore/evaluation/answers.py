"""A model's answers to prompts, as samples and for scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcore.data.conversation import Conversation
from kdcore.data.ranks import ALONE, Ranks
from kdcore.data.responses.model import generate, room
from kdcore.data.templates.mask import prompt_ids
from kdcore.data.templates.thoughts import answer_of, thoughts_of
from kdcore.decoding.engines.protocols import Engine
from kdcore.evaluation.scores import Scores, trimmed
from kdcore.models.facts import end_ids
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.progress import Progress
from kdcore.specs.parts.training import EvaluationSpec, GenerationSpec


def answers(
    prompts: Sequence[Conversation],
    loaded: LoadedModel,
    progress: Progress,
    title: str,
    *,
    batch_size: int,
    max_new_tokens: int,
    engine: Engine | None = None,
    ranks: Ranks = ALONE,
) -> list[str]:
    """Answer each prompt greedily: its first missing response, or else its last response.

    A prompt that leaves no room in the model's context gets an empty answer, with a note.

    Args:
        prompts: The conversations.
        loaded: The model.
        progress: The display of the stage and the note.
        title: The name of the stage.
        batch_size: Prompts per batch.
        max_new_tokens: Maximum number of tokens per answer.
        engine: An engine that is bound to the model without layers (default: the model itself).
        ranks: The processes that share the prompts, each of which has the whole model and calls
            this with the same arguments.

    Returns:
        The answers with their thoughts, in order, in every process.

    Raises:
        UserError: The tokenizer lacks a chat template, or its template rejects a prompt.
    """
    size = batch_size, max_new_tokens
    tokenizer: Any = loaded.tokenizer
    return [
        trimmed(str(tokenizer.decode(ids, skip_special_tokens=True)))
        for ids in _generated(prompts, loaded, progress, title, size, engine, ranks)
    ]


def _generated(
    prompts: Sequence[Conversation],
    loaded: LoadedModel,
    progress: Progress,
    title: str,
    size: tuple[int, int],
    engine: Engine | None,
    ranks: Ranks,
) -> list[Sequence[int]]:
    """The tokens of the answers, see `answers`. ``size``: prompts per batch, and new tokens."""
    batch_size, max_new_tokens = size
    model: Any = loaded.model
    spec = GenerationSpec.model_validate({"max_new_tokens": max_new_tokens})
    asked = [prompt_ids(conversation, loaded.tokenizer) for conversation in prompts]
    fits = [len(ids) <= room(loaded, spec) for ids in asked]
    if not all(fits):
        progress.note(
            f"{fits.count(False)} of {len(fits)} prompts get an empty answer: with "
            f"{max_new_tokens} new tokens they exceed the context of {loaded.name}"
        )
    # Prompts of similar length share a batch, because padding costs time.
    order = sorted((n for n, fit in enumerate(fits) if fit), key=lambda n: -len(asked[n]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own = ranks.share(batches)
    found: list[tuple[int, Sequence[int]]] = []
    training = model.training
    model.eval()
    with progress.stage(title, sum(map(len, own))) as stage:
        for places in own:
            made = generate([asked[place] for place in places], loaded, spec, engine=engine)
            found += zip(places, made, strict=True)
            stage.advance(len(places))
    model.train(training)
    by_place = dict(ranks.gathered(found))
    return [by_place.get(place, ()) for place in range(len(prompts))]


def question(prompt: Conversation) -> str:
    """Return the text of the message that the last answer replies to."""
    return prompt.messages[-2 if not prompt.needs_response else -1].content


def judged(
    scores: Scores,
    loaded: LoadedModel,
    spec: EvaluationSpec,
    progress: Progress,
    engine: Engine | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, list[float]]:
    """Answer the prompts of scores, and score the answers without their thoughts.

    Args:
        scores: The scores with their prompts.
        loaded: The model.
        spec: The lengths of the answers and the batches.
        progress: The display of stages and notes.
        engine: An engine that is bound to the model without layers (default: the model itself).
        ranks: The processes that share the examples; see `answers`.

    Returns:
        Score -> its value for each example, in order; empty without scores.
    """
    if not scores.of:
        return {}
    size = spec.batch_size, spec.answer_tokens
    tokenizer = loaded.tokenizer
    made = _generated(scores.prompts, loaded, progress, "answers to score", size, engine, ranks)
    ends = end_ids(loaded)
    said = [
        answer_of(ids, thoughts_of(prompt, tokenizer), tokenizer, ends)
        for prompt, ids in zip(scores.prompts, made, strict=True)
    ]
    thoughts = [thought for _, thought in said if thought is not False]
    if thoughts:
        cut = thoughts.count(None)
        progress.note(
            f"{len(thoughts)} of {len(said)} answers have a thought, and the scores read what "
            "follows it" + (f"; {cut} end within it and count as empty" if cut else "")
        )
    return scores([text for text, _ in said], progress)
