"""The check for a GPU, on the CPU with models of no size."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fixtures.clean_environment import environment
from tests.fixtures.pages import ROOT

BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.py"


@pytest.fixture(scope="module", autouse=True)
def beside_the_benchmarks() -> Iterator[None]:
    """They import each other as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield


def part(name: str) -> Any:
    return importlib.import_module(f"gpu_check.{name}")


def section(folder: Path, names: tuple[str, ...], seconds: float = 100) -> Any:
    return part("section").Section(folder / "entries.json", names, seconds)


def measured(name: str, folder: Path) -> dict[str, Any]:
    """The entries of a part, as its file holds them."""
    module = part(name)
    module.measure(section(folder, module.NAMES), part("sizes").SIZES["tiny"])
    entries: dict[str, Any] = json.loads((folder / "entries.json").read_text())
    assert not part("section").has_error(entries), entries
    return entries


def test_the_machine_is_described(tmp_path: Path) -> None:
    found = measured("machine", tmp_path)
    assert found["device"]["type"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__
    assert found["precision"]["teacher_and_target"] == "float32"


def test_steps_are_compared_with_those_of_sft(tmp_path: Path) -> None:
    found = measured("training", tmp_path)
    for name in ("kd", "speckd", "deepkd"):
        ratio = found[name]["median_seconds"] / found["sft"]["median_seconds"]
        assert found[name]["time_over_sft"] == pytest.approx(ratio)
        assert found[name]["peak_bytes"] is found[name]["memory_over_sft"] is None
    assert len({found[name]["loss"] for name in ("sft", "kd", "speckd", "deepkd")}) == 4


def test_every_way_to_decode_gives_what_generate_gives(tmp_path: Path) -> None:
    with torch.compiler.set_stance("force_eager"):  # tests/plugins/test_compiled.py compiles
        found = measured("decoding", tmp_path)
    size = part("sizes").SIZES["tiny"]
    tokens = size.prompts * size.new_tokens
    assert found["transformers_generate"]["distinct_tokens"] > 4, "equality would say little"
    for name in part("decoding").DRAFTERS:
        assert found[name]["equals_generate"]
        assert found[name]["tokens"] == tokens
        assert found[name]["host_waits_per_round"] is None
    assert found["plain"]["rounds"] == tokens
    rounds_when_all_is_accepted = size.prompts * -(-size.new_tokens // (size.depth + 1))
    told = [name for name in part("decoding").DRAFTERS if "_told" in name]
    assert "fasteagle_told_drafter_compiled" in told
    for name in told:
        assert found[name]["rounds"] == rounds_when_all_is_accepted
        assert found[name]["draft_ms"] > 0 and found[name]["verify_ms"] > 0


def test_the_first_difference_has_its_tokens_and_their_margin() -> None:
    decoding, size = part("decoding"), part("sizes").SIZES["tiny"]
    target = part("models").random_llama(size.teacher, torch.device("cpu"), torch.float32)
    ways, asked = decoding.Ways(target, size), decoding.prompts(size)
    rows = [ways.decode("plain", asked)(torch.tensor([prompt]))[0] for prompt in asked]
    ways.reference = [rows[0], [*rows[1][:5], (rows[1][5] + 1) % 320, *rows[1][6:]]]
    compared = decoding.compared(ways, asked, rows)
    first = compared["first_difference"]
    assert not compared["equals_generate"]
    assert (first["prompt"], first["place"]) == (1, 5)
    assert first["token"], first["generate"] == (rows[1][5], ways.reference[1][5])
    assert first["margin"] < 0, "the greedy token has the larger logit"


def test_waits_of_the_host_are_counted_by_the_line_that_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch warns of each; here the warnings are made, as there is no CUDA."""
    modes: list[str] = []
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)
    waits = part("decoding").HostWaits(torch.device("cuda"))
    with waits:
        for _ in range(6):
            warnings.warn(f"{part('decoding').WAIT} (made here)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    found = waits.per(rounds=3)
    assert found["host_waits_per_round"] == 2
    [(line, count)] = found["host_waits_by_line"].items()
    assert line.startswith("repository/test_gpu_check.py:")
    assert count == 2


def test_an_entry_that_fails_leaves_the_others(tmp_path: Path) -> None:
    entries = section(tmp_path, ("bad", "good", "late"), seconds=1000)
    entries.measure("bad", lambda: [][0])
    entries.measure("good", lambda: {"found": [1]})
    found = json.loads((tmp_path / "entries.json").read_text())
    assert found["bad"]["error"] == "IndexError: list index out of range"
    assert found["good"] == {"found": [1]}
    assert found["late"] == "left out: no time"
    assert part("section").has_error(found)


def test_what_starts_too_late_is_left_out(tmp_path: Path) -> None:
    entries = section(tmp_path, ("first", "late"), seconds=0)
    entries.measure("late", lambda: pytest.fail("it ran"))
    assert entries.entries == dict.fromkeys(("first", "late"), "left out: no time")


def test_a_part_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    words = [sys.executable, SCRIPT, "--size", "tiny", "--seconds", "0.6", "--out", out]
    done = subprocess.run(words, capture_output=True, text=True)
    report = json.loads(out.read_text())
    assert done.returncode == 1
    assert report == json.loads(done.stdout)
    killed = {"error": "killed after 0 s: the time ended"}
    assert report["machine"] == report["training"] == killed, "each gets a share of the time"
    assert report["commands"] in (killed, "left out: no time")


def test_a_part_that_hangs_leaves_time_for_the_others() -> None:
    gpu, left, shares = importlib.import_module("gpu"), 480.0, []
    for place in range(len(gpu.PARTS)):
        shares.append(gpu.time_for([*gpu.PARTS][place:], left))
        left -= shares[-1]
    assert shares == [48, 144, 192, 96]
    assert gpu.time_for(["commands"], 480) == 480


def test_every_command_runs_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    run = environment(tmp_path, kdcore=False)
    run(
        "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('kdcore') is not None)"
    )
    report = json.loads(run(SCRIPT, "--size", "tiny", "--only", "commands"))
    commands = report["commands"]
    assert {"distill", "train-drafter", "bench", "doctor", "cache build"} < commands.keys()
    named = {name for name, found in commands.items() if found.get("device") == "cpu"}
    assert named == {"generate", "bench", "doctor", "evaluate"}
