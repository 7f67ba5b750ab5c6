"""FastEagle: a cascade of N decoder layers, the i-th of which predicts the i-th token ahead.

    g_r = FC(s(l_r), s(m_r), s(h_r))
    h_1 = L_1(FC(g_r, s(emb(x_{r+1}))))     h_i = L_i(h_{i-1}), i = 2 ... N
    q_{r+1+i} = softmax(W norm_i(h_i))

Source: arXiv 2509.20416, section 3. l, m and h are hidden states of the target, and W is its head.
s, which divides by the root mean square, and the norms are kdcore's additions. One pass gives all N
tokens, and the drafter never reads its own drafts, so its cache holds committed rows only and is
never rolled back. In training and in decoding, row r is the feature of token r with the token after
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import DraftTree, UserError
from kdcore.decoding.drafters.row_cache import RowCache
from kdcore.decoding.drafters.traceable import DrafterPass, TraceableDrafter, at_places
from kdcore.decoding.layers.decoder_layer import Attend, DecoderLayer, LayerSize, causal
from kdcore.models.anatomy import context_of, final_scale, layer_count
from kdcore.models.features import FeatureTap, low_middle_high
from kdcore_fasteagle import vllm_layout

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from transformers import PreTrainedModel

    from kdcore import BuildContext
    from kdcore.decoding.drafters.layouts import ExportedDrafter, ImportedDrafter
    from kdcore.models.loading.loaded import LoadedModel
    from kdcore_fasteagle.plugin import FastEagleParams


UNSURE = 0.3
"""Initial scale of the levels' norms, relative to the target's final norm. It keeps the logits of
an untrained level small; at full size, a level starts with confident mistakes."""
PROBE = 32
"""Maximum number of tokens that measure the size of the target's hidden states."""


