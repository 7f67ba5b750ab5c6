"""Whether a folder holds a run, the mistake that it does not, and its newest whole checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from kdcore.errors import UserError, nearest


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of kdcore: other programs write a run.json as well."""
    try:
        return bool(json.loads((folder / "run.json").read_text("utf-8"))["versions"]["kdcore"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def is_damaged(folder: Path) -> bool:
    """Whether a folder holds the files of a run, whose run.json cannot be read."""
    written = (folder / "run.json").exists() and (folder / "spec.yaml").exists()
    return written and not is_run(folder)


def refuse_no_run(folder: Path) -> None:
    """Check that a folder holds a run.

    Args:
        folder: The folder.

    Raises:
        UserError: The folder does not exist or holds no run, or its run.json is damaged. The cure
            names the runs around it.
    """
    if is_run(folder):
        return
    if is_damaged(folder):
        raise UserError(
            f"{folder / 'run.json'} is damaged",
            "restore that file, or delete the folder and run its spec again",
        )
    inside, beside = (
        [str(path) for path in place.glob("*") if is_run(path)] for place in (folder, folder.parent)
    )
    outer = next(filter(is_run, folder.parents), None)
    if inside:
        cure = f"name a run inside it; {nearest(str(folder), inside)}"
    elif beside:
        cure = f"name the folder of a run; {nearest(str(folder), beside)}"
    else:
        cure = f"name the folder of a run, e.g. {outer or 'runs/distill'}"
    wrong = "is not a run folder" if folder.exists() else "does not exist"
    raise UserError(f"{folder} {wrong}", cure)


def newest_checkpoint(folder: Path) -> Path | None:
    """Find the complete checkpoint of the latest step.

    Args:
        folder: The run folder.

    Returns:
        The folder of the checkpoint, or None.
    """
    found = [
        path
        for path in folder.glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdecimal() and _is_whole(path)
    ]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's last file exists and is complete."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True
