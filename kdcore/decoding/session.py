"""A target model at work on B rows: it scores draft trees and keeps the accepted paths.

Slot s of a row's cache holds its token at position s, for all s below the row's length. A pass
writes behind the longest row, at the same slots for all rows, under a mask that hides what is
not the row's own; keeping a path moves its slots down to the row's length. Whatever lies above
a row's length is free, so a rejected node, a finished row and padding need no cleaning.
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
    """A causal language model, its keys and values, and how far each row has come.

    model: in eval mode, with attention eager or sdpa. layers: hidden states to return as
    features, see `FeatureTap`.

    ``limit``: positions the model knows, or None. ``short``: see `short_length_of`; whoever crosses
    it has to start anew. ``lengths``: [B] int64, positions kept so far.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...] = ()) -> None:
        if model.training:
            raise ValueError("a model in training mode drops out; call eval() first")
        self.model = model
        self.attention = TreeAttention(model)
        self.tap = FeatureTap(model, layers)
        self.limit = context_of(model)
        self.short = short_length_of(model)

    def start(self, rows: int) -> None:
        """Forget everything and begin B empty rows."""
        self.cache = KVCache()
        self.cpu_pass = CpuPass(self.model)  # of the weights as they are now
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=self.model.device)

    def extend(self, tokens: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Run the next tokens of each row and keep them.

        tokens: [B, A >= 1] int64, right-padded; counts: [B] int64, how many of them are real.

        Returns the logits [B, V] after each row's last real token (of no meaning where there is
        none), and the features [B, A, F].
        """
        last, which = torch.unique((counts - 1).clamp(min=0), return_inverse=True)
        chain = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        logits = self._run(tokens, chain, None, last)
        self._keep(chain, counts)
        return logits[torch.arange(len(which), device=tokens.device), which], self.features

    def score(self, root: Tensor, tree: DraftTree) -> Tensor:
        """One pass over each row's root and nodes: logits [B, 1 + N, V] after every slot.

        root: [B] int64, the token that comes after what was kept. Nothing is kept yet: call
        `keep` next.
        """
        tokens = torch.cat([root[:, None], tree.tokens], dim=1)
        return self._run(tokens, tree.shape.depth, tree.shape.sees, 0)

    def keep(self, path: Tensor, counts: Tensor) -> Tensor:
        """Keep the root and a path of the tree just scored.

        path: [B, D] int64 node indices from the root down, -1 where there is none.
        counts: [B] int64, how many tokens to keep, the root among them; 0 leaves a row as it is.

        Returns the features [B, 1 + D, F] of the root and the path, padded with the root's.
        """
        slots = torch.cat([path.new_zeros(len(path), 1), path + 1], dim=1)
        self._keep(slots, counts)
        width = self.features.shape[-1]
        return self.features.gather(1, slots[:, :, None].expand(-1, -1, width))

    def rewind(self, lengths: Tensor) -> None:
        """Go back to ``lengths`` [B], none of them above the present one."""
        self.lengths = lengths
        self.cache.length = int(lengths.max())

    def _run(
        self, tokens: Tensor, depth: Tensor, sees: Tensor | None, logits_to_keep: int | Tensor
    ) -> Tensor:
        """Write A tokens of each row behind all slots in use; the logits of those asked for.

        depth: [B or 1, A], positions from the row's length on. sees: [B or 1, A, A] bool, among
        themselves; None for a chain.
        """
        positions = self.lengths[:, None] + depth
        # Padding, and nodes too deep to be accepted, may lie beyond what the model knows.
        known = positions if self.limit is None else positions.clamp(max=self.limit - 1)
        if sees is not None and self.short is not None and self.lengths.max() < self.short:
            # one such node would have LongRoPE turn the whole pass otherwise
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
        """For tokens at ``positions`` [B, A]; None stands for the model's own causal mask."""
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
        """Move ``slots`` [B, M] of the last pass to each row's end, and make ``counts`` its own.

        Slots beyond the count are moved as well, to where a row's free slots are.
        """
        source = self.cache.length + slots
        target = self.lengths[:, None] + torch.arange(slots.shape[1], device=slots.device)
        if not torch.equal(source, target):
            self.cache.move(source, target)
        self.rewind(self.lengths + counts)
