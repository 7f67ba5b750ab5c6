"""Encoding of examples as rows, and collation of rows into padded batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from kdcore.errors import UserError
from kdcore.method.protocols import DataSource
from kdcore.method.records import Batch, Row
from kdcore.models.device import sent
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
    trained = {_content(row) for row in train.rows}
    shared = [row.id for row in heldout.rows if _content(row) in trained]
    if shared:
        progress.note(
            f"{len(shared)} of {len(heldout.rows)} held-out rows are also {how}, which biases the "
            f"results upwards: {', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}"
        )


def _content(row: Row) -> bytes:
    """Digest of a row's inputs and labels, without its id."""
    tensors = [row.inputs[name] for name in sorted(row.inputs)] + [row.labels]
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).digest()


def encode_rows(
    source: DataSource, examples: Sequence[Any], tokenizer: Any, max_length: int, progress: Progress
) -> list[Row]:
    """Encode all examples; drop those without a learned token, and tell the notes of the rows.

    Args:
        source: The data source of the examples.
        examples: The examples.
        tokenizer: The tokenizer, or the processor of an image model.
        max_length: Maximum number of positions of a row.
        progress: Receiver of the notes.

    Returns:
        The rows in the order of the examples.

    Raises:
        UserError: All rows were dropped, or an example is invalid.
    """
    rows = [source.encode(example, tokenizer, max_length) for example in examples]
    kept = [row for row in rows if row.mask.any()]
    dropped = [row.id for row in rows if not row.mask.any()]
    for note, ids in notes_of(rows).items():
        progress.note(f"{len(ids)} of {len(rows)} rows: {note}: {_few(ids)}")
    if not kept:
        raise UserError(
            f"none of the {len(rows)} rows has a response within {max_length} tokens",
            "raise data.max_length, or use rows with responses",
        )
    if dropped:
        progress.note(
            f"dropped {len(dropped)} of {len(rows)} rows whose response starts after "
            f"{max_length} tokens: {_few(dropped)}"
        )
    return kept


def notes_of(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Collect the notes of rows.

    Args:
        rows: The rows.

    Returns:
        Note -> ids of its rows.
    """
    found: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            found.setdefault(note, []).append(row.id)
    return found


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")


def note_cut_rows(rows: Sequence[Row], max_length: int, progress: Progress) -> None:
    """Note how many rows are as long as rows may be: all but a few of these were truncated.

    Args:
        rows: The encoded rows.
        max_length: Maximum number of positions of a row.
        progress: Receiver of the note.
    """
    full = [row.id for row in rows if len(row.inputs.get("input_ids", ())) == max_length]
    if full:
        progress.note(
            f"{len(full)} of {len(rows)} rows reach data.max_length, {max_length} tokens, where "
            f"longer ones are cut: {_few(full)}"
        )


def padding(tokenizer: Any) -> dict[str, int]:
    """The padding value of each input of a language model, for `collate`.

    A tokenizer may have neither a padding token nor an end token: the mask hides any token.
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    fill = next(token for token in known if token is not None)
    return {"input_ids": fill, "attention_mask": 0, "token_type_ids": 0}


def collate(rows: Sequence[tuple[int, Row]], pad: Mapping[str, int]) -> dict[str, Tensor]:
    """Pad rows on the right to the longest of them.

    Args:
        rows: B rows with their indices.
        pad: Padding value of each input of variable length; other inputs are stacked.

    Returns:
        The inputs [B, ...], ``labels`` [B, T] (0 beyond a row), ``mask`` [B, T] (False beyond a
        row) and ``index`` [B], the indices of the rows.
    """
    of = {name: [row.inputs[name] for _, row in rows] for name in rows[0][1].inputs}
    inputs = {
        name: pad_sequence(each, batch_first=True, padding_value=pad[name])
        if name in pad
        else torch.stack(each)
        for name, each in of.items()
    }
    return inputs | {
        "labels": pad_sequence([row.labels for _, row in rows], batch_first=True),
        "mask": pad_sequence([row.mask for _, row in rows], batch_first=True),
        "index": torch.tensor([index for index, _ in rows]),
    }


def batch_of(padded: Mapping[str, Any], device: torch.device | None = None) -> Batch:
    """Build the `Batch` of a padded batch, on a device.

    The row indices and the masked positions are read on the CPU first, because the host would have
    to wait for another device to return them.

    Args:
        padded: A padded batch from `collate`, on the CPU.
        device: The device of the models (default: that of ``padded``).

    Returns:
        The batch.
    """
    place = padded["mask"].device if device is None else device
    kept = ("index", "sampled")
    learned = padded["mask"].flatten().nonzero()[:, 0]
    inputs = {name: sent(each, place) for name, each in padded.items() if name not in kept}
    labels, mask = inputs.pop("labels"), inputs.pop("mask")
    return Batch(
        inputs,
        labels,
        mask,
        padded["index"].cpu(),
        sent(learned, place),
        learned.cpu(),
        padded.get("sampled", False),
    )