class FastEagle(TraceableDrafter):
    """FastEagle drafter, a `kdcore.decoding.protocols.TrainedDrafter`."""

    layouts = ("vllm",)

    def __init__(self, params: FastEagleParams, context: BuildContext) -> None:
        super().__init__(params.vocabulary)
        self.params, self.depth = params, params.depth
        self.tree = context.build(params.tree)

    def bind(self, target: PreTrainedModel, tokenizer: Any) -> None:
        super().bind(target, tokenizer)
        chosen = self.params.features or low_middle_high(layer_count(target))
        blocks = self.read_states(target, chosen)
        size = self.layer_size = LayerSize.of(target, self.params.ffn)
        with torch.device(target.device):
            self.fuse_features = nn.Linear(len(self.layers) * size.hidden, size.hidden, bias=False)
            self.fuse_token = nn.Linear(2 * size.hidden, size.hidden, bias=False)
            self.levels = nn.ModuleList(DecoderLayer(size) for _ in range(self.depth))
        count = {"each": self.depth, "one": 1, "none": 0}[self.params.norms]
        scale = UNSURE * final_scale(target).repeat(count, 1)
        if count:
            self.norms: Tensor = nn.Parameter(scale)
        else:  # DDP refuses parameters that no loss reaches
            self.register_buffer("norms", scale, persistent=False)
        if self.params.init == "target":
            activation = getattr(target.config.get_text_config(), "hidden_act", None)
            self._begin_as_last_of(blocks, activation)
            self._begin_with(_size_of_high(target, self.layers))
        else:
            self._begin_with(torch.ones((), device=target.device))

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        # the last row has no token after it; what it predicts is not learned
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        embedded = self.embed(tokens.roll(-1, dims=1))
        return self._cascade(embedded, features, positions, [causal] * self.depth)

    def traceable(self) -> DrafterPass:
        hidden = self.layer_size.hidden
        widths = {"embedded": hidden, "features": len(self.layers) * hidden}
        return DrafterPass(self, widths, self.depth, self.layer_size)

    def traced(self, given: Mapping[str, Tensor], attends: Iterator[Attend]) -> dict[str, Tensor]:
        hidden = self._cascade(given["embedded"], given["features"], given["positions"], attends)
        return {"logp": self.logp(at_places(hidden, given["places"]))}

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: torch.Generator | None
    ) -> DraftTree:
        if self.compiled is not None:
            found = self.compiled.read(lengths, embedded=self.embed(tokens), features=features)
            logp = found["logp"].squeeze(1)
        else:
            logp = self.logp(self.read(self.cache, tokens, features, lengths))
        return self.in_target(self.tree(logp, lengths > 0))

    def read(self, cache: RowCache, tokens: Tensor, features: Tensor, lengths: Tensor) -> Tensor:
        """Add new entries to a cache and compute the hidden states of each row's newest one.

        Args:
            cache: Cache of the rows; it is updated.
            tokens: [B, A] int64, the token after each entry.
            features: [B, A, F] hidden states of the target.
            lengths: [B] int64, the number of real entries; the others are padding.

        Returns:
            The hidden states [B, D, H].
        """
        positions = cache.positions(tokens.shape[1])
        attends = cache.reading(positions)
        hidden = self._cascade(self.embed(tokens), features, positions, attends)
        cache.lengths += lengths
        rows = torch.arange(len(tokens), device=tokens.device)
        return hidden[rows, (lengths - 1).clamp(min=0)]

    def exported(self, layout: str, target: LoadedModel) -> ExportedDrafter:
        return vllm_layout.exported(self, self.layer_size, self.params.normalise, target)

    @classmethod
    def imported(
        cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], target: LoadedModel
    ) -> ImportedDrafter | None:
        return vllm_layout.imported(config, weights, target)

    def _cascade(
        self, embedded: Tensor, features: Tensor, positions: Tensor, attends: Iterable[Attend]
    ) -> Tensor:
        """Compute [B, A, D, H] from features and embedded next tokens at ``positions``."""
        by_layer = features.to(self.dtype).chunk(len(self.layers), dim=-1)
        fused = self.fuse_features(torch.cat([self._scaled(each) for each in by_layer], dim=-1))
        token = self._scaled(embedded.to(fused))
        hidden = self.fuse_token(torch.cat([fused, token], dim=-1))
        rotation = self.layer_size.rotation(positions)
        by_level = []
        for level, attend in zip(self.levels, attends, strict=True):
            hidden = level(hidden, rotation, attend)
            by_level.append(hidden)
        stacked = torch.stack(by_level, dim=2)
        if not len(self.norms):
            return stacked
        return F.rms_norm(stacked, (hidden.shape[-1],), eps=self.layer_size.eps) * self.norms

    def _scaled(self, states: Tensor) -> Tensor:
        """Scale states [..., H] to mean square 1 if ``normalise`` is set.

        Hidden states grow with depth, and an embedding can be a hundred times smaller: without
        scaling, the next token would have almost no effect.
        """
        if not self.params.normalise:
            return states
        return F.rms_norm(states, states.shape[-1:], eps=self.layer_size.eps)

    @torch.no_grad()
    def _begin_with(self, size: Tensor) -> None:
        """Initialise the cascade's input to the high hidden state plus the token.

        ``size`` [] is the root mean square of that input: the updates of the target's last layers
        have a size that fits their own input.
        """
        hidden = self.layer_size.hidden
        whole = torch.eye(hidden, device=size.device)
        features, token = self.fuse_features.weight, self.fuse_token.weight
        high = features.chunk(len(self.layers), dim=1)[self.layers.index(max(self.layers))]
        high += whole * (size if self.params.normalise else 1)
        token *= 0.1
        token[:, :hidden] += whole
        token[:, hidden:] += whole * size / 2
        if self.params.init == "new":
            for name, weight in self.levels.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_((2 * self.depth) ** -0.5)  # keeps the size over that many additions

    def _begin_as_last_of(self, blocks: nn.ModuleList, activation: str | None) -> None:
        """Copy the target's last layers; a target with too few repeats its first one."""
        for place, level in enumerate(self.levels):
            block = blocks[max(len(blocks) - self.depth + place, 0)]
            weights = block.state_dict()
            if activation != "silu" or _shapes(weights) != _shapes(level.state_dict()):
                raise UserError(
                    f"init: target cannot copy the target's layers ({type(block).__name__}), whose "
                    "architecture or sizes differ from the levels'",
                    "set init: new, or remove ffn if it differs from the target's",
                )
            level.load_state_dict(weights)


@torch.no_grad()
def _size_of_high(target: PreTrainedModel, layers: tuple[int, ...]) -> Tensor:
    """Measure the root mean square [] of the highest hidden state read, as a median over tokens."""
    if target.device.type == "meta":  # without weights, in a preflight
        return torch.ones((), device=target.device)
    count = min(PROBE, context_of(target) or PROBE)
    classes = target.config.get_text_config().vocab_size
    tokens = (torch.arange(count, device=target.device) * 997 % classes)[None]
    high = max(layers)
    with FeatureTap(target, (high,)).listening() as heard:
        target(input_ids=tokens, use_cache=False, logits_to_keep=1)
    return heard[high][0].float().square().mean(-1).sqrt().median()


def _shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}
