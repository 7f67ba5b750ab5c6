"""A training in one of two processes, which leaves the weights; see test_several_processes."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from tests.sharded import allow_on_the_cpu
from tests.test_training import trainer


def train(folder: Path, method: dict[str, Any], arguments: dict[str, Any]) -> None:
    if "fsdp" in arguments:
        allow_on_the_cpu()
    made = trainer(
        folder, method, per_device_train_batch_size=3, gradient_accumulation_steps=2, **arguments
    )
    made.train()
    model = made.accelerator.unwrap_model(made.model)
    assert all(isinstance(each, DTensor) for each in model.parameters()) == ("fsdp" in arguments)
    weights = {name: whole(each).detach().contiguous() for name, each in model.named_parameters()}
    if made.args.process_index == 0:
        (folder / "log.json").write_text(json.dumps(made.state.log_history))
        save_file(weights, folder / "weights")
    # both at once, or the one that ends first can take threads of the other's down with it
    made.accelerator.wait_for_everyone()
    made.accelerator.end_training()


def run(words: list[str]) -> None:
    """A command line of ours."""
    from kdcore_cli.main import run

    assert run(words) == 0


def whole(parameter: Any) -> Any:
    """A parameter that may lie in pieces on several processes, which all must ask."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
