"""The manifest of a teacher cache: its origin and its format."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kdcore.data.caches.shard_folder import MANIFEST, Location, text_of
from kdcore.data.templates.mask import MASK_RULE
from kdcore.data.templates.rendering import prints_date
from kdcore.errors import UserError
from kdcore.models.facts import dtype_name, tokenizer_digest
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.today import today

FORMAT = 1
"""Version of the file format."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The origin and the format of a cache.

    Attributes:
        format: Version of the file format.
        teacher: Digest of the teacher's files, or ``endpoint: NAME``.
        tokenizer: Digest of the tokenizer.
        template: Digest of the chat template.
        mask_rule: Version of the rule that selects the learned tokens.
        k: Number of stored classes per position.
        classes: Number of classes V.
        ids: The dtype of the stored ids.
        dtype: The dtype of the stored log-probs.
        computed: The dtype in which the teacher ran; None for an endpoint, and in older caches,
            which lack this field.
        date: The date that the chat template prints; None if it prints none.
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
    date: str | None = None

    @classmethod
    def of(cls, teacher: LoadedModel, classes: int, k: int, endpoint: str = "") -> Manifest:
        """The manifest of a new cache.

        Args:
            teacher: The teacher; for an endpoint, a model with the teacher's tokenizer.
            classes: Number of classes V.
            k: Number of classes to store, reduced to V if it is larger.
            endpoint: Name of the teacher at an endpoint; empty for a local teacher.

        Returns:
            The manifest.

        Raises:
            UserError: k is less than 2.
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
            date=str(today().date()) if prints_date(tokenizer) else None,
        )

    @property
    def bytes_per_position(self) -> int:
        """The size of a stored position: k ids, and k - 1 log-probs and the tail."""
        return self.k * (np.dtype(self.ids).itemsize + np.dtype(self.dtype).itemsize)

    @property
    def digest(self) -> str:
        """The sha256 of the fields, by which a run identifies its cache.

        A missing field is left out, so that the digest of an older cache does not change.
        """
        late = ("computed", "date")
        return _digest({k: v for k, v in asdict(self).items() if k not in late or v is not None})


def manifest_of(folder: Location) -> Manifest:
    """Read the manifest of a cache.

    Args:
        folder: The folder of the cache, or its URL.

    Returns:
        The manifest.

    Raises:
        UserError: The folder does not contain a cache, its manifest is damaged, or the cache is of
            another format.
    """
    path, text = f"{folder}/{MANIFEST}", text_of(folder, MANIFEST)
    if text is None:
        raise UserError(
            f"{folder} does not contain a teacher cache",
            "run `kdcore cache build SPEC` to build it",
        )
    try:
        data = json.loads(text)
        version = data["format"]
        if version == FORMAT:
            return Manifest(**data)
    except (ValueError, KeyError, TypeError) as fault:
        raise damaged(path) from fault
    raise UserError(
        f"{folder} has cache format {version}, but this version of kdcore reads format {FORMAT}",
        "build the cache again",
    )


def refuse_difference(folder: Location, found: Manifest, asked: dict[str, Any]) -> None:
    """Check that a cache has the expected origin.

    A cache without ``computed`` passes in any dtype: most such caches are valid, and a refusal
    would cost hours of the teacher's time.

    Args:
        folder: The folder of the cache.
        found: Its manifest.
        asked: The expected fields of the manifest.

    Raises:
        UserError: A field differs.
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
            f"{folder} was built with a different {' and '.join(other)}",
            "restore the settings it was built with, or build another cache (--out)",
        )


def damaged(path: str) -> UserError:
    """The error of a cache with a damaged file."""
    return UserError(f"{path} is damaged", "delete it, then run `kdcore cache build` again")


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()
