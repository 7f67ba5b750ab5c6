"""Every command once, with models of no size: its exit code, and the device it ran on."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gpu_check.models import save_chat_model
from gpu_check.section import Section
from gpu_check.sizes import SIZES, Size
from kdcore.models.device import default_device
from kdcore_cli import main
from kdcore_cli.terminal import console

ROWS = ("data.train.limit=4", "data.heldout.limit=2", "data.responses.max_new_tokens=8")
DISTILL = ("teacher.model=model", "student.layers=[0, 2]", *ROWS, "training.steps=2")
DISTILL += ("data.responses.folder=responses",)  # the cache reads them too
DISTILL += ("evaluation.samples=1", "evaluation.sample_tokens=8")
DRAFTER = ("target.model=model", *ROWS, "training.steps=2", "drafter.depth=2")
DRAFTER += ("drafter.vocabulary=64",)
BENCH = ("target.model=model", "baselines=[generate]", "limit=2", "max_new_tokens=8")
BENCH += ("methods.trained={folder: runs/drafter/drafter, tree: chain}",)
EVALUATE = ("model.model=model", "heldout.path=answered.jsonl", "evaluation.samples=1")
EVALUATE += ("evaluation.sample_tokens=8",)


@dataclass(frozen=True, slots=True)
class Line:
    """A command line.

    Attributes:
        words: The words after ``kdcore``.
        sets: What ``--set`` changes in its spec.
        codes: The exit codes of a command that works.
    """

    words: str
    sets: tuple[str, ...] = ()
    codes: tuple[int, ...] = field(default=(0,))

    @property
    def all_words(self) -> list[str]:
        """The words with those of ``--set``."""
        return [*self.words.split(), *(word for each in self.sets for word in ("--set", each))]


LINES = {
    "init": Line("init distill.yaml"),
    "init of train-drafter": Line("init drafter.yaml --job train-drafter"),
    "init of bench": Line("init bench.yaml --job bench"),
    "init of evaluate": Line("init evaluate.yaml --job evaluate"),
    "check": Line("check distill.yaml", DISTILL),
    "distill": Line("distill distill.yaml", DISTILL),
    "train-drafter": Line("train-drafter drafter.yaml", DRAFTER),
    "generate": Line("generate model Hello --drafter runs/drafter/drafter --max-new-tokens 8"),
    "bench": Line("bench bench.yaml", BENCH),
    # 1: it found something, e.g. that two steps of training teach a drafter nothing
    "doctor": Line("doctor runs/drafter/drafter model --max-new-tokens 8", codes=(0, 1)),
    "evaluate": Line("evaluate evaluate.yaml", EVALUATE),
    "cache build": Line("cache build distill.yaml --out cache", DISTILL),
    "report": Line("report runs/first"),
}
NAMES = ("models", *LINES)


def measure(section: Section, size: Size) -> None:
    """Run the commands in a temporary folder; some read what earlier ones wrote.

    Args:
        section: The section for the entries of `NAMES`.
        size: Not used: the models are tiny.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        section.measure("models", _make_models)
        for name, line in LINES.items():
            section.measure(name, lambda line=line: _ran(line))


def _make_models() -> dict[str, Any]:
    shape = SIZES["tiny"].teacher
    save_chat_model(Path("model"), shape)
    rows = [{"prompt": f"What is {n} + 1?", "response": f"It is {n + 1}."} for n in range(2)]
    Path("answered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": shape}


def _ran(line: Line) -> dict[str, Any]:
    """Run a command line in this process.

    Returns:
        Its exit code, the device that it names in its output (null if it names none), the memory
        that it had allocated there at most (null on a CPU), its seconds; and its last lines as the
        error if the exit code is unexpected.
    """
    cuda = default_device().type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    console.out.cache_clear()  # they hold the streams of the command before
    console.err.cache_clear()
    output = io.StringIO()
    began = time.perf_counter()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main.run(line.all_words)
    seconds = time.perf_counter() - began
    text = output.getvalue()
    named = re.search(r"\bdevice: (\S+)", text)
    return {
        "exit_code": code,
        "device": named[1] if named else None,
        "peak_bytes": torch.cuda.max_memory_allocated() - before if cuda else None,
        "seconds": seconds,
        **({} if code in line.codes else {"error": " / ".join(text.strip().splitlines()[-6:])}),
    }
