"""Layouts of drafters in other engines: what a drafter implements, and the commands that serve it.

A layout is a config.json and the names of the weights beside it.
`kdcore.decoding.drafters.exchange` reads and writes the folders.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from kdcore.decoding.protocols import TrainedDrafter
from kdcore.errors import UserError
from kdcore.models.anatomy import layer_count
from kdcore.models.folder.files import served_name
from kdcore.models.loading.loaded import LoadedModel

Command: TypeAlias = Callable[[Path], str]
"""A function from an exported folder to the shell command with which an engine serves it."""


@dataclass(frozen=True, slots=True)
class ExportedDrafter:
    """A drafter in the layout of another engine.

    Attributes:
        config: Contents of config.json.
        weights: Weights by the layout's names.
        command: Command that serves the drafter with its target.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    command: Command


@dataclass(frozen=True, slots=True)
class ImportedDrafter:
    """A published drafter, as a component of kdcore.

    Attributes:
        params: Params of the component.
        state: State dict of the bound drafter.
        notes: Messages to the user about what the published folder leaves open.
    """

    params: dict[str, Any]
    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()


@runtime_checkable
class ExchangedDrafter(Protocol):
    """A trained drafter that other engines also run, from folders in their own layouts.

    kdcore calls ``imported`` on the class itself, so the component's ``build`` must name the class.

    Attributes:
        layouts: Names of the layouts that it can be exported to.
    """

    layouts: tuple[str, ...]

    def exported(self, layout: str, target: LoadedModel) -> ExportedDrafter:
        """Export the bound drafter to a layout.

        Args:
            layout: Name of the layout.
            target: Target of the drafter.

        Returns:
            The drafter in this layout.

        Raises:
            UserError: The layout does not support this drafter.
        """

    @classmethod
    def imported(
        cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], target: LoadedModel
    ) -> ImportedDrafter | None:
        """Import a drafter from one of the layouts.

        KeyError, TypeError or ValueError mean that the config does not describe a drafter; kdcore
        then tries the next drafter.

        Args:
            config: Config of the published drafter.
            weights: Weights of the published drafter.
            target: Target of the drafter.

        Returns:
            The drafter; None if the layout is unknown.

        Raises:
            UserError: The component does not support the published drafter.
        """


def vllm_command(target: LoadedModel, method: str, depth: int, **settings: Any) -> Command:
    """Return the command of vLLM.

    ``vllm serve`` is short for this module, but vLLM's build for CPUs does not have it.

    Args:
        target: Target of the drafter.
        method: vLLM's name of the method.
        depth: Number K of drafted tokens.
        **settings: Further settings of vLLM's speculative config.
    """

    def command(folder: Path) -> str:
        speculative = {
            "method": method,
            "model": str(folder),
            "num_speculative_tokens": depth,
            **settings,
        }
        quoted = shlex.quote(json.dumps(speculative))
        return (
            "python -m vllm.entrypoints.openai.api_server "
            f"--model {shlex.quote(served_name(target.name))} --speculative-config {quoted}"
        )

    return command


def sglang_command(target: LoadedModel, depth: int) -> Command:
    """Return the command of SGLang for an EAGLE-3 drafter that proposes a chain.

    Args:
        target: Target of the drafter.
        depth: Number of drafted tokens.
    """

    def command(folder: Path) -> str:
        return (
            f"python -m sglang.launch_server --model-path {shlex.quote(served_name(target.name))} "
            f"--speculative-algorithm EAGLE3 "
            f"--speculative-draft-model-path {shlex.quote(str(folder))} "
            f"--speculative-num-steps {depth} --speculative-eagle-topk 1 "
            f"--speculative-num-draft-tokens {depth + 1}"
        )

    return command


def refuse_biased_head(target: LoadedModel, engine: str) -> None:
    """Raise UserError if the target's head has a bias, which engines do not apply for a drafter.

    Args:
        target: Target, whose head the drafter shares.
        engine: Name of the engine.
    """
    head: Any = target.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if getattr(head, "bias", None) is not None:
        raise UserError(
            f"the head of {target.name} has a bias, which {engine} does not apply for a drafter",
            "decode with kdcore generate",
        )


def refuse_unordered_features(drafter: TrainedDrafter, target: LoadedModel, engine: str) -> None:
    """Raise UserError if a drafter reads hidden states that an engine does not give.

    Args:
        drafter: Drafter, whose ``layers`` are the hidden states that it reads.
        target: Its target.
        engine: Name of the engine, which gives the inputs of layers in rising order.
    """
    read, count = drafter.layers, layer_count(target.model)
    if list(read) != sorted(set(read)) or read[-1] >= count:
        raise UserError(
            f"{engine} gives a drafter hidden states in rising order and below {count}, but the "
            f"drafter reads {list(read)}",
            f"train a drafter with features that rise and are at most {count - 1}",
        )
