"""The processes of a run, which share work and read files that they all see."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from kdcore.errors import UserError, first_line
from kdcore.runs.whole_files import write_text

Found = TypeVar("Found")
Item = TypeVar("Item")
_LOST = re.compile(r"gloo/transport|NCCL|(closed|reset) by peer")
"""What the errors of a connection say that another process has closed."""


class Ranks:
    """The processes that a launcher started, or this one alone.

    Args:
        place: Accelerate's state of the processes; None for this process alone.
    """

    def __init__(self, place: PartialState | None = None) -> None:
        self._place = place if place is not None and place.num_processes > 1 else None

    @property
    def number(self) -> int:
        """The number of this process, from 0."""
        return 0 if self._place is None else int(self._place.process_index)

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self._place is None

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's items, of a list that is the same in every process."""
        return items if self._place is None else items[self.number :: self._place.num_processes]

    def by_main(self, work: Callable[[], Found]) -> Found:
        """Do work in the main process, while the others wait.

        Args:
            work: A function without arguments.

        Returns:
            What it returned in the main process, in every process.

        Raises:
            UserError: The work raised it in the main process; every process raises it then. If the
                work raised another exception, the others raise a UserError that quotes it.
        """
        if self._place is None:
            return work()
        told: list[Any] = [None, None]
        fault: Exception | None = None
        if self.number == 0:
            try:
                told[0] = work()
            except Exception as wrong:
                fault, told[1] = wrong, self._mistake_of(wrong)
        found, wrong_of_main = broadcast_object_list(told)
        if fault is not None:
            raise fault
        if wrong_of_main is not None:
            raise UserError(*wrong_of_main)
        return found  # type: ignore[no-any-return]

    @contextmanager
    def ending_together(self, file: Path) -> Iterator[None]:
        """Let every process end with the cause of the first one that fails in the block.

        A process that waits for one that has ended gets an error of the connection to it, and the
        cause from a file.

        Args:
            file: A file that all processes see, and that is not there yet.

        Raises:
            UserError: Another process failed or was killed.
        """
        try:
            yield
        except Exception as fault:
            if self._place is None:
                raise
            if not isinstance(fault, UserError):
                with suppress(OSError, ValueError):
                    raise UserError(*json.loads(file.read_text("utf-8"))) from fault
                if _LOST.search(str(fault)):
                    raise UserError(
                        "another process of this run was lost: it was killed, or took longer than "
                        "training.trainer.ddp_timeout",
                        "read the messages of the other processes, then rerun with --resume",
                    ) from fault
            with suppress(OSError):
                if not file.exists():
                    write_text(file, json.dumps(self._mistake_of(fault)))
            raise

    def _mistake_of(self, fault: Exception) -> tuple[str, str]:
        """The cause and the cure that other processes tell of a fault of this one."""
        if isinstance(fault, UserError):
            return fault.cause, fault.cure
        said = f"process {self.number} failed: {type(fault).__name__}: {first_line(fault)}"
        return said, f"read what process {self.number} said"

    def total(self, count: int) -> int:
        """Wait for every process, and sum a number over them."""
        return count if self._place is None else sum(gather_object([count]))

    def gathered(self, items: Sequence[Item]) -> list[Item]:
        """Wait for every process, and join their lists."""
        return list(items if self._place is None else gather_object([*items]))


ALONE = Ranks()
