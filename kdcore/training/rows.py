"""The rows of a training job: read, answered if the spec says so, encoded and recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcore.data.ranks import Ranks
from kdcore.data.responses.file import json_lines, respond
from kdcore.data.responses.model import ModelAnswers
from kdcore.data.rows import RowDataset, encode_rows, note_cut_rows
from kdcore.data.store import rows_digest
from kdcore.method.protocols import DataSource
from kdcore.models.facts import refuse_long_rows
from kdcore.models.loaded import LoadedModel
from kdcore.runs.folder import Run
from kdcore.runs.inputs import settle
from kdcore.runs.progress import Progress
from kdcore.specs.train_drafter import TrainedSpec
from kdcore.training.arguments import processes


def read_rows(
    source: DataSource,
    name: str,
    spec: TrainedSpec,
    models: Sequence[LoadedModel],
    run: Run,
    progress: Progress,
    answerer: LoadedModel | None = None,
) -> tuple[RowDataset, Sequence[Any]]:
    """Read and encode a source's examples; the teacher answers them if the spec says so.

    Args:
        source: The data source.
        name: The source's field in ``data``.
        spec: The spec of the run.
        models: The models that will read the rows; the first one encodes them.
        run: The run, whose folder keeps the responses.
        progress: The display of stages and notes.
        answerer: The model that answers the examples (default: the first one).

    Returns:
        The encoded rows and their examples.

    Raises:
        UserError: A row cannot be answered, encoded, or read by a model.
    """
    examples = source.read()
    if spec.data.responses.by != "dataset":
        folder = spec.data.responses.folder or run.path("data")
        answers = ModelAnswers(answerer or models[0], spec.data.responses)
        ranks = Ranks(processes(spec))
        path = folder / f"{name}.jsonl"
        examples = respond(examples, answers, path, progress, ranks).conversations
    rows = encode_rows(source, examples, models[0].tokenizer, spec.data.max_length, progress)
    note_cut_rows(rows, spec.data.max_length, progress)
    refuse_long_rows(rows, models)
    return RowDataset(rows), examples


def settle_rows(
    run: Run,
    name: str,
    spec: TrainedSpec,
    rows: RowDataset,
    examples: Sequence[Any],
    first: LoadedModel,
) -> None:
    """Record the digest of a run's rows, and keep generated responses in its folder.

    Args:
        run: The run.
        name: The source's field in ``data``.
        spec: The spec of the run.
        rows: The rows that `read_rows` returned.
        examples: The examples that `read_rows` returned.
        first: The model whose tokenizer encoded the rows.

    Raises:
        OtherInput: The rows changed since the run started; see `kdcore.runs.inputs.settle`.
    """
    said = spec.data.model_dump(mode="json", include={"max_length", "responses"})
    asked = [spec.data.sources[name].dump(), said, first.digest]
    settle(run, f"the rows of data.{name}", asked, rows_digest(rows.rows))
    if spec.data.responses.by != "dataset":  # a shared folder may hold other runs' rows as well
        run.write_text(f"data/{name}.jsonl", json_lines(examples))
