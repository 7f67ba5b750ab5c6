"""The inputs of a run beside its spec: a resumed run must read the same inputs.

A spec names models and files, whose content can change. run.json records each input by a digest of
the spec's fields and by a digest of its content. A run that has started to train refuses other
content; so does a cell of a comparison if a finished cell read other content for the same fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kdcore.errors import UserError
from kdcore.runs.facts import RunInput
from kdcore.runs.folder import CELLS, Run
from kdcore.runs.recognition import is_run
from kdcore.runs.results import FIRST_MEASUREMENT


class OtherInput(UserError):
    """An input changed since the run started."""


def settle(run: Run, what: str, asked: Any, digest: str, *, begun: bool | None = None) -> None:
    """Record an input of a run.

    Args:
        run: The run.
        what: The input's name in messages and in run.json.
        asked: The spec's fields that describe the input, as plain data.
        digest: The digest of the input's present content.
        begun: Whether the run already used the recorded input (default: whether it has started to
            train).

    Raises:
        OtherInput: The run, or a finished cell of the same comparison, read other content.
    """
    words = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    found = RunInput(words, digest)
    known = run.facts.inputs
    if run.path(FIRST_MEASUREMENT.name).exists() if begun is None else begun:
        _refuse_other(run.folder, what, found, known)
    for cell in _done_beside(run.folder):
        _refuse_other(cell.folder, what, found, cell.facts.inputs)
    run.update(inputs=known | {what: found})


def refuse_mixed(runs: Iterable[Run]) -> None:
    """Check that runs which are compared have read the same inputs.

    Args:
        runs: The runs, perhaps of several machines.

    Raises:
        OtherInput: Two of them read other content for the same fields of their specs.
    """
    known: dict[tuple[str, str], tuple[Path, str]] = {}
    for run in runs:
        for what, found in run.facts.inputs.items():
            first, digest = known.setdefault((what, found.asked), (run.folder, found.digest))
            if digest != found.digest:
                raise OtherInput(
                    f"{what} of {run.folder} differs from that of {first} (digests "
                    f"{found.digest[:12]} and {digest[:12]})",
                    "give both machines the same models and files, remove one of the two folders, "
                    "then rerun with resume=True",
                )


def _refuse_other(folder: Path, what: str, found: RunInput, inputs: dict[str, RunInput]) -> None:
    known = inputs.get(what, found)
    if known.asked == found.asked and known.digest != found.digest:
        raise OtherInput(
            f"{what} changed since {folder} started (digest {known.digest[:12]} then, "
            f"{found.digest[:12]} now)",
            "restore the original, start again with overwrite=True, or choose another run folder "
            "with run=FOLDER",
        )


def _done_beside(folder: Path) -> Iterator[Run]:
    """Yield the finished cells of the comparison that contains a run."""
    outer = next((parent.parent for parent in folder.parents if parent.name == CELLS), None)
    if outer is None or not is_run(outer):
        return
    for path in sorted((outer / CELLS).rglob("run.json")):
        cell = Run(path.parent)
        if cell.folder != folder and cell.finished:
            yield cell
