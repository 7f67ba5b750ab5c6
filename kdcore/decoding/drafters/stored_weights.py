"""A drafter takes weights from a file, and says which ones are not its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kdcore.errors import first_line
from kdcore.models.folder.shapes import unlike
from kdcore.models.loading.loaded import LoadedModel, first_few


def take_weights(
    drafter: Any,
    own: Mapping[str, Tensor],
    target: LoadedModel,
    params: Mapping[str, Any],
    *,
    assign: bool = False,
) -> None:
    """Load weights into a drafter.

    Args:
        drafter: The drafter, bound to the target.
        own: The stored weights.
        target: The target.
        params: Params of the drafter as plain data, whose sizes the message compares.
        assign: Whether the drafter gets the tensors themselves, and not their values.

    Raises:
        ValueError: A weight is missing, unknown, of another shape or kind of dtype, or the
            vocabulary exceeds that of the target.
    """
    made = drafter.state_dict()
    for name in made.keys() & own.keys():
        if own[name].is_floating_point() != made[name].is_floating_point():
            raise ValueError(f"{name} has dtype {own[name].dtype}, not {made[name].dtype}")
    known = own.get("vocabulary")
    if known is not None and known.numel() and not 0 <= known.min() <= known.max() < target.classes:
        raise ValueError(f"its vocabulary exceeds the {target.classes} tokens of {target.name}")
    try:
        drafter.load_state_dict(own, assign=assign)
    except RuntimeError as fault:
        raise ValueError(_difference(own, made, params) or first_line(fault)) from fault


def _difference(
    own: Mapping[str, Tensor], made: Mapping[str, Tensor], params: Mapping[str, Any]
) -> str | None:
    """Why the weights are not the drafter's, in the words of its config."""
    missing, further = (sorted(a.keys() - b.keys()) for a, b in ((made, own), (own, made)))
    if missing:
        return f"config.json makes {first_few(missing)}, which the file lacks"
    if further:
        return f"the file has {first_few(further)}, which config.json does not make"
    return unlike(_shapes(own), _shapes(made), params)


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    return {name: each.shape for name, each in weights.items()}
