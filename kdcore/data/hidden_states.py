"""A target's hidden states at every position of the training rows, on disk: the target runs once.

A folder holds ``manifest.json``, which says whose states they are, and shards, each written beside
and renamed, so that a kill costs the shard that was being made. A shard's tensors, R rows with N
positions in all:

| tensor | shape | |
| --- | --- | --- |
| ``keys`` | [R, 16] uint8 | `kdcore.data.store.row_key` of each row |
| ``counts`` | [R] int32 | its positions |
| ``states`` | [N, F + H] | the features that a drafter reads, then the final hidden state |

Rows are found by what is in them, in any order, so that runs with other drafters of the same layers
can share a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdcore.data.store import add_shard, grouped, row_key, shards
from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.runs.progress import Progress
from kdcore.runs.whole_files import write_whole

SHARD = 16_384
"""Positions of a shard, at least: what a killed run has to do again."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose hidden states are stored, and how: the manifest.

    target: digest of its files. layers: indices into its hidden_states, whose concatenation is the
    features. width: F + H. dtype: as stored. computed: the target's dtype, in which it ran.
    """

    target: str
    layers: tuple[int, ...]
    width: int
    dtype: str
    computed: str

    @property
    def bytes_per_position(self) -> int:
        """On disk."""
        return self.width * torch.finfo(getattr(torch, self.dtype)).bits // 8


class HiddenStates:
    """The states of ``rows``, opened for reading; they must all be there."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        stored = _Stored(folder)
        self._files = stored.files
        self._places = [stored.places[row_key(row)] for row in rows]

    def read(self, index: Sequence[int], length: int) -> Tensor:
        """[B, T, F + H] of the rows at B places, right-padded with zeros to ``length`` = T."""
        parts = [
            self._files[file].get_slice("states")[start:end]
            for file, start, end in (self._places[place] for place in index)
        ]
        padded = pad_sequence(parts, batch_first=True)
        return torch.nn.functional.pad(padded, (0, 0, 0, length - padded.shape[1]))


def store(
    folder: Path,
    origin: Origin,
    rows: Sequence[Row],
    limit_gb: float,
    read: Callable[[Sequence[Row]], Iterator[Tensor]],
    progress: Progress,
) -> None:
    """Add the rows that a folder lacks to it.

    limit_gb: what the folder may hold, in 1e9 bytes. read: gives [T, F + H] of each of some rows.
    Raises UserError before anything is computed when the limit would be passed, and when the folder
    holds something else, or another target's states, or is being written by another process.
    """
    keyed = {row_key(row): row for row in rows}  # equal rows are one
    if (manifest := folder / "manifest.json").exists():
        _refuse_difference(manifest, origin)
        if keyed.keys() <= _Stored(folder).places.keys():
            return  # whoever only reads holds nothing: several processes of a run come at once
    with _held(folder, origin):
        known = _Stored(folder).places
        missing = {key: row for key, row in keyed.items() if key not in known}
        # rows of like length together, so that little padding is computed
        left = sorted(missing.items(), key=lambda item: len(item[1].labels))
        held = sum(end - start for _, start, end in known.values())
        positions = held + sum(len(row.labels) for row in missing.values())
        refuse_more(positions, origin, limit_gb)
        done = len(keyed) - len(missing)
        with progress.stage("store hidden states", len(keyed), done) as stage:
            for part in grouped(left, lambda row: len(row.labels), SHARD):
                states = []
                for state in read([row for _, row in part]):
                    states.append(state.to(getattr(torch, origin.dtype)).cpu())
                    stage.advance()
                _write_shard(folder, [key for key, _ in part], states)


def refuse_more(positions: int, origin: Origin, limit_gb: float) -> None:
    """Raises UserError when the states of so many positions would pass the limit."""
    size = positions * origin.bytes_per_position / 1e9
    if size > limit_gb:
        raise UserError(
            f"the hidden states of {positions:,} positions take {size:.2f} GB, the limit is "
            f"{limit_gb:.2f} GB",
            "raise data.hidden_states.limit_gb, or leave data.hidden_states out: the target then "
            "runs at every step",
        )


class _Stored:
    """Where each row of a folder is: {key: (file, first position, end)}."""

    def __init__(self, folder: Path) -> None:
        self.files: list[Any] = []
        self.places: dict[bytes, tuple[int, int, int]] = {}
        for path in shards(folder):
            try:
                file: Any = safe_open(path, framework="pt")
                keys, counts = (file.get_tensor(name) for name in ("keys", "counts"))
                ends = counts.cumsum(0).tolist()
                for key, end, count in zip(keys, ends, counts.tolist(), strict=True):
                    self.places[key.numpy().tobytes()] = len(self.files), end - count, end
            except (SafetensorError, ValueError) as fault:
                raise UserError(
                    f"{path} is damaged", "delete it, and the next run makes it again"
                ) from fault
            self.files.append(file)


@contextmanager
def _held(folder: Path, origin: Origin) -> Iterator[None]:
    """The folder, ours alone and of this origin, made if there is none."""
    manifest = folder / "manifest.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(
            f"{folder} cannot be written: {fault.strerror}",
            "name another data.hidden_states.folder",
        ) from fault
    try:
        with FileLock(folder / "lock", timeout=0):
            if manifest.exists():
                _refuse_difference(manifest, origin)
            elif any(path.name not in ("lock", "manifest.json.part") for path in folder.iterdir()):
                raise UserError(
                    f"{folder} holds something else", "name another data.hidden_states.folder"
                )
            else:
                write_whole(manifest, json.dumps(asdict(origin), indent=2) + "\n")
            yield
    except Timeout:
        raise UserError(
            f"another process is writing {folder}",
            "wait for it, or name another data.hidden_states.folder",
        ) from None


def _refuse_difference(manifest: Path, origin: Origin) -> None:
    try:
        found = json.loads(manifest.read_text("utf-8"))
    except ValueError:
        found = None
    known = found if isinstance(found, dict) else {}
    asked = json.loads(json.dumps(asdict(origin)))
    if "computed" not in known:
        # A folder of before this was noted does not say. Most are right, since the same spec comes
        # back to its folder, and to refuse them would cost hours of the target.
        del asked["computed"]
    named = {"computed": "dtype of the target"}
    other = [named.get(name, name) for name in asked if known.get(name) != asked[name]]
    if other:
        raise UserError(
            f"{manifest.parent} holds the hidden states of another {' and '.join(other)}",
            "name another data.hidden_states.folder, or delete this one",
        )


def _write_shard(folder: Path, keys: Sequence[bytes], states: Sequence[Tensor]) -> None:
    tensors = {
        "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16),
        "counts": torch.tensor([len(state) for state in states], dtype=torch.int32),
        "states": torch.cat(list(states)),
    }
    add_shard(folder, tensors, save_file)
