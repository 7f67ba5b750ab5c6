"""Medusa: extra heads on the target, each of which predicts one token further ahead.

    h_i = f_r + SiLU(W_i f_r + b_i),  W_i = 0 and b_i = 0 at first,  q_{r+1+i} = softmax(W h_i)

Source: Cai et al. 2024 (arXiv 2401.10774), section 2.1.1. f is the target's last hidden state, W
its head. The paper trains a copy of W for each head; here all heads share W, which is frozen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdcore import DraftTree
from kdcore.decoding.drafters.traceable import DrafterPass, TraceableDrafter, at_places
from kdcore.models.anatomy import layer_count
from kdcore_baselines.drafters import medusa_layout

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

    from kdcore import BuildContext
    from kdcore.decoding.drafters.layouts import ExportedDrafter, ImportedDrafter
    from kdcore.decoding.layers.decoder_layer import Attend
    from kdcore.models.loading.loaded import LoadedModel
    from kdcore_baselines.drafting_components import MedusaParams


class Medusa(TraceableDrafter):
    """Medusa drafter, a `kdcore.decoding.protocols.TrainedDrafter` without a cache."""

    layouts = ("vllm",)

    def __init__(self, params: MedusaParams, context: BuildContext) -> None:
        super().__init__(params.vocabulary)
        self.depth = params.depth
        self.tree = context.build(params.tree)

    def bind(self, target: PreTrainedModel, tokenizer: Any) -> None:
        super().bind(target, tokenizer)
        self.layers = (layer_count(target),)
        hidden = target.config.get_text_config().hidden_size
        with torch.device(target.device):
            self.heads = nn.Linear(hidden, self.depth * hidden)
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        return self._ahead(features)

    def traceable(self) -> DrafterPass:
        return DrafterPass(self, {"features": self.heads.in_features})

    def traced(self, given: Mapping[str, Tensor], attends: Iterator[Attend]) -> dict[str, Tensor]:
        return {"logp": self.logp(self._ahead(given["features"]))}

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: torch.Generator | None
    ) -> DraftTree:
        newest = (lengths - 1).clamp(min=0)[:, None]
        final = at_places(features, newest)
        if self.compiled is not None:
            logp = self.compiled.run(features=final)["logp"]
        else:
            logp = self.logp(self._ahead(final))
        return self.in_target(self.tree(logp[:, 0], lengths > 0))

    def exported(self, layout: str, target: LoadedModel) -> ExportedDrafter:
        return medusa_layout.exported(self, target)

    @classmethod
    def imported(
        cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], target: LoadedModel
    ) -> ImportedDrafter | None:
        return medusa_layout.imported(config, weights, target)

    def _ahead(self, features: Tensor) -> Tensor:
        final = features.to(self.dtype)
        ahead = F.silu(self.heads(final)).view(*final.shape[:2], self.depth, -1)
        return final[:, :, None] + ahead
