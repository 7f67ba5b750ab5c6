"""DFlash: a block of mask slots, denoised in one pass by layers that read the target's states.

    c_t = norm(FC(hidden states of the target at t)),                       t = 0 ... r
    z_{r,0} = emb(x_{r+1})                  z_{r,i} = v,                    i = 1 ... D
    z_{r,0..D} = L_N(... L_1(z_{r,0..D}; c_0 ... c_r))
    q_{r+1+i} = softmax(W norm(z_{r,i}))

Source: DFlash (arXiv 2602.06036), and the published model. Each layer computes keys and values from
c, which does not change from layer to layer, and from the block, whose slots all read one another.
Entry t has position t, and slot i of row r has position r + 1 + i. W is the target's head. v is
the embedding of a token that the target does not use; here it is learned.

The entries of the cache are the keys and values of c. The block is written after them for a round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcore import DraftTree
from kdcore.decoding.drafters.module import DraftingModule
from kdcore.decoding.drafters.row_cache import RowCache
from kdcore.decoding.drafters.traceable import at_places
from kdcore.decoding.layers.decoder_layer import (
    Attend,
    Attention,
    DecoderLayer,
    LayerSize,
    Rotation,
    rotated,
)
from kdcore.models.anatomy import final_scale, layer_count
from kdcore_baselines.drafters import slot_layouts
from kdcore_baselines.drafters.slots import Keys, SlotsOf

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from transformers import PreTrainedModel

    from kdcore import BuildContext
    from kdcore.decoding.drafters.layouts import ExportedDrafter, ImportedDrafter
    from kdcore.models.loading.loaded import LoadedModel
    from kdcore_baselines.drafting_components import DFlashParams


class DFlash(DraftingModule):
    """DFlash drafter, a `kdcore.decoding.protocols.TrainedDrafter`."""

    layouts = ("vllm",)

    def __init__(self, params: DFlashParams, context: BuildContext) -> None:
        super().__init__(params.vocabulary)
        self.params, self.depth = params, params.depth
        self.tree = context.build(params.tree)

    def bind(self, target: PreTrainedModel, tokenizer: Any) -> None:
        super().bind(target, tokenizer)
        usual = spread(layer_count(target), self.params.layers)
        self.read_states(target, self.params.features or usual)
        size = self.layer_size = LayerSize.of(target, self.params.ffn)
        with torch.device(target.device):
            self.fc = nn.Linear(len(self.layers) * size.hidden, size.hidden, bias=False)
            self.hidden_norm = nn.RMSNorm(size.hidden, size.eps)
            self.levels = nn.ModuleList(BlockLayer(size) for _ in range(self.params.layers))
            self.norm = nn.RMSNorm(size.hidden, size.eps)
            self.mask_token = nn.Parameter(torch.empty(size.hidden))
        self.norm.weight.data.copy_(final_scale(target))
        self.mask_token.data.copy_(self.mean_embedding())

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        # the last row has no token after it; what it predicts is not learned
        entry = torch.arange(tokens.shape[1], device=tokens.device)
        slot = torch.arange(1, self.depth + 2, device=tokens.device)
        context, rotation = self._context(features), self.layer_size.rotation(entry[None])
        attends = (
            SlotsOf(attention.entries(context, rotation), ordered=False)
            for attention in self._attentions()
        )
        block = self._block(self.embed(tokens.roll(-1, dims=1))).flatten(1, 2)
        read = self._denoised(block, (entry[:, None] + slot).flatten()[None], attends)
        return read.view(len(tokens), len(entry), 1 + self.depth, -1)[:, :, 1:]

    def start(self, first: Tensor) -> None:
        self.cache = RowCache(len(first), len(self.levels), self.layer_size, self.norm.weight)

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: torch.Generator | None
    ) -> DraftTree:
        positions = self.cache.positions(tokens.shape[1])
        context, rotation = self._context(features), self.layer_size.rotation(positions)
        writes = self.cache.writing(positions)
        for attention, write in zip(self._attentions(), writes, strict=True):
            write(*attention.entries(context, rotation))
        self.cache.lengths += lengths

        newest = at_places(tokens, (lengths - 1).clamp(min=0)[:, None])
        block = self._block(self.embed(newest))[:, 0]
        count = block.shape[1]
        sees = torch.ones(len(block), count, count, dtype=torch.bool, device=block.device)
        attends = self.cache.drafting(sees)
        read = self._denoised(block, self.cache.positions(count), attends)
        return self.in_target(self.tree(self.logp(read[:, 1:]), lengths > 0))

    def exported(self, layout: str, target: LoadedModel) -> ExportedDrafter:
        return slot_layouts.dflash_exported(self, target)

    @classmethod
    def imported(
        cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], target: LoadedModel
    ) -> ImportedDrafter | None:
        return slot_layouts.dflash_imported(config, weights, target)

    def _attentions(self) -> Iterator[BlockAttention]:
        for level in self.levels:
            assert isinstance(level, BlockLayer)
            yield level.self_attn

    def _context(self, features: Tensor) -> Tensor:
        """The context [B, A, H] of features [B, A, F]."""
        context: Tensor = self.hidden_norm(self.fc(features.to(self.dtype)))
        return context

    def _block(self, embedded: Tensor) -> Tensor:
        """[B, A, 1 + D, H]: embedded tokens [B, A, H], each before D slots."""
        slots = self.mask_token.expand(*embedded.shape[:2], self.depth, -1)
        return torch.cat([embedded[:, :, None].to(slots), slots], dim=2)

    def _denoised(self, block: Tensor, positions: Tensor, attends: Iterable[Attend]) -> Tensor:
        """Run the layers on slots [B, A, H] at their positions, up to the head."""
        rotation = self.layer_size.rotation(positions)
        for level, attend in zip(self.levels, attends, strict=True):
            block = level(block, rotation, attend)
        read: Tensor = self.norm(block)
        return read


class BlockAttention(Attention):
    """Attention with norms of queries and keys, which also gives the keys of the context."""

    def __init__(self, size: LayerSize) -> None:
        super().__init__(size)
        self.q_norm = nn.RMSNorm(size.head, size.eps)
        self.k_norm = nn.RMSNorm(size.head, size.eps)

    def entries(self, x: Tensor, rotation: Rotation) -> Keys:
        """The keys and values of ``x`` [B, A, H]."""
        keys = rotated(self.k_norm(self.in_heads(self.k_proj(x))), rotation)
        return Keys(keys, self.in_heads(self.v_proj(x)))

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        """[B, A, H] from ``x`` [B, A, H]."""
        query = rotated(self.q_norm(self.in_heads(self.q_proj(x))), rotation)
        read = attend(query, *self.entries(x, rotation))
        out: Tensor = self.o_proj(read.transpose(1, 2).flatten(2))
        return out


class BlockLayer(DecoderLayer):
    """Decoder layer with `BlockAttention`."""

    self_attn: BlockAttention

    def __init__(self, size: LayerSize) -> None:
        super().__init__(size)
        self.self_attn = BlockAttention(size)


def spread(depth: int, count: int) -> tuple[int, ...]:
    """Hidden states at equal distances, from 2 to L - 2.

    Args:
        depth: Number of layers L of the target.
        count: Number of hidden states; a target with few layers has fewer.

    Returns:
        Their increasing indices. A single one is L // 2 + 1.
    """
    last = max(depth - 2, 2)
    if count == 1:
        return (min(depth // 2 + 1, depth),)
    places = (round(2 + step * (last - 2) / (count - 1)) for step in range(count))
    return tuple(sorted({min(place, depth) for place in places}))
