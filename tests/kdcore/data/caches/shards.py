"""The shards of a folder, for tests that look at their files."""

from __future__ import annotations

from pathlib import Path

from kdcore.data.caches.shard_folder import number_of


def shards(folder: Path) -> list[Path]:
    """The complete shards, in order."""
    return sorted(folder.glob("shard-*.safetensors"), key=number_of)
