"""Two processes of a training, forked from one that has imported what they need.

What `torch.distributed.run` would import in each of them, and itself, takes longer than they do.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOADED = ["kdcore.jobs.distill", "kdcore.jobs.train_drafter", "kdcore_cli.main"]
"""What the server imports, if nobody has begun it before."""


def in_two_processes(folder: Path, work: Callable[..., Any], *given: Any) -> list[str]:
    """What each said, to both streams, when both ended well."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    said = [folder / f"said-{rank}" for rank in range(2)]
    begun: list[Any] = [
        processes.Process(target=_rank, args=(rank, port, str(said[rank]), work, given))
        for rank in range(2)
    ]
    for each in begun:
        each.start()
    for each in begun:
        each.join(300)
        if each.is_alive():
            each.kill()
    texts = [each.read_text() for each in said]
    assert [each.exitcode for each in begun] == [0, 0], "\n".join(texts)[-3000:]
    return texts


def _rank(rank: int, port: int, said: str, work: Callable[..., Any], given: Any) -> None:
    """Do it as one of two, told so as a launcher tells."""
    where = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(where, stream)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    try:
        work(*given)
    except BaseException:
        traceback.print_exc()
        raise
