"""Independent shares of a job, spread over the workers of a Ray cluster.

A worker is a process with one GPU of the cluster or, in a cluster without GPUs, with as many CPUs
as torch has threads. The share of a worker that dies, alone or with its machine, is done again by
another one. Workers compute as one machine does, so a share gives the same bits wherever the
hardware is the same.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from kdcore.components.optional_packages import optional_package
from kdcore.components.registry import installed
from kdcore.errors import UserError, first_line
from kdcore.runs.facts import shown_versions

Cluster: TypeAlias = Literal["ray"]
"""What can spread the work of a job."""
Share = TypeVar("Share")
Found = TypeVar("Found")

REPEATS = 3
"""How often a share whose worker died is done again."""
THREADS = "OMP_NUM_THREADS"


class UnfitMachine(UserError):
    """A machine of the cluster lacks what the others have, and would fail each share."""


@contextmanager
def connected(on: Cluster | None) -> Iterator[Any]:
    """Connect to a Ray cluster, unless this process is connected already.

    It is the one of ``RAY_ADDRESS``, else the one that runs on this machine, else a new one on this
    machine, which ends with the block. What is printed inside of it goes to stderr: Ray prints why
    a worker died, and stdout is for results.

    Args:
        on: ``"ray"``, or None to do nothing.

    Yields:
        The module of Ray.

    Raises:
        UserError: Ray is not installed, or the cluster does not answer.
    """
    ray = _installed_ray() if on else None
    if ray is None or ray.is_initialized():
        yield ray
        return
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as fault:
        raise UserError(
            f"no Ray cluster can be used: {first_line(fault)}",
            "check RAY_ADDRESS and `ray status`; without a cluster, unset RAY_ADDRESS to use this "
            "machine",
        ) from fault
    try:
        with redirect_stdout(sys.stderr):
            yield ray
    finally:
        ray.shutdown()


def spread(
    work: Callable[[Share], Found],
    shares: Sequence[Share],
    *,
    fresh: bool = False,
    seen: Path | None = None,
    died: Callable[[int, str], None] = lambda place, line: None,
) -> Iterator[tuple[int, Found | UserError]]:
    """Do the work of each share on some worker of the cluster; see `connected`.

    Args:
        work: A function that pickle can send; a worker keeps what it stores in itself.
        shares: The shares, which pickle can send.
        fresh: Whether each share gets a worker of its own, which ends with it.
        seen: A file of a folder that all machines must share.
        died: Called with the place of a share whose worker died, and a line about it, before
            another worker does the share again.

    Yields:
        The place of a share, and what came out: what ``work`` returned, or the UserError that it
        raised, or one that says that its worker died. The shares come in any order.

    Raises:
        UserError: Ray is not installed, no cluster answers, or it has no room for a worker.
        UnfitMachine: A machine has no folder of this name, or not this one, or other packages.
    """
    if not shares:
        return
    waiting = deque(enumerate(shares))
    running: dict[Any, tuple[int, Any]] = {}
    idle: list[Any] = []
    deaths: Counter[int] = Counter()
    needs = _Needs(os.getcwd(), _versions(), None if seen is None else (str(seen), _content(seen)))
    with connected("ray") as ray:
        workers, options = _room(ray.cluster_resources())
        kind, told = ray.remote(**options)(_Worker), ray.exceptions
        lost = (
            told.RayActorError,
            told.WorkerCrashedError,
            told.NodeDiedError,
            told.OutOfMemoryError,
            told.ObjectLostError,  # a machine died that had what a worker returned
        )
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    place, share = waiting.popleft()
                    worker = idle.pop() if idle else kind.remote(work, needs)
                    running[worker.carry_out.remote(share)] = place, worker
                while idle and not waiting:  # one that replaces a dead worker may wait for room
                    ray.kill(idle.pop())
                [done], _ = ray.wait(list(running))
                place, worker = running.pop(done)
                try:
                    found = ray.get(done)
                    idle.append(worker)
                except lost as fault:
                    ray.kill(worker)  # it may only be out of reach
                    deaths[place] += 1
                    if deaths[place] <= REPEATS:
                        died(place, "warning: its worker died, and another one does its work again")
                        waiting.appendleft((place, shares[place]))
                        continue
                    found = _died(fault)
                if isinstance(found, UnfitMachine):
                    raise found
                if fresh and idle:
                    ray.kill(idle.pop())
                yield place, found
        finally:
            for worker in (*idle, *(worker for _, worker in running.values())):
                ray.kill(worker)


@dataclass(frozen=True, slots=True)
class _Needs:
    """What a machine must have as the calling one has it.

    Attributes:
        folder: The working directory, from which relative paths count.
        versions: See `_versions`.
        seen: Path and content of a file of a shared folder; None if nothing is shared.
    """

    folder: str
    versions: Mapping[str, str]
    seen: tuple[str, bytes | None] | None = None

    def refuse_other_machine(self) -> None:
        """Raises UnfitMachine."""
        here = f"the machine {os.uname().nodename} of the cluster"
        if not os.path.isdir(self.folder):
            raise UnfitMachine(
                f"{here} lacks the folder {self.folder}",
                "run the command in a folder that exists on all machines",
            )
        if self.seen is not None and _content(Path(self.seen[0])) != self.seen[1]:
            raise UnfitMachine(
                f"{here} does not see the folder {Path(self.seen[0]).parent} of the calling one",
                "choose a run folder on a file system that all machines share",
            )
        own = _versions()
        for name, version in self.versions.items():
            if own.get(name) != version:
                has = f"has {name} {own[name]}" if name in own else f"lacks {name}"
                raise UnfitMachine(
                    f"{here} {has}, and the calling one has {version}",
                    f"install {name}=={version} there",
                )


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


class _Worker:
    """What runs in the process of a worker.

    Args:
        work: See `spread`.
        needs: What its machine must have.
    """

    def __init__(self, work: Callable[[Any], Any], needs: _Needs) -> None:
        self._work, self._needs = work, needs

    def carry_out(self, share: Any) -> Any:
        """Return what the work returns, or the UserError that it raises."""
        try:
            self._needs.refuse_other_machine()
            os.chdir(self._needs.folder)
            return self._work(share)
        except UserError as wrong:
            return wrong


def _versions() -> dict[str, str]:
    """The versions of kdcore, its main dependencies and its plugins, by distribution.

    Builds of a version count as equal: the calling machine may have torch for CPUs.
    """
    plugins = {each.distribution: each.version for each in installed().plugins}
    return {name: each.partition("+")[0] for name, each in (plugins | shown_versions()).items()}


def differs_here(what: str) -> UnfitMachine:
    """The error of a worker whose machine has other files than the calling one.

    Args:
        what: What differs, e.g. ``the teacher's files``.
    """
    return UnfitMachine(
        f"{what} differ on the machine {os.uname().nodename} of the cluster",
        "put them, or their copies, in a folder that all machines share",
    )


def _installed_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return optional_package("ray", "kdcore[ray]", "--on ray")


def _room(resources: dict[str, float]) -> tuple[int, dict[str, Any]]:
    """The number of workers that a cluster has room for, and what Ray gives each of them.

    Ray would give a worker one thread for each of its CPUs, whatever the calling process has, and
    another number of threads rounds differently.
    """
    if gpus := int(resources.get("GPU", 0)):
        return gpus, {"num_gpus": 1}
    threads = int(os.environ.get(THREADS) or 1)
    workers = int(resources.get("CPU", 0) // threads)
    if not workers:
        raise UserError(
            f"the cluster has {resources.get('CPU', 0):g} CPUs, and a worker needs {threads}",
            f"set {THREADS}, the threads of each worker, to a smaller number",
        )
    return workers, {"num_cpus": threads, "runtime_env": {"env_vars": {THREADS: str(threads)}}}


def _died(fault: Exception) -> UserError:
    if lacking := re.search("No module named '([^']+)'", str(fault)):
        return UserError(
            f"a machine of the cluster lacks the Python module {lacking[1]}",
            "install the same packages on all machines, kdcore and its plugins too",
        )
    return UserError(
        f"its worker died {REPEATS + 1} times: {first_line(fault)}",
        "look for the reason in Ray's logs (`ray logs`), e.g. too little memory",
    )
