"""Trees over one distribution per depth, none of which knows what stands beside it above."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kdcore.decoding import tree
from kdcore.records import DraftTree

if TYPE_CHECKING:
    from kdcore.hookspecs import NoParams
    from kdcore.protocols import BuildContext
    from kdcore_baselines.drafting_components import BackboneParams


class Backbone:
    """k candidates at each depth, of which the likeliest alone is expanded."""

    def __init__(self, k: int) -> None:
        self.k = k

    def __call__(self, logp: Tensor, active: Tensor) -> DraftTree:
        _, depth, _ = logp.shape
        tokens = logp.topk(self.k, dim=-1).indices.flatten(1)
        shape = tree.backbone(depth, self.k, logp.device)
        return DraftTree(tokens, shape, active[:, None].expand_as(tokens))


def chain(params: NoParams, context: BuildContext) -> Backbone:
    """The likeliest token at each depth."""
    return Backbone(k=1)


def backbone(params: BackboneParams, context: BuildContext) -> Backbone:
    """FastEagle's tree."""
    return Backbone(params.k)
