"""Folders of hidden states that cells share: each holds those of one target and of some layers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from kdcore.components.registry import Registry
from kdcore.data.caches.hidden_states import Origin
from kdcore.decoding.build import refuse_untrainable
from kdcore.errors import UserError
from kdcore.jobs.comparison.cell_fields import in_comparison
from kdcore.jobs.resolution.resolved_drafter import origin_of
from kdcore.models.assembly import Assembly
from kdcore.models.folder.weights import are_here
from kdcore.models.loading.load import digest_of, load_model
from kdcore.specs.compare import CompareSpec
from kdcore.specs.train_drafter import TrainDrafterSpec

_At: TypeAlias = tuple[str, int, TrainDrafterSpec]
"""An arm, the index of one of its points, and the spec there."""


def refuse_other_states(spec: CompareSpec, registry: Registry) -> None:
    """Check, before a cell is trained, that cells which share a folder store the same states.

    Only models whose specs differ are loaded, without weights. A spec that cannot be resolved is
    left to its cell, which fails alone.

    Args:
        spec: The compare spec.
        registry: The installed components.

    Raises:
        UserError: Two arms, or two points of one arm, would write different states to one folder.
    """
    if not isinstance(spec.base, TrainDrafterSpec):
        return
    sharing: dict[Path, dict[str, _At]] = {}
    for arm in spec.arms:
        for point in range(len(spec.points_of(arm))):
            asked: TrainDrafterSpec = spec.at_point(arm, point)
            states = asked.data.hidden_states
            if states is not None and states.folder is not None:
                decides: dict[str, Any] = asked.model_dump(mode="json")
                key = json.dumps([decides["target"], decides["drafter"], states.dtype])
                sharing.setdefault(states.folder.resolve(), {}).setdefault(key, (arm, point, asked))
    for folder, cells in sharing.items():
        if len(cells) > 1:
            _refuse_difference(folder, [*cells.values()], spec, registry)


def _refuse_difference(
    folder: Path, cells: list[_At], spec: CompareSpec, registry: Registry
) -> None:
    first: tuple[str, Origin] | None = None
    for arm, point, asked in cells:
        try:
            origin = _origin(asked, registry)
        except Exception:  # a target or a drafter that fails, which the cell tells
            continue
        whose, known = first = first or (arm, origin)
        other = origin.differences(asdict(known))
        if not other:
            continue
        both = f"two points of arm '{arm}'" if arm == whose else f"arms '{whose}' and '{arm}'"
        named = f"a different {' and '.join(other)}"
        if "layers" in other:
            named = f"different layers ({list(known.layers)} and {list(origin.layers)})"
        wrong = UserError(
            f"{both} store hidden states of {named} in {folder}",
            "remove folder from data.hidden_states, so that each run has one of its own, or set "
            "another folder for each",
            "data.hidden_states.folder",
        )
        raise in_comparison(wrong, spec, arm, point)


def _origin(asked: TrainDrafterSpec, registry: Registry) -> Origin:
    """What a spec would store; targets whose weights are not here yet are not compared."""
    assembly = Assembly(registry)
    refuse_untrainable(asked.drafter, assembly)
    target = load_model(asked.target, weights=False)
    with torch.device("meta"):
        drafter: Any = assembly.build(asked.drafter)
        drafter.bind(target.model, target.tokenizer)
    assert asked.data.hidden_states is not None
    origin = origin_of(asked.data.hidden_states, drafter, target)
    return replace(origin, target=digest_of(asked.target) if are_here(asked.target) else "")
