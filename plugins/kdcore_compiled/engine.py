"""An engine whose passes torch.compile compiles, at shapes that recur.

A round of decoding runs a pass over few tokens, and its time is mostly that of the many small
kernels which the host launches. A compiled pass launches fewer; on CUDA, a graph launches all of
them at once. Both need the same shapes again and again, so this engine rounds the tokens of a pass
and the slots that it reads up to powers of two, and rows that are done stay until half of them are.
What is added is hidden by the masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcore.decoding.engines.cache import SMALLEST
from kdcore.decoding.engines.torch_engine import TorchEngine
from kdcore.decoding.layers.attention import Masks
from kdcore.models.features import refuse_hooks
from kdcore_compiled.compilation import Compilation
from kdcore_compiled.drafter_pass import CompiledDrafterPass
from kdcore_compiled.static_cache import StaticCache, recurring

if TYPE_CHECKING:
    from kdcore.decoding.engines.protocols import TraceablePass
    from kdcore_compiled.plugin import CompiledParams


class CompiledEngine(TorchEngine):
    """A `CompilingEngine` that compiles the modules themselves: their weights are the present ones.

    Args:
        params: The longest compiled pass, and the mode.
        context: Not used.
    """

    def __init__(self, params: CompiledParams, context: Any = None) -> None:
        super().__init__()
        self.params = params
        self.cache: StaticCache = StaticCache(0, 0)

    def bind(self, target: PreTrainedModel, layers: tuple[int, ...]) -> None:
        """Check the target, and prepare to compile its passes.

        Args:
            target: The model in eval mode, with attention eager or sdpa.
            layers: Hidden states to return; see `kdcore.models.features.FeatureTap`.

        Raises:
            UserError: The target does not accept a tree's mask, lacks one of the layers, or has
                forward hooks.
        """
        super().bind(target, layers)
        refuse_hooks(target, "compiled")
        self._step = Compilation(self._pass, type(target).__name__, self.params, target.device)

    def compile(self, traceable: TraceablePass) -> CompiledDrafterPass:
        """Prepare a drafter's pass, whose shapes are compiled at their first use.

        Args:
            traceable: The pass.

        Returns:
            The pass.
        """
        return CompiledDrafterPass(traceable, self.params, self.target.device)

    def start(self, rows: int, slots: int | None = None) -> None:
        """Empty the cache; its storage stays if it suits, and with it what was compiled for it.

        Raises:
            UserError: The target has got forward hooks.
        """
        refuse_hooks(self.target, "compiled")
        wanted = (slots or 0) + recurring(self.params.tokens)
        if self.cache.rows != rows or self.cache.expected < wanted:
            self.cache = StaticCache(rows, wanted)
        self.cache.length = 0

    @torch.no_grad()
    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: Mapping[str, Tensor] | None,
        logits_of: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run one pass; see `kdcore.decoding.engines.protocols.Engine.run`.

        Raises:
            UserError: torch cannot compile the target.
        """
        rows, count = tokens.shape
        few = count <= self.params.tokens and masks is not None and bool(self.cache.keys)
        width = recurring(count) if few else count
        self.cache.reserve(self.cache.length + width)
        tokens, positions = (self._padded(each, width) for each in (tokens, positions))
        seen: Masks | None = None
        if masks is not None:
            window = recurring(self.cache.length + width, SMALLEST) if few else None
            seen = self.attention.taken(
                {kind: self._padded(mask, width, window) for kind, mask in masks.items()}
            )
            self.cache.window = window or 0
        if few:
            start = self.cache.length
            self.cache.places = torch.arange(start, start + width, device=tokens.device)
            try:
                with self.serving():
                    found = self._step(tokens, positions, seen, None)
            finally:
                self.cache.places = None
            logits = found["logits"][:rows, :count]
            logits = logits if logits_of is None else logits[:, logits_of]
        else:
            with self.serving():
                found = self._pass(tokens, positions, seen, logits_of)
            logits = found["logits"][:rows]
        self.cache.length += count
        return logits, found["features"][:rows, :count]

    def compact(self, slots: Tensor) -> None:
        """Keep some slots of each row; see `kdcore.decoding.engines.protocols.Engine.compact`."""
        self.cache.compact(self._padded(slots, slots.shape[1]))

    def _pass(
        self, tokens: Tensor, positions: Tensor, masks: Masks | None, logits_of: Tensor | None
    ) -> dict[str, Tensor]:
        with self.tap.listening() as heard:
            output = self.target(
                input_ids=tokens,
                attention_mask=masks,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=0 if logits_of is None else logits_of,
                **{self.cache_argument: self.cache},
            )
        return {"logits": output.logits, "features": self.tap.join(heard, tokens)}

    def _padded(self, given: Tensor, width: int, slots: int | None = None) -> Tensor:
        """Add zeros at the end of the rows [B], the tokens [A] and, of a mask, the slots [S]."""
        shape = [self.cache.rows, width, *given.shape[2:]]
        if slots is not None:
            shape[2] = slots
        if list(given.shape) == shape:
            return given
        padded = given.new_zeros(shape)
        padded[tuple(map(slice, given.shape))] = given
        return padded
