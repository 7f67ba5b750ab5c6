"""Hidden states of selected layers, captured by hooks during a forward pass.

``output_hidden_states`` would keep the states of all layers; hooks keep the selected ones only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.errors import UserError
from kdcore.models.anatomy import layer_count, layers_of

LISTENERS = (__name__, "transformers.utils.output_capturing")
"""Whose hooks change nothing. transformers leaves some after `output_hidden_states=True`."""


def low_middle_high(count: int) -> tuple[int, ...]:
    """The hidden states that EAGLE-3 reads: 2, L // 2 and L - 3.

    Args:
        count: Number of layers L. With fewer than 7 layers, those indices would not increase: the
            hidden states are then 1, the middle one and L.

    Returns:
        Indices in increasing order.
    """
    if count >= 7:
        return 2, count // 2, count - 3
    return tuple(sorted({1, (count + 1) // 2, count}))


def refuse_hooks(model: PreTrainedModel, engine: str) -> None:
    """Check that no forward hook may change what a model computes.

    An engine that translates the model does not see hooks that are set later.

    Args:
        model: The model.
        engine: Name of the engine.

    Raises:
        UserError: There is one.
    """
    for place, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(hook.__module__ not in LISTENERS for hook in hooks):
            raise UserError(
                f"{engine} cannot run {type(model).__name__}: {place or 'it'} has forward hooks",
                "remove the hooks, or set the engine to torch",
            )


class FeatureTap:
    """Capture of some of a model's hidden states.

    Attributes:
        layers: Indices into the hidden_states that the model would return. Index i < L is the
            input of layer i; index L is the output of the final norm.
        decoder: The body of the model.
        blocks: Its L layers.

    Raises:
        UserError: The model has fewer layers, or they cannot be found.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
        count = layer_count(model)
        self.blocks = layers_of(model)
        self._installed = False
        self._pass = threading.local()  # other threads may run the same model meanwhile
        for layer in layers:
            if not 0 <= layer <= count:
                raise UserError(
                    f"the drafter reads hidden state {layer}, but the target has hidden states 0 "
                    f"to {count}",
                    f"set features to numbers from 0 to {count}, or use the target that a trained "
                    "drafter belongs to",
                )

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep the hooks on the model inside the context."""
        if self._installed:
            yield
            return
        with ExitStack() as hooks:
            for layer in set(self.layers):
                handle = (
                    self.decoder.register_forward_hook(self._hear_output)
                    if layer == len(self.blocks)
                    else self.blocks[layer].register_forward_pre_hook(
                        self._hear_input(layer), with_kwargs=True
                    )
                )
                hooks.callback(handle.remove)
            self._installed = True
            try:
                yield
            finally:
                self._installed = False

    @contextmanager
    def listening(self) -> Iterator[dict[int, Tensor]]:
        """Capture the pass that this thread runs inside the context.

        Yields:
            {layer: [B, A, H]}, filled by the pass.
        """
        heard: dict[int, Tensor] = {}
        with self.installed():
            self._pass.heard = heard
            try:
                yield heard
            finally:
                self._pass.heard = None  # torch.compile cannot follow a `del`

    def _hear_input(self, layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._note(layer, args[0] if args else kwargs["hidden_states"])

        return hook

    def _hear_output(self, _: nn.Module, __: Any, output: Any) -> None:
        self._note(len(self.blocks), output[0])

    def _note(self, layer: int, states: Tensor) -> None:
        heard = getattr(self._pass, "heard", None)
        if heard is not None:
            heard[layer] = states

    def join(self, heard: dict[int, Tensor], tokens: Tensor) -> Tensor:
        """Concatenate the captured hidden states in the order of ``layers``.

        Args:
            heard: {layer: [B, A, H]}, from `listening`.
            tokens: [B, A] int64, the tokens of the pass.

        Returns:
            [B, A, F] features; F = 0 when no layers are read.
        """
        if not self.layers:
            return torch.empty(*tokens.shape, 0, device=tokens.device)
        return torch.cat([heard[layer] for layer in self.layers], dim=-1)
