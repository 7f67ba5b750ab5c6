"""torch's threads between two passes of OpenVINO, which has threads of its own.

After an operation on several threads, those of OpenMP wait for the next one in a loop that takes
milliseconds, on the cores on which OpenVINO starts the next pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from kdcore.components.optional_packages import optional_package


def one_thread() -> AbstractContextManager[None]:
    """A context in which torch runs the operations of this thread without others.

    `torch.set_num_threads` would also count for threads that start meanwhile.

    Returns:
        The context.

    Raises:
        UserError: threadpoolctl is not installed.
    """
    limited: AbstractContextManager[None] = _openmp().limit(limits=1)
    return limited


@cache
def _openmp() -> Any:
    package = optional_package(
        "threadpoolctl", "kdcore[openvino]", "the engine openvino", instead="use the engine torch"
    )
    return package.ThreadpoolController().select(user_api="openmp")
