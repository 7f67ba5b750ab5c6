"""Settings of vLLM, which reads them on import: one process, little memory, no network.

An engine that starts slowly, on a machine with other work, is not a failure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.engines.served import Served

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines would be bound to the same core
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ENGINE_READY_TIMEOUT_S": "3600",
    "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """`Served.start`, whose engines end with the test: a process has one at a time."""
    from tests.engines.served import Served  # imports vLLM, so after the settings

    running: list[Served] = []

    def start(*args: Any, **engine: Any) -> Served:
        running.append(Served.start(*args, **engine))
        return running[-1]

    yield start
    for served in running:
        served.stop()
