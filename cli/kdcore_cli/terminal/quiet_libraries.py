"""Verbosity of the libraries while kdcore shows its own progress."""

from __future__ import annotations

import logging
import os
import warnings

from kdcore_cli.terminal import console


def silence_warnings() -> None:
    """Hide what the libraries warn of, also those that are imported later."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.filterwarnings("ignore", module="(?!kdcore)")
    logging.disable(logging.WARNING)


def quieten(quiet: bool, verbose: bool) -> None:
    """Let transformers and the hub print errors only, and download bars in a terminal.

    Child processes show no bars.

    Args:
        quiet: Whether to hide the download bars too.
        verbose: Whether to leave the libraries as they are.
    """
    if verbose:
        return
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    import transformers.modeling_gguf_pytorch_utils as gguf
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    vars(gguf)["tqdm"] = transformers_logging.tqdm  # the one bar that asks nobody
    if not quiet and console.err().is_terminal:
        enable_progress_bars()
    else:
        disable_progress_bars()
