"""Several teachers as one: each row is taught by its own, or by the average of some.

With the weights w_m of a row, which sum to 1, and the teachers' distributions p_m over the V shared
classes, the teacher of the row is p = sum_m w_m p_m, as log-probs: logsumexp_m(log w_m + log p_m).
A chunk of [C, V] logits exists at a time for the average, and another for one of the teachers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcore.data.batching.stored import Reader
from kdcore.method.logits import TeacherLogits
from kdcore.method.records import Batch
from kdcore.models.device import sent
from kdcore.training.teachers.kinds import Teacher
from kdcore.training.teachers.row_weights import RowWeights


@dataclass(frozen=True, slots=True)
class Share:
    """The logits of one of several teachers, at M of the N positions of a batch.

    Attributes:
        logits: The logits at these positions.
        place: [M] int64, their indices among the N, increasing.
        place_on_cpu: [M] int64, the same on the CPU.
        log_weight: [M] float32, the log of the teacher's weight there.
        alone: [M] bool, where no other teacher teaches; None for everywhere.
    """

    logits: TeacherLogits
    place: Tensor
    place_on_cpu: Tensor
    log_weight: Tensor
    alone: Tensor | None


@dataclass(frozen=True, slots=True)
class MixedLogits:
    """The logits of several teachers at N positions: a `kdcore.method.logits.TeacherLogits`.

    Where one teacher teaches alone they are its own logits; elsewhere the log-probs of the average.

    Attributes:
        shares: The teachers that teach a position.
        count: N.
        classes: V; further classes of a teacher are padding.
        device: The device that reads the logits.
    """

    shares: tuple[Share, ...]
    count: int
    classes: int
    device: torch.device

    @torch.no_grad()
    def logits(self, chunk: slice) -> Tensor:
        """[C, V] float32 logits of a chunk of the masked positions, without gradient."""
        start, stop, _ = chunk.indices(self.count)
        mixed = torch.full((stop - start, self.classes), -math.inf, device=self.device)
        for share in self.shares:
            ends = torch.searchsorted(share.place_on_cpu, torch.tensor([start, stop]))
            part = slice(*ends.tolist())
            if part.start == part.stop:
                continue
            own = share.logits.logits(part)[:, : self.classes]
            if share.alone is not None:
                weighted = own.log_softmax(-1) + share.log_weight[part, None]
                own = own.where(share.alone[part, None], weighted)
            at = share.place[part] - start
            mixed[at] = torch.logaddexp(mixed[at], own)
        return mixed


@dataclass(frozen=True, slots=True)
class SeveralReaders:
    """Reads what several teachers have stored of batches, each of the rows that it ever teaches.

    Attributes:
        readers: Name of a cached teacher -> what reads for it.
        weights: The weights of the teachers for each row.
    """

    readers: Mapping[str, Reader]
    weights: RowWeights

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Read ``{name: {"rows": [M] int64 places in the batch, "read": what was read}}``."""
        said = batch.get("teachers") or [""] * len(batch["mask"])
        taught = [self.weights.teaches(each) for each in said]
        found = {}
        for name, reader in self.readers.items():
            rows = torch.tensor([place for place, names in enumerate(taught) if name in names])
            if len(rows):
                read = reader({"index": batch["index"][rows]})
                found[name] = {"rows": rows, "read": read}
        return found


