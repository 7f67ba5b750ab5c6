"""What a model answers to prompts, for people to read and for metrics to judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcore.data.conversation import Conversation
from kdcore.data.responses.model import generate, room
from kdcore.data.template_mask import prompt_ids
from kdcore.errors import UserError
from kdcore.evaluation.scores import SCORES, final_number
from kdcore.models.loaded import LoadedModel
from kdcore.runs.progress import Progress
from kdcore.specs.training import EvaluationSpec, GenerationSpec


def answers(
    prompts: Sequence[Conversation],
    loaded: LoadedModel,
    progress: Progress,
    title: str,
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """The greedy answer to each prompt: to the first response it lacks, or else to its last.

    A prompt that leaves no room in the model's context is answered with nothing, with a note.
    title: names the work to whoever watches. batch_size: prompts at once.
    Raises UserError when the tokenizer has no chat template, or one that refuses a prompt.
    """
    model: Any = loaded.model
    tokenizer: Any = loaded.tokenizer
    spec = GenerationSpec.model_validate({"max_new_tokens": max_new_tokens})
    asked = [prompt_ids(conversation, tokenizer) for conversation in prompts]
    fits = [len(ids) <= room(loaded, spec) for ids in asked]
    if not all(fits):
        progress.note(
            f"{fits.count(False)} of {len(fits)} prompts are answered with nothing: they leave "
            f"{loaded.name} no room for {max_new_tokens} tokens"
        )
    # those of like length together, for padding costs
    order = sorted((n for n, fit in enumerate(fits) if fit), key=lambda n: -len(asked[n]))
    found = [""] * len(prompts)
    training = model.training
    model.eval()
    with progress.stage(title, len(order)) as stage:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            made = generate([asked[place] for place in places], loaded, spec)
            for place, ids in zip(places, made, strict=True):
                found[place] = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
            stage.advance(len(places))
    model.train(training)
    return found


def question(prompt: Conversation) -> str:
    """What the last answer is to."""
    return prompt.messages[-2 if not prompt.needs_response else -1].content


def judged(
    examples: Sequence[Any], loaded: LoadedModel, spec: EvaluationSpec, progress: Progress
) -> dict[str, list[float]]:
    """The figures that ``spec.answers`` names, of the answer to each example.

    examples: as `references` takes them. Returns figure -> its value for each example, in order.
    """
    if not spec.answers:
        return {}
    right = references(examples, spec)
    size, tokens = spec.batch_size, spec.answer_tokens
    title = "answers to judge"
    said = answers(examples, loaded, progress, title, batch_size=size, max_new_tokens=tokens)
    return {name: list(map(SCORES[name], said, right)) for name in spec.answers}


def references(examples: Sequence[Any], spec: EvaluationSpec) -> list[str]:
    """What each answer is compared with: the example's last response.

    Raises UserError for examples that are no conversations, that lack their response, or, for
    exact_match, whose response has no number.
    """
    found = []
    for example in examples:
        if not isinstance(example, Conversation):
            raise UserError(
                f"evaluation.answers judges what language models write, and {example.id} is no "
                "conversation",
                "remove it; a classifier is judged by its accuracy, which is measured anyway",
            )
        last = example.messages[-1]
        if example.needs_response or last.role != "assistant":
            raise UserError(
                f"evaluation.answers has nothing to compare with: {example.id} has no response",
                "give each held-out row the response that is right, or remove evaluation.answers",
            )
        if "exact_match" in spec.answers and final_number(last.content) is None:
            raise UserError(
                f"evaluation.answers: the response of {example.id} has no number to be matched",
                "remove exact_match, or give rows that end in a number, as GSM8K's do",
            )
        found.append(last.content)
    return found
