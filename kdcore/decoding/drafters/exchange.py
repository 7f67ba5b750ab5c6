"""Drafters from elsewhere, and for elsewhere: a published folder becomes ours, ours another's.

What a layout holds is known to the drafter that has it
(`kdcore.method.protocols.ExchangedDrafter`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdcore.decoding.drafters.files import (
    drafter_choice,
    load_drafter,
    refuse_other_numbers,
    save_drafter,
)
from kdcore.errors import UserError, nearest
from kdcore.method.choice import Choice
from kdcore.method.protocols import ExchangedDrafter
from kdcore.method.registry import Registry, describe
from kdcore.models.assembly import Assembly
from kdcore.models.loaded import LoadedModel
from kdcore.runs.whole_files import whole_folder

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def export_drafter(
    folder: Path, layout: str, output: Path, target: LoadedModel, registry: Registry
) -> None:
    """Write a drafter's folder anew, as another engine reads it.

    Raises UserError as `load_drafter` does, when the drafter has no such layout, when the layout
    cannot say what the drafter is, and when the output is there already.
    """
    refuse_existing(output)
    drafter = load_drafter(folder, target, registry)
    layouts = drafter.layouts if isinstance(drafter, ExchangedDrafter) else ()
    if layout not in layouts:
        raise UserError(
            f"the drafter in {folder}, {type(drafter).__name__}, has no layout '{layout}'",
            nearest(layout, layouts)
            if layouts
            else "other engines do not run drafters of its kind",
        )
    assert isinstance(drafter, ExchangedDrafter)
    config, weights = drafter.exported(layout, target)
    plain = {name: each.detach().contiguous().cpu() for name, each in weights.items()}
    with _new_folder(output) as place:
        place.mkdir()
        save_file(plain, place / WEIGHTS, metadata={"format": "pt"})
        (place / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def import_drafter(folder: Path, output: Path, target: LoadedModel, registry: Registry) -> Choice:
    """Write the drafter in a published folder as one of ours, bound to its target.

    Raises UserError when the folder has no layout that is known, is pickled or damaged, does not
    fit the target, or holds what our drafter does not do; and when the output is there already.
    """
    refuse_existing(output)
    config, weights = _read(folder)
    faults: list[Exception] = []
    for name, kind in _exchanged(registry):
        try:
            found = kind.imported(config, weights, target)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as fault:
            faults.append(fault)  # the folder may be another drafter's
            continue
        if found is not None:
            params, state = found
            return _written(folder, {"name": name, **params}, state, output, target, registry)
    if faults:
        raise UserError(
            f"{folder} does not describe a drafter: {describe(faults[0])}", "fetch the folder again"
        ) from faults[0]
    raise UserError(
        f"{folder / CONFIG} is of no layout that an installed drafter knows: its architectures are "
        f"{config.get('architectures')}",
        "name the folder of an EAGLE-3 drafter, as published for SGLang or vLLM",
    )


def refuse_existing(output: Path) -> None:
    """Raises UserError when a folder holds anything already, or is a link to elsewhere."""
    if output.is_symlink():
        raise UserError(f"{output} is a symbolic link to {output.readlink()}", "name a new folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} already exists", "name a new folder")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(
            f"{folder} holds no readable {CONFIG}", "name the folder of a published drafter"
        ) from None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        raise UserError(
            f"{folder} holds no safetensors file"
            + (f", and {pickled[0]} is pickled, which can run code when read" if pickled else ""),
            "fetch a version with safetensors, or convert it where you trust its author",
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except (OSError, SafetensorError) as fault:
            raise UserError(f"{file} is damaged: {fault}", "fetch the folder again") from fault
    if not isinstance(config, dict):
        raise UserError(f"{folder / CONFIG} is no mapping", "fetch the folder again")
    return config, weights


def _exchanged(registry: Registry) -> Iterator[tuple[str, Any]]:
    """The drafters that know published layouts: name, class. What does not import knows none."""
    for name in registry.names("drafter"):
        with suppress(UserError):
            made_by = registry.attribute(registry.component("drafter", name))
            if hasattr(made_by, "imported"):
                yield name, made_by


def _written(
    folder: Path,
    given: Mapping[str, Any],
    state: Mapping[str, Tensor],
    output: Path,
    target: LoadedModel,
    registry: Registry,
) -> Choice:
    choice = drafter_choice(
        given,
        registry,
        f"{folder / CONFIG} describes no '{given['name']}'",
        "fetch the folder again",
    )
    drafter: Any = Assembly(registry).build(choice)
    drafter.bind(target.model, target.tokenizer)
    try:
        refuse_other_numbers(state, drafter, target)
        drafter.load_state_dict(state)
    except (RuntimeError, ValueError) as fault:
        why = " ".join(str(fault).split())
        raise UserError(
            f"the weights in {folder} are not those of '{given['name']}' for {target.name}: {why}",
            "name the target that it was trained for",
        ) from fault
    for name, weight in drafter.state_dict().items():
        if not weight.isfinite().all():
            raise UserError(
                f"{name} of the drafter in {folder} holds values that are no finite numbers",
                "fetch the folder again, or another drafter",
            )
    with _new_folder(output) as place:
        save_drafter(place, drafter, choice, target, registry)
    return choice


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """Where to make a folder that is whole or not there, so that a full disk leaves none."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        cure = "name a folder that you may write to"
        raise UserError(f"{output} cannot be written: {fault.strerror}", cure) from fault
    with whole_folder(output) as place:
        yield place
