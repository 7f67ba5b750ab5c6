"""What makes the host wait for the device, by the line of this repository that asked for it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
HARNESS = str(Path(__file__).parent / "mock_device.py"), __file__
TORCH = str(Path(torch.__file__).parent)

aten = torch.ops.aten
SIZED_BY_VALUES = {
    aten.nonzero.default: "nonzero",
    aten.argwhere.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.bincount.default: "bincount",
}
"""Operations whose result has a size that the device alone knows."""
READ_BY_HOST = {
    aten._local_scalar_dense.default: "item",
    aten.is_nonzero.default: "item",
    aten.equal.default: "equal",
}
"""Operations whose result is a Python number."""


@dataclass(frozen=True, slots=True)
class Wait:
    """One wait of the host.

    what: the operation. where: ``folder/file.py:line`` of this repository. through: the line of
    another library that was called there and asked; None when this repository's own code did.
    """

    what: str
    where: str
    through: str | None = None

    def __str__(self) -> str:
        return f"{self.what:16} {self.where}" + (f" < {self.through}" if self.through else "")


@dataclass
class HostWaits:
    """Counts waits while it is on."""

    found: Counter[Wait] = field(default_factory=Counter)
    on: bool = True

    def note(self, what: str) -> None:
        """Count a wait that the code above in the stack asked for."""
        if self.on:
            self.found[Wait(what, *asking_line())] += 1

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, nothing counts."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    @property
    def ours(self) -> Counter[Wait]:
        """Those that this repository's code asked for itself."""
        return Counter({wait: n for wait, n in self.found.items() if wait.through is None})

    def table(self, per: int = 1) -> str:
        """A line for each wait, the most frequent first; ``per`` divides the counts."""
        return "\n".join(f"{n / per:8.2f}  {wait}" for wait, n in self.found.most_common())


def asking_line() -> tuple[str, str | None]:
    """The innermost line of this repository, and of a library between it and torch."""
    through: str | None = None
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file not in HARNESS and not file.startswith(TORCH):
            if "site-packages" in file:
                through = through or f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno}"
            elif file.startswith(str(ROOT)):
                return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}", through
        frame = frame.f_back  # type: ignore[assignment]
    return "?", through
