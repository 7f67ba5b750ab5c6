"""The teacher's best classes at every learned position, on disk, so that it need not be run again.

A folder holds ``manifest.json``, which says what the cache was made from, and shards, each written
beside and renamed. A shard's tensors, R rows with N learned positions in all:

| tensor | shape | |
| --- | --- | --- |
| ``keys`` | [R, 16] uint8 | `row_key` of each row |
| ``counts`` | [R] int32 | its learned positions |
| ``ids`` | [N, k] uint16 | the likeliest classes, the likeliest first; int32 if V > 65,536 |
| ``logp`` | [N, k - 1] float16 | their log-probs at temperature 1, without the first's |
| ``tail`` | [N] float16 | the log of what the other V - k classes have together |

`kdcore.data.best_classes` says what the last three mean. Rows are found by what is in them, in any
order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from kdcore.data.best_classes import CachedLogits
from kdcore.data.store import add_shard, row_key, shards
from kdcore.data.template_mask import MASK_RULE
from kdcore.errors import UserError
from kdcore.method.objective import Objective
from kdcore.method.records import Row
from kdcore.models.facts import dtype_name, tokenizer_digest
from kdcore.models.loaded import LoadedModel

FORMAT = 1
"""The version of the files."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a cache was made from, and how it is stored.

    teacher: digest of its files, or ``endpoint: NAME``. tokenizer, template: digests. mask_rule:
    version of the rule that says which tokens are learned. k: classes kept. classes: V. ids, dtype:
    as stored. computed: the teacher's dtype, in which it ran; None of a teacher behind an endpoint,
    and of a cache of before this was noted.
    """

    format: int
    teacher: str
    tokenizer: str
    template: str
    mask_rule: int
    k: int
    classes: int
    ids: str
    dtype: str
    computed: str | None = None

    @classmethod
    def of(cls, teacher: LoadedModel, classes: int, k: int, endpoint: str = "") -> Manifest:
        """Of a cache of ``k`` classes, or of all if there are fewer.

        endpoint: the name of the teacher behind one; ``teacher`` then has its tokenizer only.
        Raises UserError when k is less than 2.
        """
        if k < 2:
            raise UserError(
                f"--k is {k}, but a cache needs at least 2 classes", "set --k to 2 or more"
            )
        tokenizer: Any = teacher.tokenizer
        return cls(
            format=FORMAT,
            teacher=f"endpoint: {endpoint}" if endpoint else teacher.digest,
            tokenizer=tokenizer_digest(tokenizer),
            template=_digest(tokenizer.chat_template),
            mask_rule=MASK_RULE,
            k=min(k, classes),
            classes=classes,
            ids="uint16" if classes <= 2**16 else "int32",
            dtype="float16",
            computed=None if endpoint else dtype_name(teacher.model),
        )

    @property
    def digest(self) -> str:
        """sha256 of all that it says.

        A run that began with a cache knows it by this, so what it does not say must add nothing.
        """
        said = asdict(self)
        if self.computed is None:
            del said["computed"]
        return _digest(said)


class TeacherCache:
    """A cache opened for reading.

    Raises UserError when the folder holds none, or a damaged one, or one of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _manifest(folder)
        self._shards: list[Any] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}
        for path in shards(folder):
            shard = _opened(path)
            try:
                keys, counts = shard.get_tensor("keys"), shard.get_tensor("counts")
                ends = np.cumsum(counts).tolist()
                for key, end, count in zip(keys, ends, counts.tolist(), strict=True):
                    self._places[key.tobytes()] = len(self._shards), end - count, end
            except (SafetensorError, ValueError, TypeError) as fault:
                raise _damaged(path) from fault
            self._shards.append(shard)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return len(self._places)

    @property
    def positions(self) -> int:
        """How many learned positions they have."""
        return sum(end - start for _, start, end in self._places.values())

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in shards(self.folder))

    def logits(self, keys: Sequence[bytes], device: torch.device) -> CachedLogits:
        """The teacher's logits at the learned positions of rows, one row after the other."""

        def read(name: str) -> Tensor:
            parts = [
                self._shards[shard].get_slice(name)[start:end]
                for shard, start, end in (self._places[key] for key in keys)
            ]
            wide = np.int64 if name == "ids" else np.float32
            return torch.from_numpy(np.concatenate(parts).astype(wide)).to(device)

        return CachedLogits(read("ids"), read("logp"), read("tail"), self.manifest.classes)

    def refuse_other_origin(
        self, first: LoadedModel, classes: int, *, is_teacher: bool = True
    ) -> None:
        """Raises UserError when it was made from something else than what a run has.

        first: the teacher, or the student of a run without one, whose teacher the cache is.
        """
        asked = asdict(Manifest.of(first, classes, self.manifest.k))
        if not is_teacher:
            asked["computed"] = self.manifest.computed
        if not (is_teacher and first.has_weights):  # then there is no digest to compare
            asked["teacher"] = self.manifest.teacher
        refuse_difference(self.folder, self.manifest, asked)

    def refuse_method(self, objective: Objective) -> None:
        """Raises UserError when a component looks at more of the teacher's classes than it holds.

        A gate that does not say how many looks at all; splitters and divergences are taken at
        their word, and else for fit to work with the evenly spread tail.
        """
        looks = {f"gate '{k}'": _looks_at(gate, None) for k, gate in objective.gates.items()}
        looks |= {f"splitter {i}": _looks_at(s, 0) for i, s in enumerate(objective.splitters)}
        looks["the divergence"] = _looks_at(objective.divergence, 0)
        for name, number in looks.items():
            needed = self.manifest.classes if number is None else number
            if needed > self.manifest.k:
                raise UserError(
                    f"{name} looks at {'all' if number is None else 'the best'} {needed} classes "
                    f"of the teacher, {self.folder} holds the best {self.manifest.k}",
                    "unset data.teacher_cache, build a wider cache (--k), or choose a gate that "
                    "needs less, e.g. speckd with verification: greedy",
                )

    def keys_of(self, rows: Sequence[Row]) -> list[bytes]:
        """The key of each row. Raises UserError when it lacks some of the rows."""
        keys = [row_key(row) for row in rows]
        missing = [row.id for row, key in zip(rows, keys, strict=True) if key not in self]
        if missing:
            raise UserError(
                f"{self.folder} lacks {len(missing)} of {len(rows)} rows, e.g. {missing[0]}",
                "`kdcore cache build` with this spec adds them",
            )
        return keys

    def check_shards(self) -> None:
        """Raises UserError when what a shard holds cannot be."""
        for path, shard in zip(shards(self.folder), self._shards, strict=True):
            k, classes = self.manifest.k, self.manifest.classes
            ids, logp, tail = (shard.get_tensor(name) for name in ("ids", "logp", "tail"))
            count = int(shard.get_tensor("counts").sum())
            shaped = (ids.shape, logp.shape, tail.shape) == ((count, k), (count, k - 1), (count,))
            if not (shaped and np.isfinite(logp).all() and (tail <= 0).all()) or (
                count and not 0 <= ids.min() <= ids.max() < classes
            ):
                raise _damaged(path)


