"""EAGLE-3: one decoder layer, which drafts token after token and reads its own hidden states.

    g_{r,1} = FC(l_r, m_r, h_r)             g_{r,i} = o_{r,i-1},  i = 2 ... D
    a_{r,i} = g_{r,i} + attention(norm(emb(x_{r+i})), norm(g_{r,i}))
    o_{r,i} = a_{r,i} + SwiGLU(norm(a_{r,i}))
    q_{r+1+i} = softmax(W' norm(o_{r,i}))

Source: Li et al. 2025 (arXiv 2503.01840), section 3, and the layer as it was published. l, m and h
are hidden states of the target; W' is a head of its own. The query of pass i stands at position
r + i - 1; it reads the keys of the first pass at the rows up to r, and those of the passes 2 to i
at row r. That is what decoding computes when its drafts are the x that really follow: training
unrolls its passes (the paper's training-time test), each over all rows at once.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcore import DraftTree, TreeGrower, UserError
from kdcore.decoding.drafters.module import DraftingModule
from kdcore.decoding.drafters.row_cache import RowCache
from kdcore.decoding.layers.cpu_pass import CpuPass
from kdcore.decoding.layers.decoder_layer import Attend, Attention, LayerSize, Rotation, SwiGLU
from kdcore.method.logits import Head
from kdcore.models.anatomy import final_scale, layer_count
from kdcore.models.features import FeatureTap, low_middle_high
from kdcore_baselines import eagle3_layouts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from kdcore import BuildContext
    from kdcore.models.loaded import LoadedModel
    from kdcore_baselines.drafting_components import Eagle3Params


class Eagle3(DraftingModule):
    """The drafter ``eagle3``, a `kdcore.method.protocols.TrainedDrafter`.

    Its parts and their weights bear the names that they have in published folders.
    """

    layers: tuple[int, ...] = ()
    layouts = eagle3_layouts.LAYOUTS

    def __init__(self, params: Eagle3Params, context: BuildContext) -> None:
        super().__init__(params.vocabulary)
        self.params, self.depth = params, params.depth
        self.tree = context.build(params.tree)

    @property
    def tree(self) -> TreeGrower:
        """How candidates are arranged. Raises UserError for a tree that cannot grow."""
        return self._tree

    @tree.setter
    def tree(self, tree: Any) -> None:
        if not isinstance(tree, TreeGrower):
            raise UserError(
                f"the tree {type(tree).__name__} arranges distributions that are known together, "
                "and eagle3 has one after the other, each of which depends on its drafts",
                "choose dynamic, backbone or chain",
            )
        self._tree = tree

    def bind(self, target: PreTrainedModel, tokenizer: Any) -> None:
        """Raises UserError also for hidden states that the target does not have."""
        super().bind(target, tokenizer)
        self.layers = self.params.features or low_middle_high(layer_count(target))
        FeatureTap(target, self.layers)  # refuses those that it does not have
        size = self.layer_size = self._size(target)
        with torch.device(target.device):
            self.fc = nn.Linear(len(self.layers) * size.hidden, size.hidden, bias=False)
            self.midlayer = Layer(size)
            self.norm = nn.RMSNorm(size.hidden, size.eps)
            self.lm_head = nn.Linear(size.hidden, len(self._head_rows()), bias=False)
        self.norm.weight.data.copy_(final_scale(target))
        self.lm_head.weight.data.copy_(self._head_rows())

    @property
    def head(self) -> Head:
        """From a hidden state to the logits of ``vocabulary``: its own, trained."""
        return Head(self.lm_head.weight)

    def choose_vocabulary(self, counts: Tensor) -> None:
        """As all do; the head begins as the target's rows of these tokens."""
        super().choose_vocabulary(counts)
        self.lm_head.weight.data.copy_(self._head_rows())

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        """[B, T, D, H] hidden states, as the head reads them, from [B, T] and [B, T, F].

        At the last rows there are too few tokens behind; what they give predicts nothing known.
        """
        rows = torch.arange(tokens.shape[1], device=tokens.device)[None]
        attend, hidden = Unrolled(), self._fused(features)
        by_pass = []
        for level in range(self.depth):
            following = tokens.roll(-1 - level, dims=1)
            hidden = self._pass(hidden, following, rows + level, attend)
            by_pass.append(hidden)
        read: Tensor = self.norm(torch.stack(by_pass, dim=2))
        return read

    def start(self, first: Tensor) -> None:
        self.cpu_pass = CpuPass(self)
        with self.cpu_pass.at_work():
            self.cache = RowCache(len(first), 1, self.layer_size, like=self.norm.weight)

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: torch.Generator | None
    ) -> DraftTree:
        count = max(int(lengths.max()), 1)
        positions = self.cache.positions(count)
        (attend,) = self.cache.reading(positions)
        rows = torch.arange(len(tokens), device=tokens.device)
        with self.cpu_pass.at_work():
            fused = self._fused(features[:, :count])
            hidden = self._pass(fused, tokens[:, :count], positions, attend)
            newest = hidden[rows, (lengths - 1).clamp(min=0)]  # [B, H]
            first = self.logp(self.norm(newest))
        self.cache.lengths += lengths
        tree = self.tree.grow(first, _Drafts(self, newest), self.depth, lengths > 0)
        return self.in_target(tree)

    def exported(
        self, layout: str, target: LoadedModel
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return eagle3_layouts.exported(self, layout, target)

    @classmethod
    def imported(
        cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], target: LoadedModel
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        return eagle3_layouts.imported(config, weights, target)

    def _size(self, target: PreTrainedModel) -> LayerSize:
        chosen = self.params.layer.model_dump(exclude_none=True)
        return replace(LayerSize.of(target, chosen.pop("ffn", None)), **chosen)

    def _fused(self, features: Tensor) -> Tensor:
        fused: Tensor = self.fc(features.to(self.dtype))
        return fused

    def _pass(self, hidden: Tensor, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """[B, A, H] of what stands at ``positions``: a hidden state, and the token after it."""
        embedded = self.embed(tokens).to(hidden)
        out: Tensor = self.midlayer(hidden, embedded, self.layer_size.rotation(positions), attend)
        return out

    def _head_rows(self) -> Tensor:
        """[V', H] what the head begins as: the target's, its scale with it."""
        head = self._target_head()
        own = head if self.vocabulary is None else head.rows(self.vocabulary)
        if own.weight is None:
            raise ValueError("bind refuses a target without a linear head")
        return own.weight.detach() * own.scale


class Layer(nn.Module):
    """A decoder layer whose attention also reads the token: its input is 2 H wide."""

    def __init__(self, size: LayerSize) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(size.hidden, size.eps)
        self.hidden_norm = nn.RMSNorm(size.hidden, size.eps)
        self.self_attn = Attention(size, 2 * size.hidden)
        self.post_attention_layernorm = nn.RMSNorm(size.hidden, size.eps)
        self.mlp = SwiGLU(size)

    def forward(
        self, hidden: Tensor, embedded: Tensor, rotation: Rotation, attend: Attend
    ) -> Tensor:
        """[B, A, H] from two of [B, A, H]."""
        both = torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(both, rotation, attend)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class Unrolled:
    """An `Attend` for the passes of training, each over all rows, called once for each in turn."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.keys.append(key)
        self.values.append(value)
        rows, key_heads, length, width = key.shape
        query = query.view(rows, key_heads, -1, length, width) / math.sqrt(width)
        scores = query @ self.keys[0][:, :, None].mT  # [B, key heads, group, T, T]
        later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
        own = [(query * each[:, :, None]).sum(-1, keepdim=True) for each in self.keys[1:]]
        weights = torch.cat([scores, *own], dim=-1).softmax(-1)
        read = weights[..., :length] @ self.values[0][:, :, None]
        for place, each in enumerate(self.values[1:]):
            read = read + weights[..., length + place, None] * each[:, :, None]
        return read.flatten(1, 2)


class _Drafts:
    """What follows drafts of a round, pass by pass: ``following`` of a `TreeGrower`.

    hidden: [B, H] of each row's newest token.
    """

    def __init__(self, drafter: Eagle3, hidden: Tensor) -> None:
        self.drafter, self.hidden = drafter, hidden[:, None]
        self.sees = torch.ones(len(hidden), 1, 0, dtype=torch.bool, device=hidden.device)
        self.position = drafter.cache.lengths[:, None] - 1

    def __call__(self, places: Tensor, tokens: Tensor) -> Tensor:
        rows, count = places.shape
        above = torch.arange(rows, device=places.device)[:, None]
        own = torch.eye(count, dtype=torch.bool, device=places.device).expand(rows, -1, -1)
        self.sees = torch.cat([self.sees[above, places], own], dim=-1)
        self.position = self.position + 1
        (attend,) = self.drafter.cache.drafting(self.sees)
        with self.drafter.cpu_pass.at_work():
            self.hidden = self.drafter._pass(
                self.hidden[above, places],
                self.drafter.target_ids(tokens),
                self.position.expand(-1, count),
                attend,
            )
            return self.drafter.logp(self.drafter.norm(self.hidden))
