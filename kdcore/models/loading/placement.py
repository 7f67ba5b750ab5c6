"""The place, dtype and attention of a model, as transformers takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from kdcore.errors import UserError
from kdcore.models.device import chosen_device, put
from kdcore.specs.parts.fields import AUTO, SHARDED, ModelSpec

_PACKAGES = {
    "flash_attention_2": (is_flash_attn_2_available, "flash-attn"),
    "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
}
"""Attention -> whether it works here, and the package that has it."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The place of a model's weights.

    Attributes:
        device: The device to which the model moves; None: it stays where it was loaded.
        is_own: Whether the model stays there wherever the run's device is.
        arguments: Arguments of ``from_pretrained`` that spread it over several devices.
    """

    device: torch.device | None = None
    is_own: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: ModelSpec, device: torch.device | None) -> Placement:
        """The place that a spec names, or else the device of the run.

        Args:
            spec: The model.
            device: The device of the run; None leaves the model where it is loaded.

        Returns:
            The place.

        Raises:
            UserError: This machine does not have the device, or the model is to be sharded over
                one process.
        """
        if spec.device is None:
            return cls(device)
        if spec.device == AUTO:
            return cls(is_own=True, arguments={"device_map": "auto"})
        if spec.device != SHARDED:
            return cls(chosen_device(spec.device), is_own=True)
        processes = PartialState().num_processes
        if processes == 1:
            raise UserError(
                f"device: sharded spreads {spec.model} over several processes, and there is one",
                "start several (accelerate launch --num_processes N -m kdcore_cli distill SPEC), "
                "or set device: auto to spread its layers over the devices of one process",
            )
        sharded = {"distributed_config": DistributedConfig(fsdp_size=processes)}
        return cls(is_own=True, arguments=sharded)

    def put(self, model: Any) -> None:
        """Move a model to its device.

        Args:
            model: The model, loaded with `arguments`.
        """
        if self.device is not None:
            put(model, self.device)

    def refuse_quantised(self, quantised: bool, spec: ModelSpec) -> None:
        """Check that FSDP can shard the weights.

        Args:
            quantised: Whether the weights are quantised.
            spec: The model.

        Raises:
            UserError: Quantised weights are to be sharded.
        """
        if quantised and spec.device == SHARDED:
            raise UserError(
                f"FSDP does not shard the quantised weights of {spec.model}",
                "set device: auto to spread its layers over the devices of a process, or load it "
                "without quantisation",
            )


def dtype_of(spec: ModelSpec, config: Any = None) -> Any:
    """The dtype that a spec names, as ``from_pretrained`` takes it.

    Args:
        spec: The model.
        config: The config of a model without files to load, whose dtype replaces ``auto``.

    Returns:
        A torch dtype, or "auto".
    """
    if spec.dtype != AUTO:
        return getattr(torch, spec.dtype)
    return AUTO if config is None else getattr(config, "dtype", None) or torch.float32


def attention_arguments(spec: ModelSpec) -> dict[str, str]:
    """The arguments of ``from_pretrained`` and ``from_config`` for a spec's attention.

    Args:
        spec: The model.

    Returns:
        The arguments, none for the choice of transformers.

    Raises:
        UserError: Its package is not installed, or does not work on this machine.
    """
    if spec.attention is None:
        return {}
    works, package = _PACKAGES.get(spec.attention, (lambda: True, ""))
    if not works():
        raise UserError(
            f"attention: {spec.attention} requires the package {package} and a GPU that it "
            "supports",
            f"run: pip install {package}, or set attention: sdpa",
        )
    return {"attn_implementation": spec.attention}


def refuse_float16(model: Any, name: str) -> None:
    """Check that a student's weights can be trained.

    Args:
        model: The student.
        name: Name of the student in the message.

    Raises:
        UserError: Its files are in float16, and the spec's dtype is auto.
    """
    if model.dtype == torch.float16:
        raise UserError(
            f"the weights of {name} are in float16, which cannot be trained",
            "set student.dtype: float32 or bfloat16",
        )
