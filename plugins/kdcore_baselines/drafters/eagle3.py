"""EAGLE-3: one decoder layer that drafts token by token and reads its own hidden states.

    g_{r,1} = FC(l_r, m_r, h_r)             g_{r,i} = o_{r,i-1},  i = 2 ... D
    a_{r,i} = g_{r,i} + attention(norm(emb(x_{r+i})), norm(g_{r,i}))
    o_{r,i} = a_{r,i} + SwiGLU(norm(a_{r,i}))
    q_{r+1+i} = softmax(W' norm(o_{r,i}))

Source: Li et al. 2025 (arXiv 2503.01840), section 3, and the published layer. l, m and h are
hidden states of the target; W' is the drafter's own head. The query of pass i has position
r + i - 1; it reads the keys of the first pass at the rows up to r, and those of passes 2 to i at
row r. Decoding computes the same if its drafts are the tokens x that follow: training unrolls the
passes (the paper's training-time test), each over all rows at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcore import DraftTree, TreeGrower, UserError
from kdcore.decoding.drafters.traceable import DrafterPass, TraceableDrafter, at_places
from kdcore.decoding.layers.decoder_layer import Attend, Attention, LayerSize, Rotation, SwiGLU
from kdcore.method.logits import Head
from kdcore.models.anatomy import final_scale, layer_count
from kdcore.models.features import low_middle_high
from kdcore_baselines.drafters import eagle3_layouts
from kdcore_baselines.drafters.eagle3_attention import Unrolled

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from kdcore import BuildContext
    from kdcore.decoding.drafters.layouts import ExportedDrafter, ImportedDrafter
    from kdcore.models.loading.loaded import LoadedModel
    from kdcore_baselines.drafting_components import Eagle3Params


class OwnHead(TraceableDrafter):
    """A drafter that fuses hidden states, and whose own head begins as the target's.

    ``bind`` creates its modules.
    """

    fc: nn.Linear
    lm_head: nn.Linear

    def _fused(self, features: Tensor) -> Tensor:
        """FC: [B, A, H] from features [B, A, F]."""
        fused: Tensor = self.fc(features.to(self.dtype))
        return fused

    @property
    def head(self) -> Head:
        """Trained head of the drafter: maps a hidden state to the logits of ``vocabulary``."""
        return Head(self.lm_head.weight)

    def choose_vocabulary(self, counts: Tensor) -> None:
        """Choose the draft vocabulary and copy the target's head rows of its tokens.

        Args:
            counts: [V] int64 frequency of each token of the target.
        """
        super().choose_vocabulary(counts)
        self.lm_head.weight.data.copy_(self.head_rows())


class Eagle3(OwnHead):
    """EAGLE-3 drafter, a `kdcore.decoding.protocols.TrainedDrafter`.

    Its modules and weights have the names of the published checkpoints.
    """

    layouts = eagle3_layouts.LAYOUTS

    def __init__(self, params: Eagle3Params, context: BuildContext) -> None:
        super().__init__(params.vocabulary)
        self.params, self.depth = params, params.depth
        self.tree = context.build(params.tree)

    @property
    def tree(self) -> TreeGrower:
        """Tree of the candidates; setting a tree that cannot grow raises UserError."""
        return self._tree

    @tree.setter
    def tree(self, tree: Any) -> None:
        if not isinstance(tree, TreeGrower):
            raise UserError(
                f"the tree {type(tree).__name__} requires all distributions at once, but those of "
                "eagle3 depend on its drafts",
                "choose the tree dynamic, autotune, backbone or chain",
            )
        self._tree = tree

    def bind(self, target: PreTrainedModel, tokenizer: Any) -> None:
        super().bind(target, tokenizer)
        self.read_states(target, self.params.features or low_middle_high(layer_count(target)))
        size = self.layer_size = self._size(target)
        with torch.device(target.device):
            self.fc = nn.Linear(len(self.layers) * size.hidden, size.hidden, bias=False)
            self.midlayer = Layer(size)
            self.norm = nn.RMSNorm(size.hidden, size.eps)
            self.lm_head = nn.Linear(size.hidden, len(self.head_rows()), bias=False)
        self.norm.weight.data.copy_(final_scale(target))
        self.lm_head.weight.data.copy_(self.head_rows())

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        # the last rows have too few tokens after them; what they predict is not learned
        rows = torch.arange(tokens.shape[1], device=tokens.device)[None]
        attend, hidden = Unrolled(), self._fused(features)
        by_pass = []
        for level in range(self.depth):
            following = tokens.roll(-1 - level, dims=1)
            hidden = self._pass(hidden, self.embed(following), rows + level, attend)
            by_pass.append(hidden)
        read: Tensor = self.norm(torch.stack(by_pass, dim=2))
        return read

    def traceable(self) -> DrafterPass:
        size = self.layer_size
        return DrafterPass(self, {"hidden": size.hidden, "embedded": size.hidden}, 1, size)

    def traced(self, given: Mapping[str, Tensor], attends: Iterator[Attend]) -> dict[str, Tensor]:
        hidden = self._pass(given["hidden"], given["embedded"], given["positions"], next(attends))
        chosen = at_places(hidden, given["places"])
        return {"states": hidden, "logp": self.logp(self.norm(chosen))}

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: torch.Generator | None
    ) -> DraftTree:
        newest, first = self._read(self._fused(features), self.embed(tokens), lengths)
        tree = self.tree.grow(first, _Drafts(self, newest), self.depth, lengths > 0)
        return self.in_target(tree)

    def exported(self, layout: str, target: LoadedModel) -> ExportedDrafter:
        return eagle3_layouts.exported(self, self.layer_size, layout, target)

    @classmethod
    def imported(
        cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], target: LoadedModel
    ) -> ImportedDrafter | None:
        return eagle3_layouts.imported(config, weights, target)

    def _size(self, target: PreTrainedModel) -> LayerSize:
        chosen = self.params.layer.model_dump(exclude_none=True)
        return replace(LayerSize.of(target, chosen.pop("ffn", None)), **chosen)

    def _read(self, fused: Tensor, embedded: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Add the entries [B, A, H] of each row; return the newest one's state and log-probs."""
        newest = (lengths - 1).clamp(min=0)[:, None]
        if self.compiled is not None:
            found = self.compiled.read(lengths, hidden=fused, embedded=embedded)
            return at_places(found["states"], newest)[:, 0], found["logp"][:, 0]
        positions = self.cache.positions(embedded.shape[1])
        (attend,) = self.cache.reading(positions)
        hidden = at_places(self._pass(fused, embedded, positions, attend), newest)[:, 0]
        self.cache.lengths += lengths
        return hidden, self.logp(self.norm(hidden))

    def _draft(
        self, hidden: Tensor, embedded: Tensor, positions: Tensor, sees: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the drafts [B, A, H] after a row's entries; return their states and log-probs."""
        if self.compiled is not None:
            found = self.compiled.draft(sees, positions, hidden=hidden, embedded=embedded)
            return found["states"], found["logp"]
        (attend,) = self.cache.drafting(sees)
        hidden = self._pass(hidden, embedded, positions, attend)
        return hidden, self.logp(self.norm(hidden))

    def _pass(self, hidden: Tensor, embedded: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the layer on hidden states [B, A, H] and the embedded tokens after them."""
        rotation = self.layer_size.rotation(positions)
        out: Tensor = self.midlayer(hidden, embedded.to(hidden), rotation, attend)
        return out


class Layer(nn.Module):
    """Decoder layer whose attention also reads the token embedding: its input has width 2 H."""

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
        """Run the layer.

        Args:
            hidden: [B, A, H] hidden states.
            embedded: [B, A, H] embeddings of the next tokens.
            rotation: RoPE rotation of the positions.
            attend: Attention over the cached and new keys.

        Returns:
            The new hidden states [B, A, H].
        """
        both = torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(both, rotation, attend)
        out: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return out


class _Drafts:
    """Next-token distributions of a round's drafts, pass by pass (``following`` of `TreeGrower`).

    ``hidden`` is the hidden state [B, H] of each row's newest token.
    """

    def __init__(self, drafter: Eagle3, hidden: Tensor) -> None:
        self.drafter, self.hidden = drafter, hidden[:, None]
        self.sees = torch.ones(len(hidden), 1, 0, dtype=torch.bool, device=hidden.device)
        rows = drafter.cache if drafter.compiled is None else drafter.compiled
        self.position = rows.lengths[:, None] - 1

    def __call__(self, places: Tensor, tokens: Tensor) -> Tensor:
        rows, count = places.shape
        above = torch.arange(rows, device=places.device)[:, None]
        own = torch.eye(count, dtype=torch.bool, device=places.device).expand(rows, -1, -1)
        self.sees = torch.cat([self.sees[above, places], own], dim=-1)
        self.position = self.position + 1
        self.hidden, logp = self.drafter._draft(
            self.hidden[above, places],
            self.drafter.embed(self.drafter.target_ids(tokens)),
            self.position.expand(-1, count),
            self.sees,
        )
        return logp
