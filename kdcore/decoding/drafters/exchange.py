"""Import of published drafters, and export of drafters for other engines.

The drafter itself defines its layouts (`kdcore.decoding.drafters.layouts.ExchangedDrafter`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdcore.components.choice import Choice
from kdcore.components.registry import Registry, describe
from kdcore.decoding.drafters.files import (
    drafter_choice,
    load_drafter,
    save_drafter,
)
from kdcore.decoding.drafters.layouts import ExchangedDrafter, ImportedDrafter
from kdcore.decoding.drafters.stored_weights import take_weights
from kdcore.errors import UserError, first_line, nearest
from kdcore.models.assembly import Assembly
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.whole_files import new_folder, refuse_existing

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def export_drafter(
    folder: Path, layout: str, output: Path, target: LoadedModel, registry: Registry
) -> str:
    """Write a drafter in the layout of another engine.

    Args:
        folder: The folder of the drafter.
        layout: Name of the layout.
        output: The new folder.
        target: The target of the drafter.
        registry: The registry in which components are found.

    Returns:
        The shell command with which the engine serves the drafter.

    Raises:
        UserError: The drafter cannot be loaded, does not support the layout or cannot be expressed
            in it, or the output already exists.
    """
    refuse_existing(output)
    drafter = load_drafter(folder, target, registry)
    layouts = drafter.layouts if isinstance(drafter, ExchangedDrafter) else ()
    if layout not in layouts:
        raise UserError(
            f"the drafter in {folder} ({type(drafter).__name__}) does not support the layout "
            f"'{layout}'",
            nearest(layout, layouts)
            if layouts
            else "use it with kdcore: other engines do not run this kind of drafter",
        )
    assert isinstance(drafter, ExchangedDrafter)
    exported = drafter.exported(layout, target)
    plain = {name: each.detach().contiguous().cpu() for name, each in exported.weights.items()}
    with new_folder(output) as place:
        save_file(plain, place / WEIGHTS, metadata={"format": "pt"})
        (place / CONFIG).write_text(json.dumps(exported.config, indent=2) + "\n", "utf-8")
    return exported.command(output)


def import_drafter(
    folder: Path, output: Path, target: LoadedModel, registry: Registry
) -> tuple[Choice, tuple[str, ...]]:
    """Convert a published drafter to a drafter folder of kdcore.

    Args:
        folder: The published folder.
        output: The new folder.
        target: The target of the drafter.
        registry: The registry in which components are found.

    Returns:
        The component with its params, and notes for the user.

    Raises:
        UserError: The folder has an unknown layout, is pickled or damaged, does not fit the
            target, or needs features that the component lacks; or the output already exists.
    """
    refuse_existing(output)
    config, weights = _read(folder)
    faults: list[Exception] = []
    for name, kind in _exchanged(registry):
        try:
            found = kind.imported(config, weights, target)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as fault:
            faults.append(fault)  # the folder may fit another drafter
            continue
        if found is not None:
            return _written(folder, name, found, output, target, registry), found.notes
    if faults:
        raise UserError(
            f"{folder} does not describe a drafter: {describe(faults[0])}",
            "download the folder again",
        ) from faults[0]
    raise UserError(
        f"{folder / CONFIG} has a layout that the installed drafters do not recognise: its "
        f"architectures are {config.get('architectures')}",
        "use the folder of an EAGLE-3 drafter, as published for SGLang or vLLM",
    )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(
            f"{folder} does not contain a readable {CONFIG}",
            "use the folder of a published drafter",
        ) from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        raise UserError(
            f"{folder} does not contain a safetensors file"
            + (f", and {pickled[0]} is pickled, which can run code when read" if pickled else ""),
            "download a version with safetensors, or convert it if you trust its author",
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except (OSError, SafetensorError) as fault:
            raise UserError(f"{file} is damaged: {fault}", "download the folder again") from fault
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} is not a mapping", "download the folder again")
    return config, weights


def _exchanged(registry: Registry) -> Iterator[tuple[str, Any]]:
    """Name and class of the importable drafters that support published layouts."""
    for name in registry.names("drafter"):
        with suppress(UserError):
            made_by = registry.attribute(registry.component("drafter", name))
            if hasattr(made_by, "imported"):
                yield name, made_by


def _written(
    folder: Path,
    name: str,
    found: ImportedDrafter,
    output: Path,
    target: LoadedModel,
    registry: Registry,
) -> Choice:
    choice = drafter_choice(
        {"name": name, **found.params},
        registry,
        f"{folder / CONFIG} does not describe a valid '{name}'",
        "download the folder again",
    )
    drafter: Any = Assembly(registry).build(choice)
    drafter.bind(target.model, target.tokenizer)
    try:
        take_weights(drafter, found.state, target, choice.dump())
    except ValueError as fault:
        raise UserError(
            f"the weights in {folder} do not fit '{name}' for {target.name}: {first_line(fault)}",
            "use the target that the drafter was trained for",
        ) from fault
    for key, weight in drafter.state_dict().items():
        if not weight.isfinite().all():
            raise UserError(
                f"{key} of the drafter in {folder} contains NaN or infinite values",
                "download the folder again, or use another drafter",
            )
    with new_folder(output) as place:
        save_drafter(place, drafter, choice, target, registry)
    return choice
