"""Encoding of a source's examples as rows: once, in parallel, into files that later runs find.

A folder of rows is named by a fingerprint of all that the rows depend on: the examples, the
tokenizer with its chat template, the maximum length, the date that the template prints, and the
versions of the code. A source that does not tell the fingerprint of its examples has its rows
encoded in every process, and kept in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset

from kdcore.data.conversation import Conversation
from kdcore.data.encoded.answered_lines import json_line
from kdcore.data.encoded.cache import MANIFEST, make_room, rows_folder
from kdcore.data.encoded.rows import EncodedRows, Some, Summary
from kdcore.data.encoded.table import FORMAT, digested, to_batch, wider
from kdcore.data.source import Compact, DataSource
from kdcore.data.templates.mask import MASK_RULE
from kdcore.data.templates.notes import NOTES_RULE
from kdcore.data.templates.rendering import prints_date
from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.models.loading.load import NoTokenizer
from kdcore.runs.facts import version_of
from kdcore.runs.progress import Progress
from kdcore.runs.today import today
from kdcore.runs.whole_files import whole

CHUNK = 1000
"""Examples that a process encodes at a time, unless their rows are large."""
_CHUNK_BYTES = 2**26
"""Bytes of the rows that a process encodes at a time; it holds several copies of them."""
_WORTH_A_PROCESS = 2000
"""Examples for which it pays to start another process."""
_VERSIONS = ("kdcore", "transformers", "tokenizers", "jinja2")


def encoded_rows(
    source: DataSource,
    tokenizer: Any,
    max_length: int,
    progress: Progress,
    *,
    generated: Sequence[Conversation] | None = None,
    workers: int | None = None,
    own: Path | None = None,
) -> tuple[Sequence[Row], Summary]:
    """Encode the examples of a source, or open their rows if they are encoded already.

    Args:
        source: The data source.
        tokenizer: The tokenizer, or the processor of an image model.
        max_length: Maximum number of positions of a row.
        progress: The display of the encoding.
        generated: Conversations in place of the source's examples.
        workers: Number of processes that encode (default: one for each CPU, if there is enough
            work for them).
        own: Folder for the rows of a stream, which no later run could find in the cache (default:
            they stay in memory).

    Returns:
        The rows with a learned token, in the order of the examples, and the summary of all.

    Raises:
        UserError: An example is invalid, the examples change meanwhile, or the cache cannot be
            written.
    """
    known = fingerprint(source, tokenizer, max_length, generated)
    work = _Work(source, tokenizer, max_length, generated)
    streams = own is not None and generated is None and hasattr(source, "fingerprint")
    if known is None and not streams:
        summary = Summary()
        rows = summary.kept(map(work.encode, work.examples()), max_length)
        summary.left_out = work.left_out()
        return rows, summary
    folder = own if known is None else rows_folder() / known
    assert folder is not None  # as it is a stream
    with suppress(FileNotFoundError, NotADirectoryError):
        found = EncodedRows(folder, work.compact)
        return found, found.summary
    with _held(folder):
        if not (folder / MANIFEST).exists():  # another process may have been faster
            with whole(folder) as place:
                place.mkdir()
                _write(place, work, workers, progress)
                if fingerprint(source, tokenizer, max_length, generated) != known:
                    raise UserError(
                        "the training data changed while its rows were encoded",
                        "start again when nothing writes to the data",
                    )
        found = EncodedRows(folder, work.compact)
    if known is not None:
        make_room(folder, progress.note)
    return found, found.summary


def fingerprint(
    source: DataSource,
    tokenizer: Any,
    max_length: int,
    generated: Sequence[Conversation] | None = None,
) -> str | None:
    """The name of the folder of a source's rows.

    Args:
        source: The data source.
        tokenizer: The tokenizer.
        max_length: Maximum number of positions of a row.
        generated: Conversations in place of the source's examples.

    Returns:
        32 hexadecimal digits; None if the source or the tokenizer cannot be identified.
    """
    identity = _identity(tokenizer)
    told: str | None = getattr(source, "fingerprint", lambda: None)()
    if identity is None or told is None:
        return None
    if generated is not None:
        digest = hashlib.sha256()
        for conversation in generated:
            digest.update(json_line(conversation).encode())
        told = digest.hexdigest()
    asked = {
        "format": FORMAT,
        "mask_rule": MASK_RULE,
        "notes_rule": NOTES_RULE,
        "versions": {name: version_of(name) for name in _VERSIONS},
        "source": f"{type(source).__module__}.{type(source).__qualname__}",
        "examples": told,
        "max_length": max_length,
    }
    text = json.dumps(asked | identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _identity(tokenizer: Any) -> dict[str, Any] | None:
    """What tells a tokenizer from others: all that a row may depend on; None if it is unknown."""
    if isinstance(tokenizer, NoTokenizer):  # no row depends on it
        return {}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules: str = backend.to_str()
    return {
        # what comes before the tokens is the state of the last call: truncation and padding
        "tokenizer": hashlib.sha256(rules[rules.find('"added_tokens"') :].encode()).hexdigest(),
        "class": type(tokenizer).__qualname__,
        "special_tokens": tokenizer.special_tokens_map,
        "settings": {
            name: value
            for name, value in sorted(tokenizer.init_kwargs.items())
            if isinstance(value, bool | int | str) and not re.search("name|path|file", name)
        },
        "template": tokenizer.chat_template,
        "date": str(today().date()) if prints_date(tokenizer) else None,
    }


@dataclass(frozen=True, slots=True)
class _Work:
    """What a process needs in order to encode examples."""

    source: DataSource
    tokenizer: Any
    max_length: int
    generated: Sequence[Conversation] | None

    def examples(self) -> Sequence[Any]:
        return self.source.read() if self.generated is None else self.generated

    def left_out(self) -> Some:
        """What the source left out of its data when it was read."""
        places = getattr(self.source, "left_out", ()) if self.generated is None else ()
        return Some(len(places), list(places[:3]))

    @property
    def compact(self) -> Compact | None:
        """The form in which the rows lie on disk."""
        found: Compact | None = getattr(self.source, "compact", None)
        return found

    def encode(self, example: Any) -> Row:
        return self.source.encode(example, self.tokenizer, self.max_length)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Encoded examples as a process returns them: a batch in Arrow's stream format, or nothing."""

    batch: bytes | None
    summary: Summary
    tokens: tuple[Any, Any]


