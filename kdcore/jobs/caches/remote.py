"""A teacher cache that is built for a remote folder: on this machine, then sent there."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcore.data.caches.shard_folder import MANIFEST, Location, number_of, opened
from kdcore.errors import UserError, first_line
from kdcore.models.folder.files import cache_folder
from kdcore.runs.whole_files import whole


@contextmanager
def built_here(location: Location) -> Iterator[Path]:
    """Provide a local folder for a cache, and send what it holds to a remote one after the block.

    The local folder of a remote one begins with what that has. It is removed when all is sent; a
    build that was interrupted finds it again. Other machines must not build the same cache.

    Args:
        location: The cache's folder, which is its own local folder, or the URL of one.

    Yields:
        The local folder.

    Raises:
        UserError: The remote folder cannot be opened, read or written.
    """
    if isinstance(location, Path):
        yield location
        return
    files, root = opened(location)
    name = hashlib.sha256(location.encode()).hexdigest()[:32]
    place = cache_folder() / "caches" / name
    with _told(location, "read"):
        for path, size in _of(files, root).items():
            own = place / path
            if not own.exists() or own.stat().st_size != size:
                own.parent.mkdir(parents=True, exist_ok=True)
                with whole(own) as part:
                    files.get_file(f"{root}/{path}", str(part))
    yield place
    with _told(location, "written"):
        files.makedirs(root, exist_ok=True)
        there = _of(files, root)
        shards = sorted(place.glob("shard-*.safetensors"), key=number_of)
        for own in (*shards, place / MANIFEST):  # a folder without a manifest is not a cache yet
            if there.get(own.name) != own.stat().st_size:
                files.put_file(str(own), f"{root}/{own.name}")
    shutil.rmtree(place)


def _of(files: Any, root: str) -> dict[str, int]:
    """The names and sizes of the files of a remote cache."""
    found = [*files.glob(f"{root}/shard-*.safetensors"), *files.glob(f"{root}/{MANIFEST}")]
    return {path.rpartition("/")[2]: int(files.size(path)) for path in found}


@contextmanager
def _told(location: str, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as fault:  # of any library: no credentials, no network, no bucket
        raise UserError(
            f"{location} cannot be {what}: {first_line(fault)}",
            "check the URL, and the credentials of its protocol; then rerun the command",
        ) from fault
