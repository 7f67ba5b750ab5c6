"""Verifiers: from the target's log-probs, which path of a draft tree is kept.

Each asks only for the slots on its way, see `kdcore.method.protocols.Verifier`.
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
    from kdcore import BuildContext, Params
    from kdcore_baselines.drafting_components import TypicalParams

LogProbs: TypeAlias = Callable[[Tensor], Tensor]


class Greedy:
    """The path whose tokens equal the target's likeliest ones, then the likeliest after it."""

    lossless = True
    greedy = True

    def __init__(self, params: Params, context: BuildContext) -> None: ...

    def __call__(
        self, tree: DraftTree, logp: LogProbs, generator: torch.Generator | None
    ) -> Verdict:
        return walk(tree, lambda slot: logp(slot[:, None]).squeeze(1).argmax(-1))


class Sampling:
    """Sample from the target; go on as long as the sample is among the candidates.

    In distribution it is the same as to try the candidates one by one, each with its probability
    under the target, renormalised without those refused before: both stop at a candidate with
    exactly the target's probability. So it is lossless for any candidates, however they arose.
    """

    lossless = True

    def __init__(self, params: Params, context: BuildContext) -> None: ...

    def __call__(
        self, tree: DraftTree, logp: LogProbs, generator: torch.Generator | None
    ) -> Verdict:
        return walk(tree, lambda slot: draw(logp(slot[:, None]).squeeze(1).exp(), generator))


class ChainSampling:
    """Keep a drafted token with min(1, target / draft); replace the first refused one.

    The replacement is sampled from (target - draft)+. A token that was not sampled counts as
    drafted with certainty. Raises UserError for a tree that branches.
    """

    lossless = True
    chain = True

    def __init__(self, params: Params, context: BuildContext) -> None: ...

    def __call__(
        self, tree: DraftTree, logp: LogProbs, generator: torch.Generator | None
    ) -> Verdict:
        rows, nodes = tree.tokens.shape
        order = torch.arange(nodes, device=tree.tokens.device)
        if not is_chain(tree.shape):
            raise UserError(
                "chain_sampling follows a single chain, and the draft is a tree",
                "choose the tree 'chain', or the verifier 'sampling'",
            )
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
            # Without a surplus the two are equal but for rounding.
            refused = offered & ~accepted & (surplus.sum(1) > 0)
            left = torch.where(refused[:, None], surplus, target)
            token = torch.where(moving & ~accepted, draw(left, generator), token)
            path[:, node] = torch.where(accepted, node, -1)
            moving = accepted
            if not moving.any():
                return Verdict(path, token)
        last = logp(order.new_full((rows, 1), nodes)).squeeze(1).exp()
        return Verdict(path, torch.where(moving, draw(last, generator), token))


class Typical:
    """The longest path of tokens with probability above min(epsilon, delta exp(-entropy)).

    Of several, the likeliest; then a sample from the target. It is not lossless.
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

        # From here on the root stands in front, as in sees: it is always accepted.
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
