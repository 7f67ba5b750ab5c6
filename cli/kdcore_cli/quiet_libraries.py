"""How much the libraries beneath may say while our own progress is shown."""

from __future__ import annotations

import os

from kdcore_cli import console


def quieten(quiet: bool, verbose: bool) -> None:
    """Errors only, and in a terminal the bars of downloads; even these not where quiet.

    Processes that this one begins show no bars at all.
    """
    if verbose:
        return
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not quiet and console.err().is_terminal:
        enable_progress_bars()
    else:
        disable_progress_bars()
