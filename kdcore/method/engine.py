"""The extension point of engines: what runs a target in decoding. See `kdcore.method.protocols`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Engine(Protocol):
    """Runs a target over the nodes of draft trees, with a cache of its own.

    Each pass appends its A tokens to the cache as A new slots, at the same places for all rows. The
    caller tracks what is in them, hides rejected nodes and padding by masks, and asks the engine to
    compact when many slots are hidden. S is the number of slots.
    """

    @property
    def slots(self) -> int:
        """The number of slots in the cache of each row; 0 before ``start``."""

    def bind(self, target: Any, layers: tuple[int, ...]) -> None:
        """Prepare passes of a target.

        Args:
            target: The transformers model in eval mode, on its device.
            layers: Indices of the target's hidden_states to return, () for none.

        Raises:
            UserError: The engine cannot run this target, or the target lacks one of the layers.
        """

    def start(self, rows: int, slots: int | None = None) -> None:
        """Empty the cache.

        Args:
            rows: Number of rows B.
            slots: Expected number of slots, for an engine that allocates them at once; passes may
                append more.
        """

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: Mapping[str, Tensor] | None,
        logits_of: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run one pass and append its tokens to the cache.

        Args:
            tokens: [B, A] int64.
            positions: [B, A] int64 positions of the tokens in their rows.
            masks: The mask [B, A, S + A] bool of each type of the target's layers, as
                `kdcore.decoding.layers.attention.TreeAttention` names and builds them: True where a
                token reads a slot. None for a causal pass while the cache is empty.
            logits_of: [L] int64, the places among the A tokens whose logits are returned; None for
                all of them.

        Returns:
            Logits [B, L, V], and the concatenated hidden states [B, A, F] of all tokens.
        """

    def compact(self, slots: Tensor) -> None:
        """Drop all other slots of each row.

        Args:
            slots: [B, S'] int64 slots that remain, in increasing order among those that a row still
                reads; they become the slots 0 to S' - 1.
        """

    def select(self, rows: Tensor) -> None:
        """Keep some rows, when others are done.

        Args:
            rows: [R] int64 rows that remain, in their new order.
        """

    def serving(self) -> AbstractContextManager[None]:
        """A context around many passes: what an engine changes on the target ends with it."""
