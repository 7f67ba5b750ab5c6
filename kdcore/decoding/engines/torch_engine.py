"""The reference engine: the transformers model itself, on any device that torch supports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kdcore.decoding.engines.cache import SMALLEST, KVCache
from kdcore.decoding.layers.attention import TreeAttention
from kdcore.models.features import FeatureTap
from kdcore.models.transformers_versions import cache_argument


class TorchEngine:
    """The `Engine` that calls the target, and so always has its weights.

    Args:
        params: Not used.
        context: Not used.

    Attributes:
        cache: The keys and values.
    """

    def __init__(self, params: Any = None, context: Any = None) -> None:
        self.cache = KVCache()

    @property
    def slots(self) -> int:
        """The number of slots in the cache."""
        return self.cache.length

    def bind(self, target: PreTrainedModel, layers: tuple[int, ...]) -> None:
        """Check that the target follows a tree's mask, and find its layers.

        Args:
            target: The model in eval mode, with attention eager or sdpa.
            layers: Hidden states to return; see `kdcore.models.features.FeatureTap`.

        Raises:
            UserError: The target does not accept a tree's mask, or lacks one of the layers.
        """
        self.target = target
        self.attention = TreeAttention(target)
        self.tap = FeatureTap(target, layers)
        self.cache_argument = cache_argument(target)
        self._serving = False

    def start(self, rows: int, slots: int | None = None) -> None:
        """Empty the cache; see `kdcore.decoding.engines.protocols.Engine.start`."""
        self.cache = KVCache(SMALLEST if slots is None else slots)

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: Mapping[str, Tensor] | None,
        logits_of: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run one pass; see `kdcore.decoding.engines.protocols.Engine.run`."""
        with self.serving(), self.tap.listening() as heard:
            output = self.target(
                input_ids=tokens,
                attention_mask=None if masks is None else self.attention.taken(masks),
                position_ids=positions,
                use_cache=True,
                logits_to_keep=0 if logits_of is None else logits_of,
                **{self.cache_argument: self.cache},
            )
        self.cache.length += tokens.shape[1]
        logits: Tensor = output.logits
        return logits, self.tap.join(heard, tokens)

    def compact(self, slots: Tensor) -> None:
        """Keep some slots of each row; see `kdcore.decoding.engines.protocols.Engine.compact`."""
        self.cache.compact(slots)

    def select(self, rows: Tensor) -> None:
        """Keep some rows; see `kdcore.decoding.engines.protocols.Engine.select`."""
        self.cache.select(rows)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Keep the hooks and the attention of the passes inside the context installed."""
        if self._serving:
            yield
            return
        with ExitStack() as installed:
            installed.enter_context(self.tap.installed())
            installed.enter_context(self.attention.at_work())
            self._serving = True
            try:
                yield
            finally:
                self._serving = False
