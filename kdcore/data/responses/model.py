"""Answers of a local model, generated in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from kdcore.components.choice import Choice
from kdcore.components.registry import Registry, installed
from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.continuation import continue_prompts, pick
from kdcore.data.responses.file import Numbered
from kdcore.data.templates.mask import digest_of, prompt_ids
from kdcore.decoding.build import bound_engine
from kdcore.decoding.engines.protocols import Engine
from kdcore.errors import in_field
from kdcore.models.anatomy import context_of, short_length_of
from kdcore.models.device import process_device
from kdcore.models.facts import end_ids
from kdcore.models.loading.loaded import LoadedModel
from kdcore.specs.parts.training import GenerationSpec

WIDEST = 2
"""Factor of the limit WIDEST * (n + SHORT) to which a prompt of n tokens may be padded. A much
longer prompt would make the whole batch that long, so it starts a new batch."""
SHORT = 64
"""Number of tokens added to n in that limit, so that short prompts share a batch."""
ENOUGH = 10_000
"""Number of tokens below which the machine's default engine is not built: converting a model takes
about as long as the engine then saves."""


class ModelAnswers:
    """A `kdcore.data.responses.file.Answerer` that runs a model on the device of this process.

    Args:
        model: The model.
        spec: Its generation settings.
        registry: The registry of the engines (default: what is installed).
        note: A function that shows a line, such as the reason why the default engine is not used.
        field: The field of the conversations in the spec, for mistakes that show in a later turn.
        by: The field of the model in the spec, for mistakes of its passes.
    """

    def __init__(
        self,
        model: LoadedModel,
        spec: GenerationSpec,
        registry: Registry | None = None,
        note: Callable[[str], None] | None = None,
        field: str = "",
        by: str = "teacher",
    ) -> None:
        self._field, self._by = field, by
        self.name = model.name
        self.why_not = f"they are too long for the context of {model.name}"
        self.settings: Mapping[str, Any] = {"teacher": model.digest} | spec.deciding
        self._model, self._spec = model, spec
        self._registry, self._note = registry or installed(), note
        self._engine: Engine | None = None

    def plan(self, asked: Sequence[Conversation]) -> list[list[Conversation]]:
        """Batches with equal numbers of turns and prompts of similar length, the longest first.

        So a lack of memory shows early, and a few long conversations do not hold up a batch.

        Args:
            asked: Conversations without responses.

        Returns:
            Batches of the conversations that fit the context.
        """
        sizes = {c.id: (c.turns, len(self._prompt(c))) for c in asked}
        longest = room(self._model, self._spec)
        fitting = [c for c in asked if sizes[c.id][1] <= longest]
        batches: list[list[Conversation]] = []
        padded = 0, 0
        for c in sorted(fitting, key=lambda c: sizes[c.id], reverse=True):
            turns, length = sizes[c.id]
            alike = padded[0] == turns and padded[1] <= WIDEST * (length + SHORT)
            if alike and len(batches[-1]) < self._spec.batch_size:
                batches[-1].append(c)
            else:
                batches.append([c])
                padded = turns, length
        return batches

    def answers(self, batches: Sequence[Numbered]) -> Iterator[tuple[list[Conversation], int]]:
        """Answer the batches in order, each with its own seed.

        Args:
            batches: Numbered batches of the plan.

        Yields:
            The answered conversations of a batch, and the number of generated tokens.
        """
        self.begin(self.most_tokens(batches))
        for numbered in batches:
            yield self.answer(numbered)

    def most_tokens(self, batches: Sequence[Numbered]) -> int:
        """The maximum number of tokens of the answers to batches."""
        return self._spec.max_new_tokens * sum(c.turns for _, batch in batches for c in batch)

    def begin(self, tokens: int) -> None:
        """Move the model to the device, and build the engine.

        Args:
            tokens: Maximum number of tokens that will be generated.
        """
        self._model.to(process_device())
        engine = self._spec.engine
        self._engine = engine_for(self._model, engine, tokens, self._registry, self._note)

    def answer(self, numbered: Numbered) -> tuple[list[Conversation], int]:
        """Answer a batch, after `begin`.

        Args:
            numbered: A numbered batch of the plan, whose number gives the seed.

        Returns:
            The answered conversations, and the number of generated tokens.
        """
        number, batch = numbered
        return self._answer(batch, self._spec.seed + 1_000_003 * number)

    def _answer(self, batch: Sequence[Conversation], seed: int) -> tuple[list[Conversation], int]:
        """The conversations, answered turn by turn, and the number of generated tokens."""
        done: list[Conversation] = []
        tokens = 0
        pending = list(batch)
        generator = torch.Generator(self._model.model.device).manual_seed(seed)
        while pending:
            prompts = [self._prompt(c) for c in pending]
            with in_field(self._by):
                generated = generate(prompts, self._model, self._spec, generator, self._engine)
            tokens += sum(map(len, generated))
            own = digest_of(self._model.tokenizer)
            answered = [
                c.answered(generated_message(ids, self._model), own)
                for c, ids in zip(pending, generated, strict=True)
            ]
            done += [c for c in answered if not c.needs_response]
            pending = [c for c in answered if c.needs_response and self._fits(c)]
        return done, tokens

    def _prompt(self, conversation: Conversation) -> list[int]:
        with in_field(self._field):
            return prompt_ids(conversation, self._model.tokenizer)

    def _fits(self, conversation: Conversation) -> bool:
        return len(self._prompt(conversation)) <= room(self._model, self._spec)


def generated_message(tokens: Sequence[int], model: LoadedModel) -> Message:
    """The assistant turn that generated tokens form.

    Its text keeps the special tokens inside, such as the marks of a channel, which have a meaning.

    Args:
        tokens: The generated token ids, up to and including the end token if there is one.
        model: The model that generated them.

    Returns:
        The message with its text and its tokens.
    """
    tokenizer: Any = model.tokenizer
    ended = bool(tokens) and tokens[-1] in end_ids(model)
    text = tokenizer.decode(list(tokens[:-1] if ended else tokens), skip_special_tokens=False)
    return Message("assistant", str(text), ended, tokens=tuple(tokens))


def generate(
    prompts: Sequence[list[int]],
    loaded: LoadedModel,
    spec: GenerationSpec,
    generator: torch.Generator | None = None,
    engine: Engine | None = None,
) -> list[list[int]]:
    """Generate a response to each prompt, in one batch.

    Decoding is greedy at temperature 0. Otherwise tokens are sampled from the full softmax at that
    temperature; the sampling settings of the model's generation_config are ignored.

    Args:
        prompts: Token ids of the prompts.
        loaded: The model.
        spec: The generation settings.
        generator: Generator on the model's device (default: torch's own).
        engine: An engine that is bound to the model without layers (default: the model itself).

    Returns:
        The new tokens of each prompt, up to and including the first end token.
    """
    return continue_prompts(
        prompts,
        [loaded.model],
        lambda logits: pick(logits[0], spec.temperature, generator),
        ends=end_ids(loaded),
        limits=[spec.max_new_tokens] * len(prompts),
        engine=engine,
    )


def engine_for(
    model: LoadedModel,
    choice: Choice | None,
    tokens: int,
    registry: Registry,
    note: Callable[[str], None] | None = None,
) -> Engine | None:
    """Build the engine that answers prompts; it has the weights that the model has now.

    Args:
        model: The model, on its device.
        choice: The engine, or None for the machine's default where it pays.
        tokens: Maximum number of tokens that it will generate.
        registry: The registry of the engines.
        note: A function that shows a line, such as the reason why the default engine is not used.

    Returns:
        The engine, bound to the model; None for the model itself.

    Raises:
        UserError: The chosen engine cannot run the model.
    """
    if choice is None and (tokens < ENOUGH or short_length_of(model.model) is not None):
        return None
    return bound_engine(model, (), choice, registry, note)


def room(loaded: LoadedModel, spec: GenerationSpec) -> float:
    """The maximum length of a prompt in tokens; infinite for a model without a limit."""
    context = context_of(loaded.model)
    return float("inf") if context is None else context - spec.max_new_tokens
