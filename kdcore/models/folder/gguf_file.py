"""A GGUF file as a folder that transformers loads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers

from kdcore.errors import UserError, first_line
from kdcore.models.transformers_versions import dequantized

FIRST = "5.23.0"
"""The version of transformers in the config of dequantised folders; see `_name_first_version`."""
_PATCHING = Lock()


def dequantise(file: Path, folder: Path) -> None:
    """Write the folder of a GGUF file: config, float32 weights and tokenizer.

    Args:
        file: The GGUF file.
        folder: An empty folder.

    Raises:
        UserError: The file is damaged, or transformers does not read its architecture.
    """
    with _parsed_once():
        model, tokenizer = _read(file)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _name_first_version(folder / "config.json")


def _read(file: Path) -> tuple[Any, Any]:
    """The model, which can be saved, and the tokenizer."""
    try:
        config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            dtype=torch.float32,
            **dequantized(),
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as fault:  # a damaged file makes the reader fail in many ways
        raise UserError(
            f"cannot read {file} as a GGUF model: {first_line(fault)}",
            "use an intact file of an architecture that transformers supports in GGUF",
        ) from fault
    # transformers refuses to save a model that it read from GGUF, so its weights move to a new
    # model of the same config
    with torch.device("meta"):
        model = type(packed)(config)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    return model, tokenizer


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse a file and name its tensors once.

    For most architectures transformers parses the file for the config, for the weights and for the
    tokenizer, which takes seconds each time, and makes the table of all names for each submodule.
    """
    import gguf  # few models need it

    with _PATCHING:
        reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
        vars(gguf).update(GGUFReader=cache(reader), get_tensor_name_map=cache(names))
        try:
            yield
        finally:
            vars(gguf).update(GGUFReader=reader, get_tensor_name_map=names)


def _name_first_version(config: Path) -> None:
    """Write `FIRST` as the transformers version in a config.json.

    The config is part of `weights_digest`, which identifies a drafter's target: with the real
    version, an upgrade of transformers would make the same file a different target.
    """
    said = config.read_text("utf-8")
    named = re.sub(r'("transformers_version": )"[^"]*"', rf'\1"{FIRST}"', said)
    config.write_text(named, "utf-8")
