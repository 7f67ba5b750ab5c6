"""Encoding of examples as rows, and collation of rows into padded batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from kdcore.data.conversation import Conversation
from kdcore.data.encoded.encode import encoded_rows
from kdcore.data.encoded.rows import EncodedRows, Summary
from kdcore.data.encoded.streamed_rows import StreamedRows
from kdcore.data.source import DataSource
from kdcore.data.store import RowKeys, content_key, row_key, rows_digest
from kdcore.errors import UserError, counted
from kdcore.method.records import Batch, Row
from kdcore.models.device import sent
from kdcore.models.facts import Context, positions_of, refuse_longer
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.progress import Progress


class RowDataset(Dataset[tuple[int, Row]]):
    """Rows with their indices, which batches carry as ``index``."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Row]:
        return index, self.rows[index]


def note_shared_rows(
    train: RowDataset, heldout: RowDataset, progress: Progress, how: str = "trained on"
) -> None:
    """Note held-out rows that are also used for training or selection, which biases the results.

    Args:
        train: Rows for training or selection.
        heldout: Held-out rows.
        progress: Receiver of the note.
        how: Use of ``train`` in the note.
    """
    trained = content_keys(train.rows)
    shared = [row.id for row in heldout.rows if _contains(trained, content_key(row))]
    if shared:
        progress.note(
            f"{len(shared)} of {len(heldout.rows)} held-out rows are also {how}, which biases the "
            f"results upwards: {', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}"
        )


def digest_of(rows: Sequence[Row]) -> str:
    """The `kdcore.data.store.rows_digest` of rows; of a stream, that of its first rows."""
    rows = _known(rows)
    return rows.digest if isinstance(rows, EncodedRows) else rows_digest(rows)


def row_keys(rows: Sequence[Row]) -> RowKeys:
    """The `kdcore.data.store.row_key` of each row."""
    return rows.keys() if isinstance(rows, EncodedRows) else RowKeys.of(map(row_key, rows))


def content_keys(rows: Sequence[Row]) -> NDArray[np.uint64]:
    """The keys of the inputs and labels of rows, without their ids, sorted; see `digest_of`."""
    rows = _known(rows)
    if isinstance(rows, EncodedRows):
        return rows.contents
    return np.sort(np.array([content_key(row) for row in rows], np.uint64))


def _known(rows: Sequence[Row]) -> Sequence[Row]:
    """Rows, or those of a stream that stand for the others."""
    return rows.first if isinstance(rows, StreamedRows) else rows


def _contains(keys: NDArray[np.uint64], key: int) -> bool:
    place = int(np.searchsorted(keys, np.uint64(key)))
    return place < len(keys) and int(keys[place]) == key


def encode_rows(
    source: DataSource,
    tokenizer: Any,
    max_length: int,
    progress: Progress,
    *,
    generated: Sequence[Conversation] | None = None,
    workers: int | None = None,
    own: Path | None = None,
) -> tuple[Sequence[Row], Summary]:
    """Encode all examples, or find their rows encoded; tell the notes of the rows.

    Args:
        source: The data source of the examples.
        tokenizer: The tokenizer, or the processor of an image model.
        max_length: Maximum number of positions of a row.
        progress: The display of the encoding and of the notes.
        generated: Conversations in place of the source's examples.
        workers: Number of processes that encode, see `kdcore.data.encoded.encode`.
        own: Folder for the rows of a stream, see `kdcore.data.encoded.encode`.

    Returns:
        The rows with a learned token, in the order of the examples, and the summary of all.

    Raises:
        UserError: All rows were dropped, or an example is invalid.
    """
    rows, summary = encoded_rows(
        source, tokenizer, max_length, progress, generated=generated, workers=workers, own=own
    )
    for note, some in summary.notes.items():
        progress.note(f"{some.number} of {counted(summary.examples, 'row')}: {note}: {some}")
    if summary.left_out.number:
        progress.note(
            f"left out {counted(summary.left_out.number, 'row')} without a response or a label: "
            f"{summary.left_out}"
        )
    if not len(rows):
        raise UserError(
            f"none of the {summary.examples} rows has a token to learn within {max_length} tokens",
            "raise data.max_length, or use rows with responses that the chat template prints",
        )
    if summary.dropped.number:
        progress.note(
            f"dropped {summary.dropped.number} of {summary.examples} rows without a token to "
            f"learn within {max_length} tokens: {summary.dropped}"
        )
    return rows, summary


def note_cut_rows(summary: Summary, max_length: int, progress: Progress) -> None:
    """Note how many rows are as long as rows may be: all but a few of these were truncated.

    Args:
        summary: What the encoding found.
        max_length: Maximum number of positions of a row.
        progress: Receiver of the note.
    """
    if summary.full.number:
        kept = summary.examples - summary.dropped.number
        progress.note(
            f"{summary.full.number} of {kept} rows reach data.max_length, {max_length} tokens, "
            f"where longer ones are cut: {summary.full}"
        )


def lengths_of(rows: Sequence[Row]) -> NDArray[np.int32]:
    """The number of positions of each row, see `kdcore.models.facts.positions_of`: [R] int32."""
    if isinstance(rows, EncodedRows):
        return rows.lengths
    return np.array([positions_of(row) for row in rows], np.int32)


def teachers_of(rows: Sequence[Row]) -> list[str]:
    """The ``teacher`` of each row, see `kdcore.method.records.Row`."""
    return rows.teachers if isinstance(rows, EncodedRows) else [row.teacher for row in rows]


