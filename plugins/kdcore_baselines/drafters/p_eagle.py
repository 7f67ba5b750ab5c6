"""P-EAGLE: EAGLE-3 whose later tokens are predicted from mask slots, in the same pass.

    g_{r,1} = FC(l_r, m_r, h_r)             e_{r,1} = emb(x_{r+1})
    g_{r,i} = FC(u)                         e_{r,i} = v,             i = 2 ... D
    o_{r,i} = L_N(... L_1(e_{r,i}, g_{r,i}))
    q_{r+1+i} = softmax(W' norm(o_{r,i}))

Source: P-EAGLE (arXiv 2602.01469). u takes the place of the target's hidden states and v that of a
token's embedding; both are learned and shared by all slots. Slot i of row r has position r + i - 1
and reads the entries up to r and the slots 2 to i of its row. L_1 is EAGLE-3's layer, which reads
both vectors; the others are plain. W' is the drafter's own head.

In decoding the slots stand after the committed entries of a row, so that the attention is causal
over both; the next round overwrites them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcore import DraftTree
from kdcore.decoding.drafters.traceable import DrafterPass, at_places
from kdcore.decoding.layers.decoder_layer import Attend, DecoderLayer, LayerSize
from kdcore.models.anatomy import final_scale, layer_count
from kdcore.models.features import low_middle_high
from kdcore_baselines.drafters import slot_layouts
from kdcore_baselines.drafters.eagle3 import Layer, OwnHead
from kdcore_baselines.drafters.slots import EntriesAndSlots

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from transformers import PreTrainedModel

    from kdcore import BuildContext
    from kdcore.decoding.drafters.layouts import ExportedDrafter, ImportedDrafter
    from kdcore.models.loading.loaded import LoadedModel
    from kdcore_baselines.drafting_components import PEagleParams


class PEagle(OwnHead):
    """P-EAGLE drafter, a `kdcore.decoding.protocols.TrainedDrafter`."""

    layouts = ("vllm",)

    def __init__(self, params: PEagleParams, context: BuildContext) -> None:
        super().__init__(params.vocabulary)
        self.params, self.depth = params, params.depth
        self.tree = context.build(params.tree)

    def bind(self, target: PreTrainedModel, tokenizer: Any) -> None:
        super().bind(target, tokenizer)
        self.read_states(target, self.params.features or low_middle_high(layer_count(target)))
        size = self.layer_size = LayerSize.of(target, self.params.ffn)
        with torch.device(target.device):
            self.fc = nn.Linear(len(self.layers) * size.hidden, size.hidden, bias=False)
            self.midlayer = Layer(size)
            self.upper = nn.ModuleList(DecoderLayer(size) for _ in range(self.params.layers - 1))
            self.norm = nn.RMSNorm(size.hidden, size.eps)
            self.lm_head = nn.Linear(size.hidden, len(self.head_rows()), bias=False)
            self.mask_features = nn.Parameter(torch.randn(self.fc.in_features))
            self.mask_token = nn.Parameter(torch.empty(size.hidden))
        self.norm.weight.data.copy_(final_scale(target))
        self.lm_head.weight.data.copy_(self.head_rows())
        self.mask_token.data.copy_(self.mean_embedding())

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        # the last row has no token after it; what it predicts is not learned
        count, slots = tokens.shape[1], self.depth - 1
        row = torch.arange(count, device=tokens.device)
        later = row[:, None] + torch.arange(1, self.depth, device=tokens.device)
        hidden, embedded = self._with_slots(
            self._fused(features), self.embed(tokens.roll(-1, dims=1)), count * slots
        )
        positions = torch.cat([row, later.flatten()])[None]
        attends = [EntriesAndSlots(count)] * self.params.layers
        read = self._pass(hidden, embedded, positions, attends)
        first, ahead = read[:, :count, None], read[:, count:]
        by_row = ahead.reshape(len(read), count, slots, ahead.shape[2])
        return torch.cat([first, by_row], dim=2)

    def traceable(self) -> DrafterPass:
        size = self.layer_size
        widths = {"hidden": size.hidden, "embedded": size.hidden}
        return DrafterPass(self, widths, self.params.layers, size)

    def traced(self, given: Mapping[str, Tensor], attends: Iterator[Attend]) -> dict[str, Tensor]:
        read = self._pass(given["hidden"], given["embedded"], given["positions"], attends)
        return {"logp": self.logp(at_places(read, given["places"]))}

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: torch.Generator | None
    ) -> DraftTree:
        slots = self.depth - 1
        entries = self._with_slots(self._fused(features), self.embed(tokens), slots)
        real = torch.arange(tokens.shape[1] + slots, device=tokens.device) < lengths[:, None]
        mask = self._slot(entries[0])
        hidden, embedded = (
            torch.where(real[..., None], each, slot)
            for each, slot in zip(entries, mask, strict=True)
        )
        if self.compiled is not None:
            logp = self.compiled.read(lengths, slots, hidden=hidden, embedded=embedded)["logp"]
        else:
            logp = self._read(hidden, embedded, lengths)
        return self.in_target(self.tree(logp, lengths > 0))

    def exported(self, layout: str, target: LoadedModel) -> ExportedDrafter:
        return slot_layouts.p_eagle_exported(self, target)

    @classmethod
    def imported(
        cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], target: LoadedModel
    ) -> ImportedDrafter | None:
        return slot_layouts.p_eagle_imported(config, weights, target)

    def _read(self, hidden: Tensor, embedded: Tensor, lengths: Tensor) -> Tensor:
        """Add entries and slots [B, A, H]; return the log-probs [B, D, V'] after the newest."""
        positions = self.cache.positions(hidden.shape[1])
        read = self._pass(hidden, embedded, positions, self.cache.reading(positions))
        self.cache.lengths += lengths
        newest = (lengths - 1).clamp(min=0)[:, None]
        return self.logp(at_places(read, newest + torch.arange(self.depth, device=lengths.device)))

    def _slot(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The two inputs [H] of a slot, in the dtype of other inputs."""
        return self.fc(self.mask_features).to(like), self.mask_token.to(like)

    def _with_slots(self, fused: Tensor, embedded: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Append slots to the inputs of the entries, [B, A, H] each."""
        slot = (each.expand(len(fused), count, -1) for each in self._slot(fused))
        both = zip((fused, embedded.to(fused)), slot, strict=True)
        hidden, token = (torch.cat(each, dim=1) for each in both)
        return hidden, token

    def _pass(
        self, hidden: Tensor, embedded: Tensor, positions: Tensor, attends: Iterable[Attend]
    ) -> Tensor:
        """Run the layers on entries [B, A, H] at their positions, up to the head."""
        rotation = self.layer_size.rotation(positions)
        first, *others = attends
        hidden = self.midlayer(hidden, embedded, rotation, first)
        for layer, attend in zip(self.upper, others, strict=True):
            hidden = layer(hidden, rotation, attend)
        read: Tensor = self.norm(hidden)
        return read
