"""What the models of a spec say of their images, compared with what the sources make of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kdcore.data.source import DataSource
from kdcore.models.folder.image_processor import FILE, differences, read_image_processor
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
