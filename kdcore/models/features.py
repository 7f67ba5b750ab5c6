"""Hidden states of chosen layers, heard by hooks while the model runs.

Asking a model for all its hidden states would keep every layer's; a hook keeps the chosen ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.errors import UserError
from kdcore.models.anatomy import layer_count, layers_of


def low_middle_high(count: int) -> tuple[int, ...]:
    """Choose the hidden states that EAGLE-3 reads: 2, L // 2 and L - 3.

    Args:
        count: L, the number of layers.

    Returns:
        Three indices in rising order; of fewer than 7 layers 1, the middle and L, without repeats.
    """
    if count >= 7:
        return 2, count // 2, count - 3
    return tuple(sorted({1, (count + 1) // 2, count}))


class FeatureTap:
    """Listens to the hidden states of chosen layers.

    Args:
        model: The target.
        layers: Indices into what the model would return as hidden_states: index i below L, the
            number of layers, is the input of layer i; index L is the output of the final norm.

    Raises:
        UserError: The model has fewer layers, or they are not found.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
        count = layer_count(model)
        self.blocks = layers_of(model)
        for layer in layers:
            if not 0 <= layer <= count:
                raise UserError(
                    f"the drafter reads hidden state {layer}, and the target has 0 to {count}",
                    "use the target this drafter was trained for",
                )

    @contextmanager
    def listening(self) -> Iterator[dict[int, Tensor]]:
        """Hear the pass that is run inside.

        Yields:
            Layer -> [B, A, H], filled when the pass is done.
        """
        heard: dict[int, Tensor] = {}

        def hear_input(layer: int) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                heard[layer] = args[0] if args else kwargs["hidden_states"]

            return hook

        def hear_output(_: nn.Module, __: Any, output: Any) -> None:
            heard[len(self.blocks)] = output[0]

        with ExitStack() as hooks:
            for layer in set(self.layers):
                handle = (
                    self.decoder.register_forward_hook(hear_output)
                    if layer == len(self.blocks)
                    else self.blocks[layer].register_forward_pre_hook(
                        hear_input(layer), with_kwargs=True
                    )
                )
                hooks.callback(handle.remove)
            yield heard

    def join(self, heard: dict[int, Tensor], tokens: Tensor) -> Tensor:
        """Join what was heard into features.

        Args:
            heard: Layer -> [B, A, H], as `listening` gives it.
            tokens: [B, A] int64, what the pass read.

        Returns:
            [B, A, F] in the order of ``layers``; F = 0 where none are read.
        """
        if not self.layers:
            return torch.empty(*tokens.shape, 0, device=tokens.device)
        return torch.cat([heard[layer] for layer in self.layers], dim=-1)
