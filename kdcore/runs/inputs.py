"""What a run reads beside its spec: a resumed run must find what the one begun found.

A spec says names; what goes by a name can change. Each thing read is recorded in run.json, by what
the spec says of it and by a digest of what was there. A run that has begun to train refuses another
digest; so does a cell of a comparison where a cell that is done read, by the same words,
something else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdcore.errors import UserError
from kdcore.runs.facts import RunInput
from kdcore.runs.folder import CELLS, Run, is_run
from kdcore.runs.results import FIRST_MEASUREMENT


class OtherInput(UserError):
    """Something that the spec names is no longer what the run began with."""


def settle(run: Run, what: str, asked: Any, digest: str, *, begun: bool | None = None) -> None:
    """Record something that a run reads.

    what: as messages call it. asked: plain data, all that the spec says of it. digest: of what is
    there now. begun: whether something came of what was read before; by default whether the run
    has begun to train.
    Raises OtherInput when the run has begun with another, or, of a cell of a comparison, a cell
    that is done has.
    """
    words = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    found = RunInput(words, digest)
    known = run.facts.inputs
    if run.path(FIRST_MEASUREMENT.name).exists() if begun is None else begun:
        _refuse_other(run.folder, what, found, known)
    for cell in _done_beside(run.folder):
        _refuse_other(cell.folder, what, found, cell.facts.inputs)
    run.update(inputs=known | {what: found})


def _refuse_other(folder: Path, what: str, found: RunInput, inputs: dict[str, RunInput]) -> None:
    known = inputs.get(what, found)
    if known.asked == found.asked and known.digest != found.digest:
        raise OtherInput(
            f"{what} changed since {folder} began ({known.digest[:12]} was read then, and now "
            f"{found.digest[:12]} is there)",
            "put back what was there, start again (overwrite=True), or choose another run folder "
            "(run=FOLDER)",
        )


def _done_beside(folder: Path) -> Iterator[Run]:
    """The finished cells of the comparison that a run is a cell of."""
    outer = next((parent.parent for parent in folder.parents if parent.name == CELLS), None)
    if outer is None or not is_run(outer):
        return
    for path in sorted((outer / CELLS).rglob("run.json")):
        cell = Run(path.parent)
        if cell.folder != folder and cell.finished:
            yield cell