def refuse_long_rows(rows: Sequence[Row], models: Sequence[LoadedModel]) -> None:
    """Check that the longest row fits the context of every model.

    Args:
        rows: At least one row.
        models: The models that read the rows.

    Raises:
        UserError: The longest row is longer than the context of a model.
    """
    lengths = lengths_of(rows)
    place = int(lengths.argmax())
    refuse_longer(rows[place].id, int(lengths[place]), map(Context.of, models))


def refuse_long_stream(max_length: int, models: Sequence[LoadedModel]) -> None:
    """Check that any row of a stream fits the context of every model.

    Args:
        max_length: Maximum number of positions of a row.
        models: The models that read the rows.

    Raises:
        UserError: A row may be longer than the context of a model.
    """
    contexts = map(Context.of, models)
    refuse_longer("a row of data.max_length, as a stream may have,", max_length, contexts)


def learned_tokens(rows: Sequence[Row], classes: int) -> Tensor:
    """Count the labels of each token at the learned positions.

    Args:
        rows: The rows.
        classes: V, the number of tokens.

    Returns:
        [V] int64; of a stream, the counts of its first rows.
    """
    rows = _known(rows)
    counts = torch.zeros(classes, dtype=torch.int64)
    if isinstance(rows, EncodedRows):
        tokens, found = (torch.from_numpy(np.array(each)) for each in rows.tokens)
        return counts.index_add(0, tokens, found)
    for row in rows:
        counts += torch.bincount(row.labels[row.mask], minlength=classes)
    return counts


def padding(tokenizer: Any) -> dict[str, int]:
    """The padding value of each input of a language model, for `collate`.

    A tokenizer may have neither a padding token nor an end token: the mask hides any token.
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    fill = next(token for token in known if token is not None)
    return {"input_ids": fill, "attention_mask": 0, "token_type_ids": 0}


def collate(rows: Sequence[tuple[int, Row]], pad: Mapping[str, int]) -> dict[str, Any]:
    """Pad rows on the right to the longest of them.

    Args:
        rows: B rows with their indices.
        pad: Padding value of each input of variable length; other inputs are stacked.

    Returns:
        The inputs [B, ...], ``labels`` [B, T] (0 beyond a row), ``mask`` [B, T] (False beyond a
        row), ``index`` [B], the indices of the rows, and ``teachers``, the list of the teachers
        that they name, if one does.
    """
    of = {name: [row.inputs[name] for _, row in rows] for name in rows[0][1].inputs}
    inputs = {
        name: pad_sequence(each, batch_first=True, padding_value=pad[name])
        if name in pad
        else torch.stack(each)
        for name, each in of.items()
    }
    return inputs | learned_of(rows)


def learned_of(rows: Sequence[tuple[int, Row]]) -> dict[str, Any]:
    """What is learned of rows: the part of `collate` that is not an input of a model."""
    teachers = [row.teacher for _, row in rows]
    named: dict[str, Any] = {"teachers": teachers} if any(teachers) else {}
    return named | {
        "labels": pad_sequence([row.labels for _, row in rows], batch_first=True),
        "mask": pad_sequence([row.mask for _, row in rows], batch_first=True),
        "index": torch.tensor([index for index, _ in rows]),
    }


def padding_share(batches: Iterable[NDArray[np.int32]]) -> float:
    """The share of the positions of batches that is padding.

    Args:
        batches: The number of positions of each row or sequence, [B] of each batch.

    Returns:
        A share in [0, 1).
    """
    filled = padded = 0
    for lengths in batches:
        filled, padded = filled + int(lengths.sum()), padded + len(lengths) * int(lengths.max())
    return 1 - filled / padded


def tokens_of(padded: Mapping[str, Tensor]) -> int:
    """Count the positions of a batch without padding; its rows if it has no attention mask."""
    attended = padded.get("lengths", padded.get("attention_mask"))
    return len(padded["labels"]) if attended is None else int(attended.sum())


def batch_of(padded: Mapping[str, Any], device: torch.device | None = None) -> Batch:
    """Build the `Batch` of a padded batch, on a device.

    The row indices and the masked positions are read on the CPU first, because the host would have
    to wait for another device to return them.

    Args:
        padded: A batch from `collate` or `kdcore.data.batching.packing.Packing`, on the CPU.
        device: The device of the models (default: that of ``padded``).

    Returns:
        The batch.
    """
    beside = ("starts", "lengths", "stored")
    kept = ("index", "sampled", "teacher_share", "teachers", *beside)
    inputs = {name: each for name, each in padded.items() if name not in kept}
    labels, mask = inputs.pop("labels"), inputs.pop("mask")
    learned = mask.flatten().nonzero()[:, 0]
    starts, length, packed = padded.get("starts"), mask.shape[1], None
    if starts is not None:
        packed = starts[learned // length] + learned % length
    here = Batch(
        inputs,
        labels,
        mask,
        padded["index"],
        learned,
        padded.get("sampled", False),
        starts,
        packed,
        tuple(padded.get("teachers", ())),
        teacher_share=padded.get("teacher_share", 0.0),
        stored=padded.get("stored"),
    )
    if device is None or device == mask.device:
        return here
    return replace(
        here,
        inputs={name: sent(each, device) for name, each in inputs.items()},
        labels=sent(labels, device),
        mask=sent(mask, device),
        learned=sent(learned, device),
        learned_in_inputs=None if packed is None else sent(packed, device),
        on_cpu=here,
    )
