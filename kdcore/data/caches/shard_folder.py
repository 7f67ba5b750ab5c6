"""The shards of a folder, local or remote: an index of all, and few of them open at a time.

A system limits the maps of a process (Linux: vm.max_map_count, 65,530). So a shard is mapped when
it is read, and the one that was read longest ago is closed. The keys of all shards are read at the
start, without a map.

A remote folder is one that fsspec opens, e.g. ``s3://bucket/cache``. A shard of it is copied into
kdcore's cache folder when it is first read. A new one is written here and then put there: an object
store neither renames files nor appends to them. No lock protects it from other machines, so the
name of a shard there also says which rows it has: two writers that count alike have two files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import fsspec
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from kdcore.errors import UserError, first_line
from kdcore.models.folder.kept_files import cache_folder, held_folder
from kdcore.runs.whole_files import whole

Location: TypeAlias = Path | str
"""A local folder, or the URL of a remote one."""

MANIFEST = "manifest.json"
"""The file that states the origin of the shards."""
SHARD_BYTES = 2**28
"""The size at which a shard ends, after a whole row: its writer has it in memory."""
COPIES = "shards"
"""The kind of the copies of remote shards, see `kdcore.models.folder.kept_files`."""
MOST_OPEN = 1024
"""Number of shards that a process keeps open."""
_SHARD = re.compile(r"/shard-\d+(-[0-9a-f]+)?\.safetensors$")
_HEADER, _LONGEST = 4096, 2**24
"""Bytes of a shard that hold its header, and at most hold it."""


class Damaged(Exception):
    """A shard cannot be read.

    Attributes:
        path: The shard.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class ShardFolder:
    """The complete shards of a folder.

    Args:
        location: The folder.
        framework: The ``framework`` of `safetensors.safe_open`.
        most_open: Number of shards that are open at a time (default: `MOST_OPEN`).

    Raises:
        UserError: fsspec cannot open the folder.
    """

    def __init__(self, location: Location, framework: str, most_open: int | None = None) -> None:
        self.location, self._framework = location, framework
        self._most_open = MOST_OPEN if most_open is None else most_open
        self._files, _ = opened(location)
        found = _sizes_of_shards(location)
        self.paths = sorted(found, key=lambda path: (number_of(path), path))
        self._sizes = [found[path] for path in self.paths]
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Any:
        """Open a shard, and close the one that was read longest ago.

        Raises `Damaged`.
        """
        if number in self._open:
            self._open.move_to_end(number)
        else:
            try:
                shard = safe_open(self._local(self.paths[number]), framework=self._framework)
            except (SafetensorError, OSError) as fault:
                raise Damaged(self.paths[number]) from fault
            self._open[number] = shard
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        return self._open[number]

    @property
    def size(self) -> int:
        """The size of the shards in bytes."""
        return sum(self._sizes)

    def keyed(self) -> list[tuple[NDArray[np.uint8], NDArray[np.int32]]]:
        """Read the keys [R, 16] and the counts [R] of the rows of each shard.

        Raises `Damaged`.
        """
        begun = self._ranges([0] * len(self), [min(_HEADER, size) for size in self._sizes])
        found = [self._places(n, each) for n, each in enumerate(begun)]
        arrays = []
        for which in (0, 1):
            starts, ends = ([each[which][side] for each in found] for side in (0, 1))
            arrays.append(self._ranges(starts, ends))
        keyed = []
        for number, (keys, counts) in enumerate(zip(*arrays, strict=True)):
            if len(keys) != 4 * len(counts):  # 16 bytes and 4 bytes of a row
                raise Damaged(self.paths[number])
            rows = np.frombuffer(keys, np.uint8).reshape(-1, 16)
            keyed.append((rows, np.frombuffer(counts, np.int32)))
        return keyed

    def _ranges(self, starts: list[int], ends: list[int]) -> list[bytes]:
        """Read a range of bytes of each shard."""
        for path, size, end in zip(self.paths, self._sizes, ends, strict=True):
            if not 0 < end <= size:
                raise Damaged(path)
        with _told(self.location, "read"):
            read = self._files.cat_ranges(self.paths, starts, ends, on_error="raise")
        wanted = zip(read, starts, ends, strict=True)
        # a web server that does not know ranges sends the whole file
        return [
            each if len(each) <= end - start else each[start:end] for each, start, end in wanted
        ]

    def _places(self, number: int, begun: bytes) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where the keys and the counts of a shard begin and end, by its header."""
        start = 8 + int.from_bytes(begun[:8], "little")
        try:
            if len(begun) < start <= _LONGEST:
                begun = self._files.cat_file(self.paths[number], 0, start)
            tensors = json.loads(begun[8:start])
            keys, counts = (tensors[name]["data_offsets"] for name in ("keys", "counts"))
            sizes = tensors["keys"]["shape"], tensors["counts"]["shape"]
            if sizes[0] != [*sizes[1], 16] or tensors["counts"]["dtype"] != "I32":
                raise ValueError(f"keys of the shape {sizes[0]}")
            return (start + keys[0], start + keys[1]), (start + counts[0], start + counts[1])
        except (ValueError, KeyError, TypeError) as fault:
            raise Damaged(self.paths[number]) from fault

    @cached_property
    def _copies(self) -> Path:
        """The folder of the copies, which is not removed while this object is there."""
        url = str(self.location).rstrip("/")
        named = re.sub(r"[^\w.-]", "-", PurePosixPath(urlsplit(url).path).name)[:40]
        digest = hashlib.sha256(url.encode()).hexdigest()[:16]
        folder = cache_folder() / COPIES / f"{named}-{digest}"
        weakref.finalize(self, os.close, held_folder(folder))
        return folder

    def _local(self, path: str) -> str:
        """The path on this machine of a shard, which is copied there first if it is remote."""
        if isinstance(self.location, Path):
            return path
        same = hashlib.sha256(f"{path} {self._files.ukey(path)}".encode())
        copy = self._copies / f"{same.hexdigest()[:32]}.safetensors"
        if not copy.exists():
            lock, told = FileLock(copy.with_suffix(".lock")), _told(self.location, "read")
            with lock, whole(copy) as place, told:
                self._files.get_file(path, str(place))
        return str(copy)


def number_of(path: str | Path) -> int:
    """The number in the name of a shard."""
    return int(Path(path).stem.split("-")[1])


def opened(location: Location) -> tuple[Any, str]:
    """Open a folder with fsspec.

    Args:
        location: The folder.

    Returns:
        The file system, and the folder's path there.

    Raises:
        UserError: The protocol of the URL is unknown, or its package is not installed.
    """
    if isinstance(location, Path):
        return fsspec.filesystem("file"), str(location)
    try:
        files, root = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError) as fault:
        raise UserError(
            f"{location} cannot be opened: {first_line(fault)}",
            "install the package of its protocol, e.g. pip install s3fs for s3://",
        ) from fault
    return files, root.rstrip("/")


def text_of(location: Location, name: str) -> str | None:
    """Read a text file of a folder.

    Args:
        location: The folder.
        name: The name of the file.

    Returns:
        The text; None if there is no such file.

    Raises:
        UserError: The folder cannot be read.
    """
    files, root = opened(location)
    with _told(location, "read"):
        try:
            return str(files.cat_file(f"{root}/{name}").decode("utf-8"))
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            return ""


def names_in(location: Location) -> set[str]:
    """List the names of what is in a folder, which need not exist.

    Args:
        location: The folder.

    Returns:
        The names.

    Raises:
        UserError: The folder cannot be read.
    """
    return {path.rpartition("/")[2] for path in _listed(location)}


def created(location: Location) -> None:
    """Create a folder, if the file system has any.

    Args:
        location: The folder, which may exist.

    Raises:
        UserError: A remote folder cannot be created.
    """
    files, root = opened(location)
    with _told(location, "written"):
        files.makedirs(root, exist_ok=True)


@contextmanager
def new_file(location: Location, name: str) -> Iterator[Path]:
    """Provide a local path to write to, which becomes a file of a folder when the block succeeds.

    Args:
        location: The folder.
        name: The name of the file there.

    Yields:
        The path.

    Raises:
        UserError: A remote folder cannot be written.
    """
    if isinstance(location, Path):
        with whole(location / name) as place:
            yield place
        return
    with TemporaryDirectory() as here:
        yield (place := Path(here, name))
        files, root = opened(location)
        with _told(location, "written"):
            files.put_file(str(place), f"{root}/{name}")


def next_shard(location: Location) -> int:
    """The number after those of all shards of a folder."""
    return 1 + max(map(number_of, ShardFolder(location, "np").paths), default=-1)


def add_shard(
    location: Location, tensors: Any, save: Callable[[Any, Path], None], number: int | None = None
) -> None:
    """Write a shard.

    Args:
        location: The folder of the shards.
        tensors: Named tensors or arrays; ``keys`` [R, 16] are those of the rows.
        save: The ``save_file`` of safetensors for this kind of tensors.
        number: Number of the shard (default: the next one).

    Raises:
        UserError: A remote folder cannot be written.
    """
    number = next_shard(location) if number is None else number
    name = f"shard-{number:05d}"
    if not isinstance(location, Path):
        name += f"-{hashlib.sha256(bytes(tensors['keys'])).hexdigest()[:16]}"
    with new_file(location, f"{name}.safetensors") as place:
        save(tensors, place)


def _listed(location: Location) -> dict[str, int | None]:
    """The paths of what is in a folder, as it is now, and the sizes that the list gives.

    It is not a pattern that is matched: the folder's name may contain brackets.
    """
    files, root = opened(location)
    with _told(location, "read"):
        files.invalidate_cache(root)  # a file system may remember an earlier listing
        try:
            found = files.ls(root, detail=True)
        except FileNotFoundError:
            return {}
    sizes = {each["name"].rstrip("/"): each.get("size") for each in found}
    sizes.pop(root, None)  # an empty object that stands for the folder
    return sizes


def _sizes_of_shards(location: Location) -> dict[str, int]:
    """The paths and sizes of the shards."""
    found = {path: size for path, size in _listed(location).items() if _SHARD.search(path)}
    unknown = [path for path, size in found.items() if size is None]  # to the list of a web server
    with _told(location, "read"):
        found |= dict(zip(unknown, opened(location)[0].sizes(unknown), strict=True))
    return {path: int(size or 0) for path, size in found.items()}


@contextmanager
def _told(location: Location, what: str) -> Iterator[None]:
    """Raises UserError for what goes wrong with a remote folder."""
    try:
        yield
    except Exception as fault:  # of any library: no credentials, no network, no bucket
        if isinstance(location, Path):
            raise
        raise UserError(
            f"{location} cannot be {what}: {first_line(fault)}",
            "check the URL, and the credentials of its protocol; then rerun the command",
        ) from fault
