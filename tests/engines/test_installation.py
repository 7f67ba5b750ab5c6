"""kdcore beside vLLM: no version changes, and the printed command serves as it stands."""

from __future__ import annotations

import json
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
from importlib.metadata import distribution, requires
from pathlib import Path

from packaging.requirements import Requirement

from tests.engines.served import PROMPTS, continued, drafter_in, target_in

ROOT = Path(__file__).parent.parent.parent
MODULE = "vllm.entrypoints.openai.api_server"


def test_every_requirement_of_kdcore_admits_the_engines_versions() -> None:
    """So pip, which keeps what satisfies a requirement, changes none of them."""
    texts = [each for each in requires("kdcore") or [] if "extra ==" not in each]
    assert len(texts) > 10
    for requirement in map(Requirement, texts):
        assert distribution(requirement.name).version in requirement.specifier, requirement


def test_an_installation_changes_no_version() -> None:
    """A dry run into the engine's own packages, without those that kdcore brings."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "install", "--dry-run", "--quiet", "--no-build-isolation", "--report", "-"]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=True)
    planned = {each["metadata"]["name"] for each in json.loads(done.stdout)["install"]}
    assert planned == {"kdcore"}


def test_the_printed_command_serves(tmp_path: Path) -> None:
    target = target_in(tmp_path / "a target")
    exported = drafter_in(tmp_path, target, "fasteagle", features=(1, 2, 3))
    # the documented command, with limits that this machine needs
    command = f"{exported.command} --dtype float32 --enforce-eager --max-model-len 128"
    with serving(command) as address:
        question = {
            "model": target.name,
            "prompt": PROMPTS[1],
            "max_tokens": 12,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = posted(f"{address}/v1/completions", question)
        assert answer["choices"][0]["token_ids"] == continued(target, PROMPTS[1], 12)
        with urllib.request.urlopen(f"{address}/metrics") as page:
            counts = page.read().decode()
    drafted = [line for line in counts.splitlines() if line.startswith("vllm:spec_decode_num_dra")]
    assert any(float(line.rsplit(" ", 1)[1]) > 0 for line in drafted)


@contextmanager
def serving(command: str) -> Iterator[str]:
    """The address of a server, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", MODULE]
    own = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
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


def posted(address: str, question: dict) -> dict:
    request = urllib.request.Request(
        address, json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)
