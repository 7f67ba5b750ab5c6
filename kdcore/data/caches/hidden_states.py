"""A target's hidden states at every position of the training rows, on disk: the target runs once.

A folder contains ``manifest.json``, which identifies the target, and shards. Each shard is written
to a temporary file and renamed, so that a killed run loses only the shard in progress. The tensors
of a shard of R rows with N positions in total:

| tensor | shape | |
| --- | --- | --- |
| ``keys`` | [R, 16] uint8 | `kdcore.data.store.row_key` of each row |
| ``counts`` | [R] int32 | number of positions of each row |
| ``states`` | [N, F + H] | the features that a drafter reads, then the final hidden state |

Rows are found by their content, in any order, so that runs with different drafters of the same
layers can share a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kdcore.data.caches.shard_folder import (
    MANIFEST,
    SHARD_BYTES,
    Damaged,
    ShardFolder,
    add_shard,
    next_shard,
)
from kdcore.data.ranks import ALONE, Ranks
from kdcore.data.rows import lengths_of, row_keys
from kdcore.data.store import RowIndex, grouped
from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.runs.progress import Progress
from kdcore.runs.whole_files import beside, write_text

SHARD = 16_384
"""Minimum number of positions in a shard that does not reach `SHARD_BYTES` before, and so the most
that a killed run repeats."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The manifest: the origin and the format of stored hidden states.

    Attributes:
        target: Digest of the target's files; "" of a target without weights, which is compared
            with any.
        layers: Indices into the target's hidden_states; their concatenation is the features.
        width: F + H.
        dtype: The dtype of the stored states.
        computed: The dtype in which the target ran.
    """

    target: str
    layers: tuple[int, ...]
    width: int
    dtype: str
    computed: str

    @property
    def bytes_per_position(self) -> int:
        """The number of bytes on disk per position."""
        return self.width * torch.finfo(getattr(torch, self.dtype)).bits // 8

    @property
    def manifest(self) -> dict[str, Any]:
        """The attributes as JSON has them."""
        return asdict(self) | {"layers": list(self.layers)}

    def differences(self, known: Mapping[str, Any]) -> list[str]:
        """Compare with a manifest.

        Args:
            known: The manifest, read from JSON. Older ones lack ``computed``: most such folders are
                valid, since the same spec returns to its folder, and a refusal would cost hours of
                the target's time.

        Returns:
            What differs, in words.
        """
        skipped = {"computed"} - known.keys() | (set() if self.target else {"target"})
        named = {"computed": "dtype of the target"}
        return [
            named.get(name, name)
            for name, asked in self.manifest.items()
            if name not in skipped and known.get(name) != asked
        ]


class HiddenStates:
    """The stored states of some rows, read by a thread, ahead of the training where it is told.

    Args:
        folder: A folder that `store` has filled for the rows.
        rows: The rows, of which each must be in the folder.
        pinned: Whether the states are read into pinned memory, from which a device copies them
            while it computes.

    Attributes:
        prefetch: Number of steps whose rows are read ahead.
    """

    def __init__(self, folder: Path, rows: Sequence[Row], *, pinned: bool = False) -> None:
        self.prefetch = 2
        self._files = ShardFolder(folder, "pt")
        self._index = _index(self._files)
        self._keys, self._pinned = row_keys(rows), pinned
        self._thread = ThreadPoolExecutor(1, "hidden-states")
        self._pending: dict[tuple[int, ...], Future[Tensor]] = {}

    def request(self, padded: Mapping[str, Any], progress: float) -> None:
        """Start to read the states of a batch that training reads later.

        Args:
            padded: The batch as `kdcore.data.rows.collate` makes it.
            progress: Share of the training that is done then, on which nothing depends.
        """
        self._started(padded["index"].tolist(), padded["input_ids"].shape[1])

    def read(self, index: Sequence[int], length: int) -> Tensor:
        """Read the states of some rows, unless they are read already (`request`).

        Args:
            index: B indices into the rows.
            length: The padded length T.

        Returns:
            [B, T, F + H], padded on the right with zeros.
        """
        read = self._started(index, length)
        del self._pending[(length, *index)]
        return read.result()

    def _started(self, index: Sequence[int], length: int) -> Future[Tensor]:
        asked = (length, *index)
        if asked not in self._pending:
            self._pending[asked] = self._thread.submit(self._read, index, length)
        return self._pending[asked]

    def _read(self, index: Sequence[int], length: int) -> Tensor:
        try:
            parts = [
                self._files[file].get_slice("states")[start:end]
                for file, start, end in (self._index[self._keys[place]] for place in index)
            ]
        except Damaged as fault:
            raise _damaged(fault) from fault
        states = pad_sequence(parts, batch_first=True)
        states = torch.nn.functional.pad(states, (0, 0, 0, length - states.shape[1]))
        return states.pin_memory() if self._pinned else states


def store(
    folder: Path,
    origin: Origin,
    rows: Sequence[Row],
    limit_gb: float,
    read: Callable[[Sequence[Row]], Iterator[Tensor]],
    progress: Progress,
    ranks: Ranks = ALONE,
) -> None:
    """Add the hidden states of the rows that a folder lacks.

    Args:
        folder: The folder, created if necessary.
        origin: The manifest of the states.
        rows: The rows that the folder must contain afterwards.
        limit_gb: Maximum size of the folder in 1e9 bytes.
        read: A function that computes [T, F + H] for each of the given rows.
        progress: Receiver of the progress.
        ranks: The processes that share the work, each of which calls this with the same arguments
            and writes its own shards.

    Raises:
        UserError: The states would exceed the limit (checked before any computation), the folder
            contains other files or the states of another target, or another process is writing
            to it.
    """
    keys, lengths = row_keys(rows), lengths_of(rows)
    keyed = {key: place for place, key in enumerate(keys)}  # equal rows are one

    def lacks() -> bool:
        if not (manifest := folder / MANIFEST).exists():
            return True
        _refuse_difference(manifest, origin)
        return not _index(ShardFolder(folder, "pt")).contains(keys).all()

    def missing() -> tuple[int, list[bytes]]:
        known = _index(ShardFolder(folder, "pt"))
        left = [key for key in keyed if key not in known]
        more = sum(int(lengths[keyed[key]]) for key in left)
        refuse_more(known.positions + more, origin, limit_gb)
        return next_shard(folder), left

    if not ranks.by_main(lacks):
        return  # no lock for readers: several runs may arrive at the same time
    with ExitStack() as lock:
        ranks.by_main(lambda: lock.enter_context(_held(folder, origin)))
        first, left = ranks.by_main(missing)
        # rows of similar length together, to limit the padding
        alike = sorted(((key, keyed[key]) for key in left), key=lambda item: lengths[item[1]])
        least = min(SHARD, SHARD_BYTES // origin.bytes_per_position)
        parts = [*enumerate(grouped(alike, lambda place: int(lengths[place]), least), first)]
        own = ranks.share(parts)
        done = len(keyed) - len(left)
        total = done + sum(len(part) for _, part in own)
        with progress.stage("store hidden states", total, done) as stage:
            for number, part in own:
                states = []
                for state in read([rows[place] for _, place in part]):
                    states.append(state.to(getattr(torch, origin.dtype)).cpu())
                    stage.advance()
                _write_shard(folder, number, [key for key, _ in part], states)
        ranks.total(len(own))  # until all are written


def refuse_other_folder(folder: Path, origin: Origin) -> None:
    """Check, before anything is computed, that a folder does not contain other hidden states.

    Args:
        folder: The folder, which need not exist.
        origin: The manifest of the states that are to be stored.

    Raises:
        UserError: It contains the states of another target, or in another format.
    """
    if (manifest := folder / MANIFEST).exists():
        _refuse_difference(manifest, origin)


def refuse_more(positions: int, origin: Origin, limit_gb: float) -> None:
    """Check that the states of some positions stay within the limit.

    Args:
        positions: Number of positions.
        origin: The manifest of the states.
        limit_gb: Maximum size in 1e9 bytes.

    Raises:
        UserError: The states would exceed the limit.
    """
    size = positions * origin.bytes_per_position / 1e9
    if size > limit_gb:
        raise UserError(
            f"the hidden states of {positions:,} positions take {size:.2f} GB, but the limit is "
            f"{limit_gb:.2f} GB",
            "raise data.hidden_states.limit_gb, or remove data.hidden_states to run the target at "
            "every step",
        )


def _index(files: ShardFolder) -> RowIndex:
    """Where the rows are in the files of a folder."""
    try:
        return RowIndex(files.keyed())
    except Damaged as fault:
        raise _damaged(fault) from fault


def _damaged(fault: Damaged) -> UserError:
    return UserError(f"{fault.path} is damaged", "delete it; the next run creates it again")


@contextmanager
def _held(folder: Path, origin: Origin) -> Iterator[None]:
    """Lock the folder, created if necessary, and check or write its manifest."""
    manifest = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise UserError(
            f"cannot write to {folder}: {fault.strerror}",
            "set data.hidden_states.folder to a writable folder",
        ) from fault
    try:
        with FileLock(folder / "lock", timeout=0):
            if manifest.exists():
                _refuse_difference(manifest, origin)
            elif any(path.name not in ("lock", beside(manifest).name) for path in folder.iterdir()):
                raise UserError(
                    f"{folder} contains files that are not hidden states",
                    "set data.hidden_states.folder to a new or empty folder",
                )
            else:
                write_text(manifest, json.dumps(origin.manifest, indent=2) + "\n")
            yield
    except Timeout:
        raise UserError(
            f"another process is writing to {folder}",
            "wait for it to finish, or set data.hidden_states.folder to another folder",
        ) from None


def _refuse_difference(manifest: Path, origin: Origin) -> None:
    try:
        found = json.loads(manifest.read_text("utf-8"))
    except ValueError:
        found = None
    other = origin.differences(found if isinstance(found, dict) else {})
    if other:
        raise UserError(
            f"{manifest.parent} contains hidden states with a different {' and '.join(other)}",
            "set data.hidden_states.folder to another folder, or delete this one",
        )


def _write_shard(
    folder: Path, number: int, keys: Sequence[bytes], states: Sequence[Tensor]
) -> None:
    tensors = {
        "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 16),
        "counts": torch.tensor([len(state) for state in states], dtype=torch.int32),
        "states": torch.cat(list(states)),
    }
    add_shard(folder, tensors, save_file, number)
