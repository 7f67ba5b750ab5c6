"""A student of several processes, which one of them loads and all of them map from a file.

FSDP shards a student that each process has. Processes of a machine share the pages of a file that
they map, and the system drops pages that nobody reads, so no process holds the whole student.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from kdcore.models.loading.adapters import ties_its_ends, untie
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.whole_files import whole

FILE = "student-at-start.safetensors"
"""The file in the run folder."""
_RANDOMNESS = "randomness"


def mapped_student(
    file: Path, load: Callable[[], LoadedModel], outline: Callable[[], LoadedModel]
) -> LoadedModel:
    """Load a student in the main process, and map its weights in every process.

    The main process writes weights, buffers and the state of torch's generator to the file, which
    must stay until the student is sharded: see `forget`.

    Args:
        file: A file that all processes see.
        load: Loads the student whole.
        outline: Returns the student on the meta device, in the other processes.

    Returns:
        The student on the CPU, with the same weights in each process.
    """
    place = PartialState()
    loaded = load() if place.is_main_process else None
    if loaded is not None:
        _write(file, loaded)
    place.wait_for_everyone()
    student = loaded or outline()
    model: Any = student.model
    with safe_open(file, framework="pt") as stored:
        facts = json.loads(stored.metadata()["facts"])
        if ties_its_ends(model) and not facts["tied"]:  # an adapter that was merged untied them
            untie(model)
        _map(model, stored.get_tensor)
        torch.set_rng_state(stored.get_tensor(_RANDOMNESS).clone())
    if loaded is None and facts["generation"] is not None:
        model.generation_config = GenerationConfig.from_dict(facts["generation"])
    named = {name: facts[name] for name in ("name", "digest", "files", "bytes")}
    return replace(student, placed=True, **named)


def forget(file: Path) -> None:
    """Remove the file of `mapped_student` once every process has sharded the student.

    Args:
        file: The file, which need not exist.
    """
    place = PartialState()
    place.wait_for_everyone()
    if place.is_main_process:
        file.unlink(missing_ok=True)


def _write(file: Path, loaded: LoadedModel) -> None:
    model: Any = loaded.model
    kept = {name: each.detach().cpu().contiguous() for name, each in _tensors(model)}
    generation = getattr(model, "generation_config", None)
    facts = {name: getattr(loaded, name) for name in ("name", "digest", "files", "bytes")}
    facts["tied"] = ties_its_ends(model)
    facts["generation"] = None if generation is None else generation.to_dict()
    kept[_RANDOMNESS] = torch.get_rng_state()
    with whole(file) as place:
        save_file(kept, place, {"facts": json.dumps(facts)})


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield weights and buffers by name; of tied ones the first."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _map(model: nn.Module, stored: Callable[[str], Tensor]) -> None:
    """Replace weights and buffers by stored ones; tied ones stay tied."""
    found: dict[Tensor, Tensor] = {}
    for name, each in _tensors(model):
        tensor = stored(name)
        parameter = isinstance(each, nn.Parameter)
        found[each] = nn.Parameter(tensor, each.requires_grad) if parameter else tensor
    for module in model.modules():
        dictionaries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for own in dictionaries:
            own.update({name: found[each] for name, each in own.items() if each is not None})
