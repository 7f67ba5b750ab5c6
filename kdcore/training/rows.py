"""The rows of a training job: read, answered if the spec says so, encoded and recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdcore.components.registry import Registry
from kdcore.data.conversation import Conversation
from kdcore.data.encoded.answered_lines import json_line
from kdcore.data.encoded.stream_windows import FirstExamples, stream_of
from kdcore.data.encoded.streamed_rows import StreamedRows
from kdcore.data.encoded.table import FORMAT
from kdcore.data.ranks import Ranks
from kdcore.data.responses.file import respond
from kdcore.data.responses.model import ModelAnswers
from kdcore.data.rows import (
    RowDataset,
    digest_of,
    encode_rows,
    note_cut_rows,
    refuse_long_rows,
    refuse_long_stream,
)
from kdcore.data.source import DataSource
from kdcore.errors import counted, in_field
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.folder import Run
from kdcore.runs.inputs import settle
from kdcore.runs.progress import Progress
from kdcore.specs.parts.training import source_field
from kdcore.specs.train_drafter import TrainedSpec
from kdcore.training.arguments import processes


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """The encoded rows of a source.

    Attributes:
        source: The source.
        encoded: The rows.
        generated: The generated conversations that replace the source's, or None.
    """

    source: DataSource
    encoded: RowDataset
    generated: Sequence[Conversation] | None

    def examples(self) -> Sequence[Any]:
        """The examples of the rows, and of those that were dropped."""
        return self.source.read() if self.generated is None else self.generated


def read_rows(
    source: DataSource,
    name: str,
    spec: TrainedSpec,
    models: Sequence[LoadedModel],
    run: Run,
    progress: Progress,
    registry: Registry,
    answerer: LoadedModel | None = None,
) -> TrainingRows:
    """Encode a source's examples; the teacher answers them if the spec says so.

    Args:
        source: The data source.
        name: The source's field in ``data``; auxiliary rows keep their responses.
        spec: The spec of the run.
        models: The models that will read the rows; the first one encodes them.
        run: The run, whose folder keeps the responses.
        progress: The display of stages and notes.
        registry: The registry of the engines that answer.
        answerer: The model that answers the examples (default: the first one).

    Returns:
        The encoded rows.

    Raises:
        UserError: A row cannot be answered, encoded, or read by a model.
    """
    if name == "train" and stream_of(source) is not None:
        return _streamed(source, spec, models, run, progress)
    generated, field = None, source_field(name)
    if spec.data.responses.by != "dataset" and name != "auxiliary":
        folder = spec.data.responses.folder or run.path("data")
        answering, asking = answerer or models[0], spec.data.responses
        answers = ModelAnswers(answering, asking, registry, progress.note, field, asking.by)
        ranks = Ranks(processes(spec))
        path = folder / f"{name}.jsonl"
        with in_field(field):
            asked = source.read()
        with in_field("data.responses"):
            generated = respond(asked, answers, path, progress, ranks, field).conversations
    length = spec.data.max_length
    with in_field(field):
        rows, summary = encode_rows(
            source,
            models[0].tokenizer,
            length,
            progress,
            generated=generated,
            workers=spec.data.workers,
            own=run.path("rows") / f"{name}-{FORMAT}",
        )
        note_cut_rows(summary, length, progress)
        refuse_long_rows(rows, models)
    return TrainingRows(source, RowDataset(rows), generated)


def _streamed(
    source: DataSource,
    spec: TrainedSpec,
    models: Sequence[LoadedModel],
    run: Run,
    progress: Progress,
) -> TrainingRows:
    """The rows of a stream, of which only the first ones are encoded now."""
    stream, first = stream_of(source), FirstExamples(source)
    assert stream is not None  # as `read_rows` says
    tokenizer, length, training = models[0].tokenizer, spec.data.max_length, spec.training
    assert training.steps is not None  # `kdcore.data.batching.streaming.refuse_stream`
    with in_field("data.max_length"):
        refuse_long_stream(length, models)
    with in_field("data.train"):
        number = len(first.read())
    progress.note(
        "data.train is a stream, which the training reads as it goes: what follows about the rows "
        f"describes the first {counted(number, 'row')}"
    )
    with in_field("data.train"):
        rows, summary = encode_rows(first, tokenizer, length, progress)
    note_cut_rows(summary, length, progress)
    of_step = training.batch_size * training.accumulation * processes(spec).num_processes
    streamed = StreamedRows(
        source,
        tokenizer,
        length,
        count=training.steps * of_step,
        window=stream.window,
        first=rows,
        folder=run.path("rows"),
        writes=run.writes,
    )
    return TrainingRows(first, RowDataset(streamed), None)


def settle_rows(
    run: Run, name: str, spec: TrainedSpec, rows: TrainingRows, first: LoadedModel
) -> None:
    """Record the digest of a run's rows, and keep generated responses in its folder.

    Args:
        run: The run.
        name: The source's field in ``data``.
        spec: The spec of the run.
        rows: The rows that `read_rows` returned.
        first: The model whose tokenizer encoded the rows.

    Raises:
        OtherInput: The rows changed since the run started; see `kdcore.runs.inputs.settle`.
    """
    said = spec.data.model_dump(mode="json", include={"max_length", "responses"})
    said.get("responses", {}).pop("folder", None)  # each machine may have one of its own
    asked = [spec.data.sources[name].dump(), said, first.digest]
    settle(run, f"the rows of data.{name}", asked, digest_of(rows.encoded.rows))
    if rows.generated is not None:  # a shared folder may hold other runs' rows as well
        run.write_text(f"data/{name}.jsonl", map(json_line, rows.generated))
