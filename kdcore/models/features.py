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
    """The hidden states that EAGLE-3 reads of ``count`` = L layers: 2, L // 2 and L - 3.

    Of fewer than 7 layers, whose hidden states these are not in rising order: 1, the middle, L.
    """
    if count >= 7:
        return 2, count // 2, count - 3
    return tuple(sorted({1, (count + 1) // 2, count}))


class FeatureTap:
    """Listens to ``layers``, indices into what the model would return as hidden_states.

    Index i below L, the number of layers, is the input of layer i; index L is the output of the
    final norm. Raises UserError when the model has fewer layers, or they are not found.
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
        """{layer: [B, A, H]} of the pass that is run inside."""
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
        """[B, A, F] in the order of ``layers``; F = 0 where none are read. tokens: [B, A]."""
        if not self.layers:
            return torch.empty(*tokens.shape, 0, device=tokens.device)
        return torch.cat([heard[layer] for layer in self.layers], dim=-1)
