"""A model whose weights FSDP shards over the processes of a training, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from kdcore.errors import UserError
from kdcore.models.loading.mapped import forget
from kdcore.training.trainer.checkpoint import read, shard


class OnceSharded(TrainerCallback):
    """Measures a student that FSDP has just sharded, before its first step.

    Args:
        file: The file from which the processes have mapped it, which is removed.
        measure: Measures it, in all processes at once.
    """

    def __init__(self, file: Path, measure: Callable[[], object]) -> None:
        self._file, self._measure = file, measure

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `transformers.TrainerCallback`."""
        forget(self._file)
        self._measure()


@contextmanager
def several_backward_passes(model: Any) -> Iterator[None]:
    """Prepare a model that FSDP may shard for a forward pass and several backward passes.

    A pass gathers the shards of a module again when it reaches the module's output. The loss reads
    hidden states, so it never reaches the output of the head, nor that of the model: these, and
    the last norm in the head's group, stay whole until the last pass is done.

    Args:
        model: The model that is trained, sharded or not.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_requires_gradient_sync(True)  # each pass gives one stream's gradient
    root: Any = model
    ends = [end for end in (root, root.get_output_embeddings()) if isinstance(end, FSDPModule)]
    for end in ends:
        end.reshard()  # left whole by a forward pass, they are other tensors than the trained ones
        end.set_reshard_after_backward(False, recurse=False)
    yield
    for end in ends:
        end.reshard()


def gathered(weight: Tensor) -> Tensor:
    """Return the whole of a weight that may be sharded over processes, which all call this."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def shards_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this process's shards by name."""
    return {name: shard(tensor) for name, tensor in tensors.items()}


def shards_of_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return this process's shards of the weights that training changes, by name.

    Of tied weights it is the first name.
    """
    state = model.state_dict(keep_vars=True)
    changed = {n: v for n, v in state.items() if v.requires_grad or not isinstance(v, nn.Parameter)}
    firsts = {id(tensor): name for name, tensor in reversed(changed.items())}
    return shards_of({name: state[name].detach() for name in firsts.values()})


def file_of_process(file: Path, number: int, processes: int) -> Path:
    """Return the file of one of several processes beside the file of all.

    Args:
        file: The file that one process alone would have.
        number: Number of the process.
        processes: Number of processes.

    Returns:
        A path such as ``weights-0-of-2.safetensors``.
    """
    return file.with_stem(f"{file.stem}-{number}-of-{processes}")


@torch.no_grad()
def read_weights(path: Path, model: nn.Module) -> None:
    """Load a process's shards of the weights into a sharded model.

    Args:
        path: The file, which `checkpoint.write` wrote.
        model: The model.

    Raises:
        UserError: The checkpoint was written by another number of processes.
    """
    if not path.exists():
        raise UserError(
            f"{path.parent} does not contain {path.name}: another number of processes wrote it",
            "resume with as many processes as before",
        )
    kept, _ = read(path)
    for name, tensor in shards_of_weights(model).items():
        tensor.copy_(kept[name])
