"""What the rows of a source are like, estimated from a sample of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdcore.data.batching.grouping import LengthGroups
from kdcore.data.batching.packing import packed
from kdcore.data.conversation import Conversation, Message
from kdcore.data.encoded.stream_windows import FirstExamples, stream_of
from kdcore.data.responses.file import questions_of
from kdcore.data.rows import padding_share, refuse_long_stream
from kdcore.data.source import DataSource
from kdcore.errors import UserError, counted, in_field
from kdcore.method.records import Row
from kdcore.models.facts import Context, positions_of, refuse_longer, token_texts
from kdcore.models.loading.loaded import LoadedModel
from kdcore.specs.parts.training import source_field
from kdcore.specs.train_drafter import TrainedSpec

SAMPLE = 256
"""Maximum number of rows that are encoded per source; they stand for the others."""

DRAWN = 4096
"""Number of rows whose batches are made to estimate the padding."""

_UNCUT = 2**31 - 1

STAND_IN = Message("assistant", "(the teacher's response)")
"""Placeholder for a response that is not generated yet."""


@dataclass(frozen=True, slots=True)
class Padding:
    """The share of the positions of a batch that is padding, estimated from a sample of rows.

    Attributes:
        plain: The share in batches of rows in random order.
        grouped: The same with ``training.group_by_length``.
        packed: The same with ``training.packing``.
        rows: Number of rows of a packed sequence.
    """

    plain: float
    grouped: float
    packed: float
    rows: float

    @classmethod
    def of(cls, sizes: Sequence[int], count: int, batch: int, capacity: int) -> Padding:
        """Make the batches of rows as long as those of a sample.

        Args:
            sizes: Number of positions of each row of the sample.
            count: Number of rows that the sample stands for.
            batch: Number of rows, or of packed sequences, of a batch.
            capacity: Maximum number of positions of a sequence.

        Returns:
            The shares.
        """
        drawn = np.random.default_rng(0)
        lengths = np.asarray(sizes, np.int32)
        if count > len(lengths):
            lengths = drawn.choice(lengths, min(count, DRAWN))
        lengths = drawn.permutation(lengths)
        grouped = lengths[[*LengthGroups(lengths, batch, seed=0)]]
        packs = packed(lengths, capacity)
        sequences = drawn.permutation([lengths[pack].sum() for pack in packs])
        plain, alike, together = (
            padding_share([each[i : i + batch] for i in range(0, len(each), batch)])
            for each in (lengths, grouped, sequences)
        )
        return cls(plain, alike, together, len(lengths) / len(packs))


@dataclass(frozen=True, slots=True)
class DataFacts:
    """Statistics of a source's rows, estimated from a sample.

    Attributes:
        rows: Number of rows.
        sampled: Number of rows that were encoded.
        tokens: Mean number of positions of a row after truncation.
        learned: Mean number of learned positions of a row after truncation.
        longest: Maximum number of positions of a row.
        cut: Share of rows that are longer than ``data.max_length``.
        empty: Share of rows without a learned token; training skips them.
        generated: Number of responses that the teacher must still generate; each counts with its
            maximum length.
        padding: Share of the positions of a batch that is padding.
        notes: Note about rows of the sample -> the id of the first such row.
        streamed: Whether these are the first rows of a stream, whose number is not known.
    """

    rows: int
    sampled: int
    tokens: float
    learned: float
    longest: int
    cut: float
    empty: float
    generated: int
    padding: Padding
    notes: Mapping[str, str] = field(default_factory=dict)
    streamed: bool = False


def sampled(sources: Mapping[str, DataSource]) -> dict[str, DataSource]:
    """Sources that a check can read: of a stream that training reads, the first examples.

    Args:
        sources: Field of ``data`` -> data source.

    Returns:
        The same fields.
    """
    train = sources.get("train")
    streams = train is not None and stream_of(train) is not None
    return {**sources, "train": FirstExamples(train)} if train and streams else dict(sources)


def data_facts(
    source: DataSource, name: str, spec: TrainedSpec, models: Sequence[LoadedModel]
) -> DataFacts:
    """Estimate a source's statistics from evenly spread rows and from its longest one.

    Args:
        source: The data source.
        name: The source's field in ``data``.
        spec: The spec.
        models: The models that read the rows; the first one's tokenizer encodes them.

    Returns:
        The statistics.

    Raises:
        UserError: The source is empty, has no learned positions, or has a row that is too long
            for a model.
    """
    with in_field(source_field(name)):
        return _facts(source, name, spec, models)


def _facts(
    source: DataSource, name: str, spec: TrainedSpec, models: Sequence[LoadedModel]
) -> DataFacts:
    """See `data_facts`."""
    examples, limit = source.read(), spec.data.max_length
    tokenizer, contexts = models[0].tokenizer, [Context.of(model) for model in models]
    if not len(examples):
        raise UserError(f"data.{name} is empty", "choose a source with at least one row")
    if isinstance(source, FirstExamples):
        with in_field("data.max_length"):
            refuse_long_stream(limit, models)
    places = range(0, len(examples), -(-len(examples) // SAMPLE))
    notes: dict[str, str] = {}
    if left_out := getattr(source, "left_out", ()):
        rows = counted(len(left_out), "row")
        notes[f"kdcore leaves out {rows} without a response or a label"] = left_out[0]
    sizes_of_rows = [
        _sizes_of(source, examples[place], spec, tokenizer, contexts, notes) for place in places
    ]
    longest = max(range(len(examples)), key=lambda place: _characters(examples[place]))
    most = _sizes_of(source, examples[longest], spec, tokenizer, contexts, notes)
    sizes, learned, awaited = zip(*sizes_of_rows, strict=True)
    count = len(places)
    if not any(learned) and count == len(examples):
        raise UserError(
            f"none of the {count} rows of data.{name} has a token to learn within {limit} tokens",
            "raise data.max_length, or use rows with responses that the chat template prints",
        )
    kept = [min(size, limit) for size, teaches in zip(sizes, learned, strict=True) if teaches]
    return DataFacts(
        rows=len(examples),
        sampled=count,
        tokens=sum(min(size, limit) for size in sizes) / count,
        learned=sum(learned) / count,
        longest=min(max(*sizes, most[0]), limit),
        cut=sum(size > limit for size in sizes) / count,
        empty=sum(not teaches for teaches in learned) / count,
        generated=round(sum(awaited) * len(examples) / count),
        padding=Padding.of(
            kept or [1], round(len(examples) * len(kept) / count), spec.training.batch_size, limit
        ),
        notes=notes,
        streamed=isinstance(source, FirstExamples),
    )


def _sizes_of(
    source: DataSource,
    example: Any,
    spec: TrainedSpec,
    tokenizer: Any,
    contexts: Sequence[Context],
    notes: dict[str, str],
) -> tuple[int, int, int]:
    """An example's positions before truncation, learned positions after it, and missing responses.

    The notes about its row are added to ``notes``.

    Raises UserError when the truncated row is too long for a model.
    """
    limit = spec.data.max_length
    example, answers = _with_stand_ins(example, spec)
    row = source.encode(example, tokenizer, _UNCUT)
    for note in row.notes:
        notes.setdefault(note, row.id)
    size, teaches = positions_of(row), int(row.mask[:limit].sum())
    readers = contexts
    if answers:  # at their maximum length; the first model skips a row that it cannot answer
        longer = answers * spec.data.responses.max_new_tokens - int(row.mask.sum())
        size, teaches = size + longer, int(row.mask.sum()) + longer
        teaches = max(0, teaches - max(0, size - limit))
        fits = size <= (contexts[0].length or size)
        readers = contexts[1:] if fits else ()
    if teaches:  # otherwise training skips the row
        refuse_longer(row.id, min(size, limit), readers)
    return size, teaches, answers


def _characters(example: Any) -> int:
    """The number of characters of a conversation; 0 for other examples."""
    messages = example.messages if isinstance(example, Conversation) else ()
    return sum(len(message.content) for message in messages)


def _with_stand_ins(example: Any, spec: TrainedSpec) -> tuple[Any, int]:
    """An example with placeholders for missing responses, and the number of placeholders."""
    if spec.data.responses.by == "dataset" or not isinstance(example, Conversation):
        return example, 0
    answers, conversation = 0, questions_of(example)
    while conversation.needs_response:
        answers, conversation = answers + 1, conversation.answered(STAND_IN)
    return conversation, answers


def example_row(
    source: DataSource, spec: TrainedSpec, tokenizer: Any
) -> tuple[tuple[str, bool], ...]:
    """Decode the tokens of the first row as the model reads them.

    Args:
        source: The data source.
        spec: The spec.
        tokenizer: The tokenizer that encodes the rows.

    Returns:
        Each token with whether it is learned; empty for rows that do not predict tokens.
    """
    row = first_row(source, spec, tokenizer)
    if len(row.labels) != len(row.inputs.get("input_ids", ())):
        return ()
    ids = [int(row.inputs["input_ids"][0]), *row.labels.tolist()]
    return tuple(zip(token_texts(tokenizer, ids), [False, *row.mask.tolist()], strict=True))


def first_row(source: DataSource, spec: TrainedSpec, tokenizer: Any) -> Row:
    """Encode the first example of a source.

    Args:
        source: The data source.
        spec: The spec.
        tokenizer: The tokenizer that encodes the rows.

    Returns:
        Its row, with a placeholder for a missing response.
    """
    example, _ = _with_stand_ins(source.read()[0], spec)
    return source.encode(example, tokenizer, spec.data.max_length)