def write_shard(
    folder: Path, manifest: Manifest, rows: Sequence[tuple[bytes, int]], best: Iterable[Any]
) -> None:
    """Write rows (key, count) and their `best_classes` as the next shard, whole or not at all."""
    ids, logp, tail = (torch.cat(parts).cpu().numpy() for parts in zip(*best, strict=True))
    tensors: dict[str, NDArray[Any]] = {
        "keys": np.frombuffer(b"".join(key for key, _ in rows), np.uint8).reshape(-1, 16),
        "counts": np.array([count for _, count in rows], np.int32),
        "ids": ids.astype(manifest.ids),
        "logp": logp,
        "tail": tail,
    }
    add_shard(folder, tensors, save_file)


def refuse_difference(folder: Path, found: Manifest, asked: dict[str, Any]) -> None:
    """Raises UserError when a cache is of another origin than what is asked for.

    One that does not say in which dtype its teacher ran is taken at its reader's word: most are
    right, and it would cost hours of the teacher to refuse them.
    """
    named = {
        "teacher": "model",
        "template": "chat template",
        "mask_rule": "mask rule",
        "k": "width k",
        "classes": "number of classes",
        "computed": "dtype of the model",
    }
    made = asdict(found)
    if found.computed is None:
        del made["computed"]
    other = [named.get(name, name) for name in made if made[name] != asked[name]]
    if other:
        raise UserError(
            f"{folder} was made with another {' and '.join(other)}",
            "go back to what it was made with, or build another cache (--out)",
        )


def _looks_at(component: Any, unsaid: int | None) -> int | None:
    found: int | None = getattr(component, "teacher_classes", unsaid)
    return found


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _manifest(folder: Path) -> Manifest:
    path = folder / "manifest.json"
    if not path.exists():
        raise UserError(f"{folder} holds no teacher cache", "build it: `kdcore cache build SPEC`")
    try:
        data = json.loads(path.read_text("utf-8"))
        version = data["format"]
        if version == FORMAT:
            return Manifest(**data)
    except (ValueError, KeyError, TypeError) as fault:
        raise _damaged(path) from fault
    raise UserError(
        f"{folder} has format {version}, this kdcore reads {FORMAT}", "build the cache again"
    )


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except SafetensorError as fault:
        raise _damaged(path) from fault


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged", "delete it, and `kdcore cache build` makes it again")
