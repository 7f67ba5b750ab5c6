"""The checkpoints in a run folder."""

from __future__ import annotations

import json
from pathlib import Path


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
