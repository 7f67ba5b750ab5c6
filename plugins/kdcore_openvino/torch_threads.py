"""torch's threads between two passes of OpenVINO, which has threads of its own.

After an operation on several threads, those of OpenMP wait for the next one in a loop that takes
milliseconds, on the cores on which OpenVINO starts the next pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any


def one_thread() -> AbstractContextManager[None]:
    """A context in which torch runs the operations of this thread without others.

    `torch.set_num_threads` would also count for threads that start meanwhile.

    Returns:
        The context, which changes nothing if threadpoolctl is not installed.
    """
    openmp = _openmp()
    limited: AbstractContextManager[None] = openmp.limit(limits=1) if openmp else nullcontext()
    return limited


@cache
def _openmp() -> Any:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:  # an older installation of the extra
        return None
    return ThreadpoolController().select(user_api="openmp")