@dataclass(frozen=True)
class Mixture(Teacher):
    """Several teachers.

    Attributes:
        teachers: Name -> teacher.
        weights: The weights of the same teachers for each row.
        classes: V, the number of classes that all models share.
    """

    teachers: Mapping[str, Teacher]
    weights: RowWeights
    classes: int

    @property
    def prefetch(self) -> int:
        """The largest number of steps of a teacher."""
        return max(teacher.prefetch for teacher in self.teachers.values())

    @property
    def has_any(self) -> bool:
        """Whether all teachers have the logits of any rows."""
        return all(teacher.has_any for teacher in self.teachers.values())

    def reader(self) -> SeveralReaders | None:
        """Return what reads for the teachers that have something stored."""
        each = {name: teacher.reader() for name, teacher in self.teachers.items()}
        found = {name: reader for name, reader in each.items() if reader is not None}
        return SeveralReaders(found, self.weights) if found else None

    def logits(self, batch: Batch, progress: float) -> TeacherLogits:
        """Ask each teacher for the rows of a batch that it teaches."""
        return self._mixed(batch, progress, lambda teacher, rows: teacher.logits(rows, progress))

    def of_any(self, batch: Batch) -> TeacherLogits | None:
        """Ask each teacher for the rows that it teaches; the average is that of the last step."""
        if not self.has_any:
            return None
        return self._mixed(batch, 1.0, lambda teacher, rows: teacher.of_any(rows))

    def request(self, padded: Mapping[str, Any], progress: float) -> None:
        """Request the rows of a batch from the teachers that teach them."""
        weights = self._weights(padded.get("teachers", ()), len(padded["mask"]), progress)
        for column, teacher in zip(weights.T, self.teachers.values(), strict=True):
            rows = column.nonzero()[:, 0]
            if teacher.prefetch and len(rows):
                tensors = {n: each for n, each in padded.items() if isinstance(each, Tensor)}
                teacher.request({n: each[rows] for n, each in tensors.items()}, progress)

    def figures(self) -> dict[str, float]:
        """Return the figures of the teachers: their sums."""
        found: dict[str, float] = {}
        for teacher in self.teachers.values():
            for name, value in teacher.figures().items():
                found[name] = found.get(name, 0.0) + value
        return found

    def _weights(self, said: Any, rows: int, progress: float) -> Tensor:
        """[B, M] float64 on the CPU."""
        each = (self.weights.at(one, progress) for one in said or [""] * rows)
        return torch.tensor(list(each), dtype=torch.float64)

    def _mixed(self, batch: Batch, progress: float, ask: Any) -> MixedLogits:
        weights = self._weights(batch.teachers, len(batch.mask), progress)
        device, positions = batch.mask.device, batch.positions_on_cpu
        row_of, alone = positions // batch.mask.shape[1], (weights > 0).sum(1) == 1
        shares = []
        for column, (name, teacher) in zip(weights.T, self.teachers.items(), strict=True):
            rows = column.nonzero()[:, 0]
            place = (column[row_of] > 0).nonzero()[:, 0]
            if not len(place):
                continue
            where = alone[row_of[place]]
            shares.append(
                Share(
                    ask(teacher, _some_rows(batch, rows, name)),
                    sent(place, device),
                    place,
                    sent(column[row_of[place]].log().float(), device),
                    None if bool(where.all()) else sent(where, device),
                )
            )
        return MixedLogits(tuple(shares), len(positions), self.classes, device)


def _kept(arrays: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """What a cache read of some of its rows, [R] bool; see `TeacherCache.arrays`."""
    positions = rows.repeat_interleave(arrays["counts"])
    return {n: each[rows if n == "counts" else positions] for n, each in arrays.items()}


def _some_rows(batch: Batch, rows: Tensor, name: str) -> Batch:
    """The batch of some rows for a teacher, given by [M] int64 increasing indices on the CPU."""
    stored = (batch.stored or {}).get(name)
    if stored is not None:
        stored = _kept(stored["read"], torch.isin(stored["rows"], rows))
    if len(rows) == len(batch.mask):
        return replace(batch, stored=stored)
    device = batch.mask.device
    there = sent(rows, device)
    mask = batch.mask[there]
    on_cpu = None if batch.on_cpu is None else _some_rows(batch.on_cpu, rows, name)
    return replace(
        batch,
        inputs={name: each[there] for name, each in batch.inputs.items()},
        labels=batch.labels[there],
        mask=mask,
        index=batch.index[rows],
        learned=sent(on_cpu.positions, device) if on_cpu else mask.flatten().nonzero()[:, 0],
        teachers=tuple(batch.teachers[row] for row in rows.tolist()) if batch.teachers else (),
        on_cpu=on_cpu,
        stored=stored,
    )