class _Chunks(Dataset[_Chunk | UserError]):
    """Chunks of examples, encoded when a worker of a DataLoader asks for them."""

    def __init__(self, work: _Work, examples: Sequence[Any]) -> None:
        self.work, self.examples, self.size = work, examples, CHUNK
        if len(examples):
            first = sum(each.nbytes for each in work.encode(examples[0]).inputs.values())
            self.size = max(1, min(CHUNK, _CHUNK_BYTES // max(1, first)))

    def __len__(self) -> int:
        return -(-len(self.examples) // self.size)

    def __getitem__(self, number: int) -> _Chunk | UserError:
        examples = self.examples[number * self.size : (number + 1) * self.size]
        summary = Summary()
        try:
            rows = summary.kept(map(self.work.encode, examples), self.work.max_length)
            batch = _stream(to_batch(rows, self.work.compact)) if rows else None
            return _Chunk(batch, summary, _tokens(rows))
        except UserError as wrong:  # a DataLoader could not raise it in the main process
            return wrong


def _write(folder: Path, work: _Work, workers: int | None, progress: Progress) -> None:
    """Encode all examples into the files of a folder."""
    examples = work.examples()
    writer, summary = _Writer(folder), Summary()
    summary.left_out = work.left_out()
    counts: dict[int, int] = {}
    with progress.stage("encode the rows", len(examples)) as stage, writer:
        for chunk in _encoded(_Chunks(work, examples), workers):
            if isinstance(chunk, UserError):
                raise chunk
            if chunk.batch is not None:
                writer.add(pa.ipc.open_stream(chunk.batch).read_next_batch())
            for token, count in zip(*chunk.tokens, strict=True):
                counts[token] = counts.get(token, 0) + count
            summary.merge(chunk.summary)
            stage.advance(chunk.summary.examples)
    manifest = {
        "batches": writer.batches,
        "digest": writer.digest.hexdigest(),
        "summary": summary.plain(),
    }
    np.save(folder / "tokens.npy", np.array(sorted(counts.items()), np.int64).reshape(-1, 2).T)
    np.save(folder / "lengths.npy", np.concatenate([np.empty(0, np.int32), *writer.lengths]))
    np.save(
        folder / "contents.npy", np.sort(np.concatenate([np.empty(0, np.uint64), *writer.contents]))
    )
    (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")


class _Writer:
    """Writes record batches to files, a new one when a number does not fit into its columns."""

    def __init__(self, folder: Path) -> None:
        self.batches: list[int] = []
        self.lengths: list[Any] = []
        self.contents: list[Any] = []
        self.digest = hashlib.sha256()
        self._folder, self._number = folder, 0
        self._schema: pa.Schema | None = None
        self._file: Any = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, batch: pa.RecordBatch) -> None:
        """Append a batch."""
        schema = batch.schema if self._schema is None else wider(self._schema, batch.schema)
        if schema is None:
            raise UserError(
                f"the row {batch.column('id')[0]} has other inputs, or inputs of other dtypes, "
                "than the rows before it",
                "fix the data source: all of its rows need the same inputs",
            )
        if schema != self._schema:
            self.__exit__()
            path = self._folder / f"rows-{self._number:05d}.arrow"
            self._file, self._schema = pa.ipc.new_file(path, schema), schema
            self._number += 1
        self._file.write_batch(batch.cast(schema))
        self.batches.append(len(batch))
        text = "input input_ids"
        column = batch.column(text if text in batch.schema.names else "labels")
        self.lengths.append(np.diff(column.offsets.to_numpy()))
        self.contents.append(batch.column("content").to_numpy().copy())  # not the batch's memory
        for each in digested(batch):
            self.digest.update(each)


def _encoded(chunks: _Chunks, workers: int | None) -> Iterable[Any]:
    """Yield the chunks in order."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    number = min(cpus if workers is None else workers, len(chunks.examples) // _WORTH_A_PROCESS)
    loader: DataLoader[Any] = DataLoader(
        chunks,
        batch_size=None,
        num_workers=number if number > 1 else 0,
        collate_fn=_same,
        # A new interpreter would run an unguarded script of the user again.
        multiprocessing_context="fork" if number > 1 else None,
        generator=torch.Generator(),  # the workers' seeds are drawn from it, and not from the run's
    )
    return loader


def _same(chunk: Any) -> Any:
    return chunk


def _stream(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    found: bytes = sink.getvalue().to_pybytes()
    return found


def _tokens(rows: Sequence[Row]) -> tuple[list[int], list[int]]:
    """The learned labels that are whole numbers, and how often each occurs."""
    learned = [row.labels[row.mask] for row in rows if row.labels.dtype == torch.int64]
    if not learned:
        return [], []
    labels, counts = torch.unique(torch.cat(learned), return_counts=True)
    return labels.tolist(), counts.tolist()


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock a folder, waiting for another process that writes it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            yield
    except OSError as fault:
        raise UserError(
            f"cannot write encoded rows to {folder.parent}: {fault.strerror or fault}",
            "free space there, or set the environment variable KDCORE_CACHE to another folder",
        ) from fault
