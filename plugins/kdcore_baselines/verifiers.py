"""Verifiers: choose the accepted path of a draft tree from the target's log-probs.

Each requests only the slots on its path; see `kdcore.decoding.protocols.Verifier`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from kdcore import DraftTree, UserError, Verdict
from kdcore.decoding.sampling import draw
from kdcore.decoding.tree import is_chain, walk

if TYPE_CHECKING:
    from kdcore import BuildContext, Params, TreeShape
    from kdcore_baselines.drafting_components import TypicalParams

LogProbs: TypeAlias = Callable[[Tensor], Tensor]


class Greedy:
    """Verifier that accepts the path of the target's most likely tokens, then adds the next one."""

    lossless = True
    greedy = True

    def __init__(self, params: Params, context: BuildContext) -> None: ...

    def __call__(
        self, tree: DraftTree, logp: LogProbs, generator: torch.Generator | None
    ) -> Verdict:
        return walk(tree, lambda slot: logp(slot[:, None]).squeeze(1).argmax(-1))


class Sampling:
    """Verifier that samples from the target and continues while the sample is a candidate.

    The distribution is the same as that of trying the candidates one by one, each with its target
    probability, renormalised without the rejected ones: both stop at a candidate with exactly the
    target's probability. So it is lossless for candidates from any drafter.
    """

    lossless = True

    def __init__(self, params: Params, context: BuildContext) -> None: ...

    def __call__(
        self, tree: DraftTree, logp: LogProbs, generator: torch.Generator | None
    ) -> Verdict:
        return walk(tree, lambda slot: draw(logp(slot[:, None]).squeeze(1).exp(), generator))


class ChainSampling:
    """Verifier that accepts a drafted token with min(1, target / draft).

    It replaces the first rejected token by a sample from (target - draft)+. A token that was not
    sampled counts as drafted with probability 1. A branching tree raises UserError.
    """

    lossless = True
    chain = True

    def __init__(self, params: Params, context: BuildContext) -> None:
        self.known: TreeShape | None = None
        """The last shape that is a chain: the host waits for the device to check another one."""

    def __call__(
        self, tree: DraftTree, logp: LogProbs, generator: torch.Generator | None
    ) -> Verdict:
        rows, nodes = tree.tokens.shape
        order = torch.arange(nodes, device=tree.tokens.device)
        if nodes and tree.shape is not self.known and not is_chain(tree.shape):
            raise UserError(
                "chain_sampling requires a chain, but the draft is a branching tree",
                "choose the tree 'chain', or the verifier 'sampling'",
            )
        self.known = tree.shape if nodes else self.known
        moving = torch.ones(rows, dtype=torch.bool, device=order.device)
        token, path = tree.tokens.new_zeros(rows), torch.full_like(tree.tokens, -1)
        for node in range(nodes):
            target = logp(order.new_full((rows, 1), node)).squeeze(1).exp()
            drafted = tree.tokens[:, node, None]
            draft = (
                torch.zeros_like(target).scatter(1, drafted, 1.0)
                if tree.logp is None
                else tree.logp[:, node].exp()
            )
            chance = torch.rand(rows, 1, generator=generator, device=order.device)
            offered = moving & tree.mask[:, node]
            likely = chance * draft.gather(1, drafted) < target.gather(1, drafted)
            accepted = offered & likely.squeeze(1)
            surplus = (target - draft).clamp(min=0)
            # Without a surplus the two are equal up to rounding.
            refused = offered & ~accepted & (surplus.sum(1) > 0)
            left = torch.where(refused[:, None], surplus, target)
            token = torch.where(moving & ~accepted, draw(left, generator), token)
            path[:, node] = torch.where(accepted, node, -1)
            moving = accepted
            if moving.device.type == "cpu" and not moving.any():
                return Verdict(path, token)
        last = logp(order.new_full((rows, 1), nodes)).squeeze(1).exp()
        return Verdict(path, torch.where(moving, draw(last, generator), token))


class Typical:
    """Verifier that accepts the longest path of typical tokens. It is not lossless.

    A token is typical if its target probability is above min(epsilon, delta exp(-entropy)). Among
    several longest paths it accepts the most likely one, then samples from the target.
    """

    lossless = False

    def __init__(self, params: TypicalParams, context: BuildContext) -> None:
        self.epsilon, self.delta = params.epsilon, params.delta

    def __call__(
        self, tree: DraftTree, logp: LogProbs, generator: torch.Generator | None
    ) -> Verdict:
        rows, nodes = tree.tokens.shape
        row = torch.arange(rows, device=tree.tokens.device)
        target = logp(torch.arange(1 + nodes, device=row.device).expand(rows, -1))
        entropy = -(target.exp() * target).sum(-1)
        threshold = (self.delta * (-entropy).exp()).clamp(max=self.epsilon)
        above = (tree.shape.parents + 1).expand(rows, -1)
        token_logp = target[row[:, None], above, tree.tokens]
        typical = (token_logp.exp() > threshold.gather(1, above)) & tree.mask

        # From here on the root comes first, as in sees; it is always accepted.
        typical = functional.pad(typical, (1, 0), value=True)
        token_logp = functional.pad(token_logp, (1, 0))
        accepted = (typical[:, None] | ~tree.shape.sees).all(-1)
        depth = torch.where(accepted, tree.shape.depth, -1)
        path_logp = (token_logp[:, None] * tree.shape.sees).sum(-1)
        longest = depth == depth.max(1, keepdim=True).values
        end = path_logp.masked_fill(~longest, -torch.inf).argmax(1)

        on_path = tree.shape.sees.expand(rows, -1, -1)[row, end, 1:]
        node = torch.arange(nodes, device=row.device)
        path = torch.where(on_path, node, nodes).sort(1).values
        path = torch.where(path < nodes, path, -1)
        return Verdict(path, draw(target[row, end].exp(), generator))
