"""What the models of a spec say of their images, compared with what the sources make of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kdcore.data.source import DataSource
from kdcore.models.features import FeatureTap
from kdcore.models.fit.pair import TeacherAndStudent
from kdcore.models.folder.image_processor import FILE, differences, read_image_processor
from kdcore.models.matching.layers import refuse_other_positions
from kdcore.specs.distill import DistillSpec


def image_warnings(spec: DistillSpec, sources: Mapping[str, DataSource]) -> Iterator[str]:
    """Tell where a source makes other images than a model was trained on.

    Args:
        spec: The spec.
        sources: Field of ``data`` -> data source.

    Yields:
        A sentence for each source and model.
    """
    described = {
        name: fields
        for name, source in sources.items()
        if (fields := getattr(source, "image_processor", None)) is not None
    }
    if not described:
        return
    named = {"teacher": spec.local_teacher, **spec.local_teachers, "student": spec.student}
    for name, model in named.items():
        if model is None or model.model in ("teacher", "new"):
            continue
        theirs = read_image_processor(model)
        for field, ours in described.items() if theirs else ():
            if found := "; ".join(differences(theirs or {}, ours)):
                yield (
                    f"data.{field} makes other images than the {name}'s {FILE} says, which the "
                    f"{name} was trained on: set {found}"
                )


@torch.no_grad()
def refuse_other_patches(models: TeacherAndStudent, inputs: Mapping[str, Tensor]) -> None:
    """Check that student and teacher cut an image into as many positions, which matchers compare.

    Args:
        models: The models, on the meta device, where tensors have sizes only.
        inputs: Name -> input tensor of a row, without the batch dimension.

    Raises:
        UserError: They do not.
    """
    if "input_ids" in inputs:  # both read the same tokens
        return
    counts = []
    for model in (models.student.model, (models.teacher or models.student).model):
        with FeatureTap(model, (0,)).listening() as heard:
            model(**{name: tensor[None].to("meta") for name, tensor in inputs.items()})
        counts.append(heard[0].shape[1])
    refuse_other_positions("positions", *counts)
