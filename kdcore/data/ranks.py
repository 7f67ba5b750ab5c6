"""The processes of a run, which share work and read files that they all see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from kdcore.errors import UserError

Found = TypeVar("Found")
Item = TypeVar("Item")


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
            UserError: The work raised it in the main process; every process raises it then.
        """
        if self._place is None:
            return work()
        told: list[Any] = [None, None]
        if self.number == 0:
            try:
                told[0] = work()
            except UserError as wrong:
                told[1] = wrong.cause, wrong.cure
        found, wrong_of_main = broadcast_object_list(told)
        if wrong_of_main is not None:
            raise UserError(*wrong_of_main)
        return found  # type: ignore[no-any-return]

    def total(self, count: int) -> int:
        """Wait for every process, and sum a number over them."""
        return count if self._place is None else sum(gather_object([count]))

    def gathered(self, items: Sequence[Item]) -> list[Item]:
        """Wait for every process, and join their lists."""
        return list(items if self._place is None else gather_object([*items]))


ALONE = Ranks()
