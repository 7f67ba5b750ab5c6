"""The files of a trained student: a plain transformers model, and its adapter beside it."""

from __future__ import annotations

from typing import Any

from kdcore.models.folder.image_processor import write_image_processor
from kdcore.models.loading.adapters import merged, merged_with
from kdcore.runs.folder import Run


def save_student(run: Run, model: Any, weights: Any, tokenizer: Any, images: Any = None) -> Any:
    """Save a student in ``model/`` of its run, and what LoRA trained in ``adapter/``.

    Every process calls it; the main process writes.

    Args:
        run: The run.
        model: The student, with its adapters.
        weights: The weights of a sharded student, parameter -> tensor; None for another one.
        tokenizer: The tokenizer of the rows: the teacher's has their chat template, and the same
            ids.
        images: The image processor of the rows, or None.

    Returns:
        The student as it was saved: merged, but not if it is sharded.
    """
    adapted = hasattr(model, "merge_and_unload")
    if adapted and run.writes:
        model.save_pretrained(run.path("adapter"), state_dict=weights)
    if adapted and weights is None:
        model = merged(model)
    if run.writes:
        whole = merged_with(model, weights) if adapted and weights else model
        whole.save_pretrained(run.path("model"), state_dict=None if adapted else weights)
        tokenizer.save_pretrained(run.path("model"))
        if images is not None:
            write_image_processor(run.path("model"), images)
    return model
