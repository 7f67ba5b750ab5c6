"""Copies of a model for other uses: in full with adapters merged, or with quantised weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kdcore.errors import UserError, nearest
from kdcore.models.facts import dtype_name
from kdcore.models.folder.config import classifies, read_config
from kdcore.models.folder.files import model_folder
from kdcore.models.loading.load import load_model
from kdcore.runs.whole_files import new_folder, refuse_existing
from kdcore.specs.parts.fields import ModelSpec

FULL = "transformers"
"""The format of plain weights: what `save_pretrained` writes of an unquantised model."""

_INT8 = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}

FORMATS: Mapping[str, dict[str, Any] | None] = {
    FULL: None,
    "torchao-int8": {"quant_method": "torchao", "quant_type": {"default": _INT8}},
    "bitsandbytes-nf4": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    },
}
"""Format -> the quantization_config of transformers, or None for weights in full."""
CARD = "README.md"


def export_model(spec: ModelSpec, layout: str, output: Path) -> tuple[int, int]:
    """Write a copy of a model as a folder that transformers loads, as safetensors.

    The copy is loaded again, and its logits are compared with those of the model that was saved.

    Args:
        spec: The model; its adapter, if any, is merged into the weights.
        layout: A name of `FORMATS`.
        output: The new folder.

    Returns:
        The bytes of the original weights in memory, and of the copy's files.

    Raises:
        UserError: The format is unknown, the model cannot be loaded or quantised, the output
            already exists, or transformers reads other numbers from the copy.
    """
    if layout not in FORMATS:
        raise UserError(f"unknown format '{layout}'", nearest(layout, FORMATS))
    refuse_existing(output)
    folder = model_folder(spec)
    classifier = classifies(read_config(folder, spec))
    kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    size = load_model(spec, kind=kind, weights=False).weight_bytes
    quantised = spec.model_copy(update={"quantization": FORMATS[layout]})
    loaded = load_model(quantised if FORMATS[layout] else spec, kind=kind)
    with new_folder(output) as place:
        loaded.model.save_pretrained(place)
        loaded.tokenizer.save_pretrained(place)
        _write_card(folder, place, spec, layout)
        written_as = {"model": str(place), "dtype": dtype_name(loaded.model)}
        copy = load_model(ModelSpec.model_validate(written_as), kind=kind)
        _refuse_other_logits(loaded.model, copy.model, layout)
        written = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    return size, written


@torch.no_grad()
def _refuse_other_logits(model: Any, copy: Any, layout: str) -> None:
    """Raises UserError unless both models compute the same logits."""
    classes = model.config.get_text_config().vocab_size
    ids = (torch.arange(8, device=model.device) * 997 % classes)[None]
    ours, theirs = (each.eval()(input_ids=ids).logits.float().cpu() for each in (model, copy))
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(ours.abs().max())):
        raise UserError(
            f"transformers reads weights from the {layout} copy of {type(model).__name__} that "
            "differ from the saved ones",
            f"set --format to one of {', '.join(each for each in FORMATS if each != layout)}",
        )


def _write_card(folder: Path, place: Path, spec: ModelSpec, layout: str) -> None:
    """Copy the model card, and say in it what the copy is: its figures are the original's."""
    card = folder / CARD
    text = card.read_text("utf-8") if card.is_file() else "---\nlibrary_name: transformers\n---\n"
    made = FORMATS[layout]
    what = f"quantised as {layout} ({json.dumps(made)})" if made else "in full"
    merged = f", with the adapter {spec.adapter} merged" if spec.adapter else ""
    (place / CARD).write_text(
        f"{text.rstrip()}\n\n## This copy\n\nA copy of {spec.model}{merged}, {what}. Figures above "
        "are those of the original.\n",
        "utf-8",
    )
