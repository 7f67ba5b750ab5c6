"""A target model with a cache of B rows, which scores draft trees and keeps accepted paths.

Each pass appends its tokens to the cache, at the same slots for all rows. The session knows which
slots hold a row's kept tokens, and at which positions; its masks hide the others: rejected nodes,
padding, and the tokens of finished rows. Keeping a path thus moves nothing. When many slots are
hidden, the engine drops them.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcore.decoding.engines.protocols import Engine, ThreadedEngine
from kdcore.decoding.engines.torch_engine import TorchEngine
from kdcore.decoding.layers.attention import TreeAttention
from kdcore.decoding.tree import DraftTree
from kdcore.errors import UserError
from kdcore.models.anatomy import context_of, short_length_of

SPARE = 64
"""Number of new slots after which the session looks for hidden ones. If half as many slots are
hidden from all rows, the engine drops them."""


class Session:
    """A causal language model with the cache and the length of each row.

    Args:
        model: The model in eval mode, with attention eager or sdpa.
        layers: Hidden states to return as features; see `kdcore.models.features.FeatureTap`.
        engine: An engine that is bound to the model and these layers (default: a new
            `kdcore.decoding.engines.torch_engine.TorchEngine`).

    Attributes:
        limit: Context length of the model, or None.
        short: See `kdcore.models.anatomy.short_length_of`; a row that crosses it has to restart.
        lengths: [B] int64, number of kept positions of each row.

    Raises:
        UserError: The model is in training mode, does not support draft trees, or lacks one of
            the layers.
    """

    def __init__(
        self, model: PreTrainedModel, layers: tuple[int, ...] = (), engine: Engine | None = None
    ) -> None:
        if model.training:
            raise UserError("the model is in training mode", "call model.eval() before it decodes")
        if engine is None:
            engine = TorchEngine()
            engine.bind(model, layers)
        self.model, self.engine = model, engine
        self._threaded = engine if isinstance(engine, ThreadedEngine) else None
        self.masks = TreeAttention(model)
        self.limit = context_of(model)
        self.short = short_length_of(model)

    def start(self, rows: int, length: int | None = None) -> None:
        """Reset the session to B empty rows.

        Args:
            rows: Number of rows B.
            length: Final length of the longest row, if it is known.
        """
        self.engine.start(rows, None if length is None else length + 2 * SPARE)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=self.model.device)
        self._kept = self.lengths.new_zeros(rows, 0, dtype=torch.bool)
        self._places = self.lengths.new_zeros(rows, 0)
        self._new = 0
        self._longest: int | None = None

    def serving(self) -> AbstractContextManager[None]:
        """A context around many passes, in which the engine prepares the target once."""
        return self.engine.serving()

    def verifying(self) -> AbstractContextManager[None]:
        """A context around what reads the logits of a pass, before the next one."""
        return nullcontext() if self._threaded is None else self._threaded.verifying()

    def extend(self, tokens: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Run the next tokens of each row and keep them.

        Args:
            tokens: [B, A >= 1] int64, padded on the right.
            counts: [B] int64, number of real tokens in each row.

        Returns:
            Logits [B, V] after the last real token of each row (undefined for a row without
            tokens), and features [B, A, F].
        """
        rows = torch.arange(len(counts), device=tokens.device)
        last = which = (counts - 1).clamp(min=0)
        if tokens.device.type == "cpu":
            last, which = torch.unique(last, return_inverse=True)
        elif tokens.shape[1] > len(counts):
            which = rows  # elsewhere, the host would wait for the device to count them
        else:
            last = torch.arange(tokens.shape[1], device=tokens.device)
        logits = self._extend(tokens, counts, last)
        return logits[rows, which], self.features

    def read(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Run the next tokens of each row and keep them; see `extend`.

        Args:
            tokens: [B, A >= 1] int64, padded on the right.
            counts: [B] int64, number of real tokens in each row.

        Returns:
            The features [B, A, F].
        """
        self._extend(tokens, counts, torch.zeros(1, dtype=torch.int64, device=tokens.device))
        return self.features

    def score(self, root: Tensor, tree: DraftTree) -> Tensor:
        """Run one pass over the root and the nodes of each row, without keeping them.

        Call `keep` next.

        Args:
            root: [B] int64, the token after the kept ones.
            tree: The draft tree.

        Returns:
            [B, 1 + N, V] logits after each slot.
        """
        tokens = torch.cat([root[:, None], tree.tokens], dim=1)
        return self._run(tokens, tree.shape.depth, tree.shape.sees, None)

    def keep(self, path: Tensor, counts: Tensor, longest: int | None = None) -> Tensor:
        """Keep the root and a path of the last scored tree.

        Args:
            path: [B, D] int64 node indices from the root down, -1 beyond the end.
            counts: [B] int64, number of tokens to keep, including the root; 0 leaves a row
                unchanged.
            longest: Length of the longest row afterwards. Without it, the host has to ask the
                device before it drops hidden slots.

        Returns:
            [B, 1 + D, F] features of the root and the path, padded with those of the root.
        """
        slots = torch.cat([path.new_zeros(len(path), 1), path + 1], dim=1)
        self._keep(slots, counts)
        self._longest = longest
        width = self.features.shape[-1]
        return self.features.gather(1, slots[:, :, None].expand(-1, -1, width))

    def rewind(self, lengths: Tensor) -> None:
        """Shorten the rows.

        Args:
            lengths: [B] int64 new lengths, at most the current ones.
        """
        self._kept = self._kept & (self._places < lengths[:, None])
        self.lengths, self._longest = lengths, None

    def select(self, rows: Tensor) -> None:
        """Keep some rows, when others are done.

        Args:
            rows: [R] int64 rows that remain, in their new order.
        """
        self.engine.select(rows)
        self._longest = None
        self.lengths = self.lengths[rows]
        self._kept, self._places = self._kept[rows], self._places[rows]

    def compact(self, least: int = 1) -> None:
        """Let the engine drop slots that are hidden from all rows.

        The host waits for the device, unless it knows the longest row.

        Args:
            least: Number of such slots for which that is worth it.
        """
        self._new = 0
        longest = int(self.lengths.max()) if self._longest is None else self._longest
        if self._kept.shape[1] - longest >= least:
            slots = torch.argsort((~self._kept).byte(), dim=1, stable=True)[:, :longest]
            self.engine.compact(slots)
            self._kept = self._kept.gather(1, slots)
            self._places = self._places.gather(1, slots)

    def hide(self, slots: int) -> None:
        """Note slots that were appended to the engine's cache without a pass.

        Args:
            slots: Number of slots.
        """
        none = self._places.new_zeros(len(self._places), slots)
        self._kept = torch.cat([self._kept, none.bool()], dim=1)
        self._places = torch.cat([self._places, none], dim=1)

    def _extend(self, tokens: Tensor, counts: Tensor, logits_of: Tensor) -> Tensor:
        chain = torch.arange(tokens.shape[1], device=tokens.device)[None]
        logits = self._run(tokens, chain, None, logits_of)
        self._keep(chain.expand_as(tokens), counts)
        self._longest = None
        return logits

    def _run(
        self, tokens: Tensor, depth: Tensor, sees: Tensor | None, logits_of: Tensor | None
    ) -> Tensor:
        """Run A tokens of each row after all slots in use, and return the requested logits.

        depth: [B or 1, A] positions relative to the row's length. sees: [B or 1, A, A] bool, the
        mask among the tokens; None for a chain.
        """
        if self._new >= SPARE:
            self.compact(SPARE // 2)
        self._positions = positions = self.lengths[:, None] + depth
        # Padding, and nodes too deep to be accepted, may exceed the context.
        known = positions if self.limit is None else positions.clamp(max=self.limit - 1)
        if sees is not None and self.short is not None:
            # one such node would switch the factors of LongRoPE for the whole pass
            shortened = known.clamp(max=self.short - 1)
            known = torch.where(self.lengths.max() < self.short, shortened, known)
        logits, self.features = self.engine.run(tokens, known, self._masks(sees), logits_of)
        self._new += tokens.shape[1]
        return logits

    def _masks(self, sees: Tensor | None) -> dict[str, Tensor] | None:
        """The masks of the next pass; None for the target's own causal mask in the first one."""
        positions = self._positions
        rows, count = positions.shape
        if sees is None:
            if not self._places.shape[1]:
                return None
            sees = torch.ones(1, count, count, dtype=torch.bool, device=positions.device).tril()
        own = self._kept[:, None].expand(-1, count, -1)
        return self.masks(
            torch.cat([own, sees.expand(rows, -1, -1)], dim=2),
            positions,
            torch.cat([self._places, positions], dim=1),
        )

    def _keep(self, slots: Tensor, counts: Tensor) -> None:
        """Keep the first ``counts`` [B] of ``slots`` [B, M] of the last pass."""
        rows, width = self._positions.shape
        order = torch.arange(slots.shape[1], device=slots.device)
        chosen = torch.where(order < counts[:, None], slots, width)
        kept = self._kept.new_zeros(rows, width + 1).scatter(1, chosen, True)
        self._kept = torch.cat([self._kept, kept[:, :width]], dim=1)
        self._places = torch.cat([self._places, self._positions], dim=1)
        self.lengths = self.lengths + counts
