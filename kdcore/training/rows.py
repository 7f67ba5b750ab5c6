"""The rows of a job that trains: read, answered where the spec says so, encoded, recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcore.data.responses.file import json_lines, respond
from kdcore.data.responses.model import ModelAnswers
from kdcore.data.rows import RowDataset, encode_rows
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
) -> tuple[RowDataset, Sequence[Any]]:
    """A source's examples, answered by the teacher if the spec says so, and their rows.

    models: all that will read the rows; the first one answers, and its tokenizer makes them.
    Raises UserError for what is wrong with them.
    """
    examples = source.read()
    if spec.data.responses.by != "dataset":
        folder = spec.data.responses.folder or run.path("data")
        with processes(spec).main_process_first():
            answerer = ModelAnswers(models[0], spec.data.responses)
            examples = respond(examples, answerer, folder / f"{name}.jsonl", progress).conversations
    rows = encode_rows(source, examples, models[0].tokenizer, spec.data.max_length, progress)
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
    """Record what a run's rows are, and keep their generated responses in its folder.

    rows, examples: as `read_rows` gave them. first: the model whose tokenizer made the rows.
    Raises OtherInput as `kdcore.runs.inputs.settle` does.
    """
    said = spec.data.model_dump(mode="json", include={"max_length", "responses"})
    asked = [spec.data.sources[name].dump(), said, first.digest]
    settle(run, f"the rows of data.{name}", asked, rows_digest(rows.rows))
    if spec.data.responses.by != "dataset":  # a shared folder may have others' too
        run.write_text(f"data/{name}.jsonl", json_lines(examples))
