"""The state of a checkpoint beside the weights, in safetensors: named tensors, the rest as JSON.

The Trainer's own format is a pickle, which could run foreign code when a run is resumed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from kdcore.models.device import default_device
from kdcore.runs.whole_files import whole

_PLAIN = "plain"
_EMPTY = "empty"
"""Name of a placeholder: safetensors requires at least one tensor."""


def write(path: Path, tensors: Mapping[str, Tensor], plain: Any = None) -> None:
    """Write a file in one step, so that a kill never leaves half of it.

    Args:
        path: The file.
        tensors: Name -> tensor.
        plain: Further data that JSON can hold.
    """
    owned = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with whole(path) as place:
        save_file(owned or {_EMPTY: torch.zeros(1)}, place, metadata={_PLAIN: json.dumps(plain)})


def read(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read a file that `write` wrote.

    Args:
        path: The file.

    Returns:
        The tensors, on the CPU, and the plain data.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        plain = json.loads(file.metadata()[_PLAIN])
    tensors.pop(_EMPTY, None)
    return tensors, plain


def has_other_names(folder: Path, model: nn.Module) -> bool:
    """Whether the weights of a saved model have other names than in memory.

    transformers saves some models as they were published, e.g. each expert of a mixture alone, and
    joins or renames the weights when it loads them. Its Trainer does not.
    """
    stored: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored.update(file.keys())
    return not stored <= model.state_dict().keys()


def read_converted(folder: Path, model: PreTrainedModel) -> None:
    """Load the weights of a saved model with other names, see `has_other_names`.

    Args:
        folder: A folder from ``save_pretrained``.
        model: The model in memory, all weights of which are overwritten.
    """
    loaded = type(model).from_pretrained(folder, dtype=torch.float32)  # holds any narrower dtype
    own = model.state_dict()  # which may have matchers beside the model's own weights
    for name, tensor in loaded.state_dict().items():
        own[name].copy_(tensor)


def shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or the whole if it is not sharded."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, own: Tensor) -> Tensor:
    """Make a tensor that is sharded as a parameter.

    Args:
        parameter: The parameter.
        own: This process's shard, or a tensor that is not sharded, such as a count of steps.
    """
    if not isinstance(parameter, DTensor) or own.shape != parameter.to_local().shape:
        return own
    return DTensor.from_local(
        own.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def write_optimizer(path: Path, optimizer: Any) -> None:
    """Write an optimizer's buffers and settings; of buffers that are sharded, this process's."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, slots in state["state"].items():
        for name, value in slots.items():
            kept = shard(value) if isinstance(value, Tensor) else value
            (tensors if isinstance(value, Tensor) else numbers)[f"{index}/{name}"] = kept
    write(path, tensors, {"groups": state["param_groups"], "numbers": numbers})


def read_optimizer(path: Path, optimizer: Any) -> None:
    """Load into an optimizer the state that `write_optimizer` wrote."""
    tensors, plain = read(path)
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **plain["numbers"]}.items():
        index, _, name = key.partition("/")
        whole = like(parameters[int(index)], value) if isinstance(value, Tensor) else value
        state.setdefault(int(index), {})[name] = whole
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
        for group in plain["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def write_randomness(path: Path) -> None:
    """Write the states of this process's random generators: Python, numpy, torch on each device."""
    numpy_state: Any = np.random.get_state(legacy=True)
    kind, keys, *rest = numpy_state
    tensors = {"cpu": torch.get_rng_state()} | {
        f"{kind}/{index}": state
        for kind, module in _accelerators()
        for index, state in enumerate(
            module.get_rng_state_all()
            if hasattr(module, "get_rng_state_all")
            else [module.get_rng_state()]  # Apple's GPU, of which there is one
        )
    }
    write(path, tensors, {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]})


def read_randomness(path: Path) -> None:
    """Restore the random generators to the states that `write_randomness` wrote."""
    tensors, plain = read(path)
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = plain["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors.pop("cpu"))
    for kind, module in _accelerators():
        for index in range(module.device_count()):
            if (state := tensors.get(f"{kind}/{index}")) is not None:
                several = hasattr(module, "get_rng_state_all")
                module.set_rng_state(state, *([index] if several else []))


def _accelerators() -> Iterator[tuple[str, Any]]:
    """The kind of this machine's accelerator and its module of torch; nothing without one."""
    kind = default_device().type
    module = getattr(torch, kind, None)
    if hasattr(module, "set_rng_state"):
        yield kind, module
