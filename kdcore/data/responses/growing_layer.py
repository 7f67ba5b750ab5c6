"""A layer for transformers' dynamic cache that appends in place instead of copying."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from kdcore.decoding.engines.cache import with_room


class GrowingLayer(DynamicLayer):
    """Keys and values [B, heads, T, width], which are views of a larger storage.

    `DynamicLayer` copies all its contents to new memory with every token, which for a large batch
    of long rows takes longer than the forward pass.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values.

        Args:
            key_states: [B, heads, A, width] new keys.
            value_states: [B, heads, A, width] new values.
            *args: Ignored.
            **kwargs: Ignored.

        Returns:
            All keys and values, [B, heads, T + A, width] each.
        """
        held, values = self.keys, self.values
        if held is None or values is None or not self.is_initialized:
            self.lazy_initialization(key_states, value_states)  # type: ignore[no-untyped-call]
            held, values = key_states[:, :, :0], value_states[:, :, :0]
            self._storages = held, values
        of_keys, self.keys = _appended(self._storages[0], held, key_states)
        of_values, self.values = _appended(self._storages[1], values, value_states)
        self._storages = of_keys, of_values
        return self.keys, self.values


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """The cache of a model; bounded layers, and those with another state, remain transformers'."""
    cache = DynamicCache(config=config)
    cache.layers = [
        GrowingLayer() if type(own) is DynamicLayer else own  # type: ignore[no-untyped-call]
        for own in cache.layers
    ]
    return cache


def keeps_keys(cache: DynamicCache) -> bool:
    """Whether any layer keeps keys and values, as none does of a purely recurrent model."""
    return not cache.layers or any(isinstance(each, CacheLayerMixin) for each in cache.layers)


def _appended(storage: Tensor, held: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """The storage, possibly a new one, and its contents: ``held`` followed by ``new``."""
    length = held.shape[2]
    if held.data_ptr() != storage.data_ptr():  # rows were selected into new memory
        storage = held
    storage = with_room(storage, length + new.shape[2])
    storage[:, :, length : length + new.shape[2]] = new
    return storage, storage[:, :, : length + new.shape[2]]
