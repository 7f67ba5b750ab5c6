"""How much the libraries beneath may say."""

from __future__ import annotations

import os

from kdcore_cli import console


def quieten(*, verbose: bool = False, bars: bool = True) -> None:
    """To be called before transformers is imported: its remarks and bars would run through ours.

    bars: whether downloads may show theirs, in a terminal.
    """
    if verbose:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not (bars and console.err().is_terminal):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
