"""vLLM's API server in a process of its own, started by the command that an export prints."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kdcore.models.loading.loaded import LoadedModel
from tests.engines.served import CONTEXT, Exported

MODULE = "vllm.entrypoints.openai.api_server"
LIMITS = f"--dtype float32 --enforce-eager --max-model-len {CONTEXT} --max-num-seqs 4"
"""What this machine needs beside the documented commands."""


@dataclass(frozen=True)
class ApiServer:
    """A server of a tiny target with a trained FastEagle.

    Attributes:
        address: Its address, without a path.
        model: The name of its model.
        target: The target.
        exported: The drafter.
    """

    address: str
    model: str
    target: LoadedModel
    exported: Exported

    @property
    def endpoint(self) -> dict[str, str]:
        """The server as a spec names it."""
        return {"endpoint": f"{self.address}/v1", "model": self.model}


@contextmanager
def serving(command: str, **settings: str) -> Iterator[str]:
    """The address of a server, once it answers; it may take as long as it needs to start.

    settings: environment variables of the server.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", MODULE]
    own = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **settings}
    server = subprocess.Popen(
        [sys.executable, *words[1:], "--host", "127.0.0.1", "--port", str(port)], env=own
    )
    address = f"http://127.0.0.1:{port}"
    try:
        while server.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        assert server.poll() is None, "the server ended"
        yield address
    finally:
        server.terminate()
        server.wait()
