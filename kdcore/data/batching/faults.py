"""Mistakes in the data that a worker of a loader finds, and that the training process raises.

A loader would raise a RuntimeError with a traceback in place of an exception of a worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcore.errors import UserError

_FAULT = "fault"


def fault(mistake: UserError) -> dict[str, Any]:
    """The batch that stands for one that cannot be read."""
    return {_FAULT: mistake}


def raise_fault(batch: Mapping[str, Any]) -> None:
    """Raise the mistake that a batch has in place of its rows, if it has one."""
    if _FAULT in batch:
        raise batch[_FAULT]
