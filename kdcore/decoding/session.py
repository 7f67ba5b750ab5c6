"""A target model with a cache of B rows, which scores draft trees and keeps accepted paths.

Slot s of a row's cache contains its token at position s, for each s below the row's length. A pass
writes after the longest row, at the same slots for all rows, under a mask that hides slots of other
tokens; keeping a path moves its slots down to the row's length. All slots above a row's length are
free, so rejected nodes, finished rows and padding need no cleanup.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcore.decoding.cache import KVCache
from kdcore.decoding.layers.attention import Masks, TreeAttention
from kdcore.decoding.layers.cpu_pass import CpuPass
from kdcore.method.records import DraftTree
from kdcore.models.anatomy import context_of, short_length_of
from kdcore.models.features import FeatureTap


class Session:
    """A causal language model with the cache and the length of each row.

    Args:
        model: The model in eval mode, with attention eager or sdpa.
        layers: Hidden states to return as features; see `kdcore.models.features.FeatureTap`.

    Attributes:
        limit: Context length of the model, or None.
        short: See `kdcore.models.anatomy.short_length_of`; a row that crosses it has to restart.
        lengths: [B] int64, number of kept positions of each row.

    Raises:
        ValueError: The model is in training mode.
        UserError: The model does not support draft trees, or lacks one of the layers.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...] = ()) -> None:
        if model.training:
            raise ValueError("the model is in training mode, with dropout: call model.eval() first")
        self.model = model
        self.attention = TreeAttention(model)
        self.tap = FeatureTap(model, layers)
        self.limit = context_of(model)
        self.short = short_length_of(model)

    def start(self, rows: int) -> None:
        """Reset the session to ``rows`` = B empty rows."""
        self.cache = KVCache()
        self.cpu_pass = CpuPass(self.model)  # copies the current weights
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=self.model.device)

    def extend(self, tokens: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Run the next tokens of each row and keep them.

        Args:
            tokens: [B, A >= 1] int64, padded on the right.
            counts: [B] int64, number of real tokens in each row.

        Returns:
            Logits [B, V] after the last real token of each row (undefined for a row without
            tokens), and features [B, A, F].
        """
        last, which = torch.unique((counts - 1).clamp(min=0), return_inverse=True)
        chain = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = self._run(tokens, chain, None, last)
        self._keep(chain, counts)
        return logits[torch.arange(len(which), device=tokens.device), which], self.features

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
        return self._run(tokens, tree.shape.depth, tree.shape.sees, 0)

    def keep(self, path: Tensor, counts: Tensor) -> Tensor:
        """Keep the root and a path of the last scored tree.

        Args:
            path: [B, D] int64 node indices from the root down, -1 beyond the end.
            counts: [B] int64, number of tokens to keep, including the root; 0 leaves a row
                unchanged.

        Returns:
            [B, 1 + D, F] features of the root and the path, padded with those of the root.
        """
        slots = torch.cat([path.new_zeros(len(path), 1), path + 1], dim=1)
        self._keep(slots, counts)
        width = self.features.shape[-1]
        return self.features.gather(1, slots[:, :, None].expand(-1, -1, width))

    def rewind(self, lengths: Tensor) -> None:
        """Shorten the rows.

        Args:
            lengths: [B] int64 new lengths, at most the current ones.
        """
        self.lengths = lengths
        self.cache.length = int(lengths.max())

    def _run(
        self, tokens: Tensor, depth: Tensor, sees: Tensor | None, logits_to_keep: int | Tensor
    ) -> Tensor:
        """Run A tokens of each row after all slots in use, and return the requested logits.

        depth: [B or 1, A] positions relative to the row's length. sees: [B or 1, A, A] bool, the
        mask among the tokens; None for a chain.
        """
        positions = self.lengths[:, None] + depth
        # Padding, and nodes too deep to be accepted, may exceed the context.
        known = positions if self.limit is None else positions.clamp(max=self.limit - 1)
        if sees is not None and self.short is not None and self.lengths.max() < self.short:
            # one such node would switch the factors of LongRoPE for the whole pass
            known = known.clamp(max=self.short - 1)
        with self.tap.listening() as heard, self.attention.at_work(), self.cpu_pass.at_work():
            output = self.model(
                input_ids=tokens,
                attention_mask=self._masks(positions, sees),
                position_ids=known,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            )
        self.features = self.tap.join(heard, tokens)
        logits: Tensor = output.logits
        return logits

    def _masks(self, positions: Tensor, sees: Tensor | None) -> Masks | None:
        """The masks for tokens at ``positions`` [B, A]; None for the model's own causal mask."""
        rows, count = positions.shape
        if sees is None:
            if not self.cache.length:
                return None
            sees = torch.ones(1, count, count, dtype=torch.bool, device=positions.device).tril()
        before = torch.arange(self.cache.length, device=positions.device)
        own = (before < self.lengths[:, None])[:, None].expand(-1, count, -1)
        return self.attention(
            torch.cat([own, sees.expand(rows, -1, -1)], dim=2),
            positions,
            torch.cat([before.expand(rows, -1), positions], dim=1),
            self.model.dtype,
        )

    def _keep(self, slots: Tensor, counts: Tensor) -> None:
        """Move ``slots`` [B, M] of the last pass to the end of each row; keep ``counts`` of them.

        Slots beyond the count move too, into the row's free slots.
        """
        source = self.cache.length + slots
        target = self.lengths[:, None] + torch.arange(slots.shape[1], device=slots.device)
        if not torch.equal(source, target):
            self.cache.move(source, target)
        self.rewind(self.lengths + counts)
