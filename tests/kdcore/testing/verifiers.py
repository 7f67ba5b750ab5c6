"""Sound verifiers, and those that break each in one way."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcore.decoding.sampling import draw
from kdcore.decoding.tree import DraftTree, Verdict, is_chain, walk
from kdcore.errors import UserError
from tests.kdcore.testing.components import Built
from tests.kdcore.testing.drafting_components import LogProbs


class SoundVerifier(Built):
    """Try the candidates in order with min(1, target / draft), renormalising after a refusal.

    So it needs the residual, which `kdcore`'s own sampling verifier does not.
    """

    lossless = True

    def __call__(self, tree: DraftTree, logp: LogProbs, generator: Any) -> Verdict:
        rows, nodes = tree.tokens.shape
        row = torch.arange(rows)
        slot, path = torch.zeros(rows, dtype=torch.int64), torch.full((rows, nodes), -1)
        left = logp(slot[:, None])[:, 0].exp()
        length = torch.zeros(rows, dtype=torch.int64)
        parents = tree.shape.parents.expand(rows, -1)
        for node in range(nodes):
            offered = (parents[:, node] + 1 == slot) & self.offers(tree)[:, node]
            token = tree.tokens[:, node].clamp(min=0)
            if tree.logp is None:
                draft = torch.zeros_like(left).scatter(1, token[:, None], 1.0)
            else:
                draft = tree.logp[:, node].exp()
            chance = torch.rand(rows, generator=generator, dtype=torch.float64)
            kept = offered & (chance * draft[row, token] < self.likelihood(left)[row, token])
            path[row[kept], length[kept]] = node
            length += kept
            slot = torch.where(kept, node + 1, slot)
            refused = (offered & ~kept)[:, None]
            left = torch.where(refused, self.residual(left, draft), left)
            left = torch.where(kept[:, None], logp(self.asks(slot)[:, None])[:, 0].exp(), left)
        return Verdict(path, draw(left, generator))

    def offers(self, tree: DraftTree) -> Tensor:
        return tree.mask

    def likelihood(self, left: Tensor) -> Tensor:
        return left

    def residual(self, left: Tensor, draft: Tensor) -> Tensor:
        rest = (left - draft).clamp(min=0)
        return rest / rest.sum(-1, keepdim=True).clamp(min=1e-9)

    def asks(self, slot: Tensor) -> Tensor:
        return slot


class NoResidual(SoundVerifier):
    """What replaces a refused token is drawn from the whole target."""

    def residual(self, left: Tensor, draft: Tensor) -> Tensor:
        return left


class KeepsTooMuch(SoundVerifier):
    """A little more than the target's probability allows."""

    def likelihood(self, left: Tensor) -> Tensor:
        return torch.where(left > 0, left + 0.05, left)


class KeepsPadding(SoundVerifier):
    def offers(self, tree: DraftTree) -> Tensor:
        return torch.ones_like(tree.mask)


class AsksTheParent(SoundVerifier):
    """After a kept node it goes on with what the target said before it."""

    def asks(self, slot: Tensor) -> Tensor:
        return (slot - 1).clamp(min=0)


class VerifiesGlobally(SoundVerifier):
    def __call__(self, tree: DraftTree, logp: LogProbs, generator: Any) -> Verdict:
        return super().__call__(tree, logp, None)


class VerifiesSeededOnly(SoundVerifier):
    def __call__(self, tree: DraftTree, logp: LogProbs, generator: Any) -> Verdict:
        generator.get_state()
        return super().__call__(tree, logp, generator)


class KeepsNothing(SoundVerifier):
    """Lossless, and of no use."""

    def offers(self, tree: DraftTree) -> Tensor:
        return torch.zeros_like(tree.mask)


class WritesMask(SoundVerifier):
    def __call__(self, tree: DraftTree, logp: LogProbs, generator: Any) -> Verdict:
        verdict = super().__call__(tree, logp, generator)
        tree.mask[:] = False
        return verdict


class SoundGreedy(Built):
    lossless = greedy = True

    def __call__(self, tree: DraftTree, logp: LogProbs, generator: Any) -> Verdict:
        return walk(tree, lambda slot: logp(slot[:, None])[:, 0].argmax(-1))


class SecondBest(SoundGreedy):
    """The bonus is the second likeliest token."""

    def __call__(self, tree: DraftTree, logp: LogProbs, generator: Any) -> Verdict:
        verdict = super().__call__(tree, logp, generator)
        last = (
            verdict.path.amax(1) + 1 if verdict.path.shape[1] else torch.zeros_like(verdict.token)
        )
        return replace(verdict, token=logp(last[:, None])[:, 0].topk(2).indices[:, 1])


class SoundLossy(SoundGreedy):
    """Keeps what the target gives any chance, and says that it is not lossless."""

    lossless = greedy = False

    def __call__(self, tree: DraftTree, logp: LogProbs, generator: Any) -> Verdict:
        def choose(slot: Tensor) -> Tensor:
            left = logp(slot[:, None])[:, 0]
            offered = tree.mask & (tree.shape.parents + 1 == slot[:, None])
            chance = left.gather(1, tree.tokens).masked_fill(~offered, -torch.inf)
            if not chance.shape[1]:
                return left.argmax(-1)
            likely = chance.amax(1) > -4
            best = tree.tokens.gather(1, chance.argmax(1, keepdim=True)).squeeze(1)
            return torch.where(likely, best, left.argmax(-1))

        return walk(tree, choose)


class HidesChain(SoundVerifier):
    """It refuses trees that branch, and does not say so."""

    def __call__(self, tree: DraftTree, logp: LogProbs, generator: Any) -> Verdict:
        if not is_chain(tree.shape):
            raise UserError("a tree", "give a chain")
        return super().__call__(tree, logp, generator)


class SkipsNode(SoundLossy):
    """The path lacks its first node."""

    def __call__(self, tree: DraftTree, logp: LogProbs, generator: Any) -> Verdict:
        verdict = super().__call__(tree, logp, generator)
        path = verdict.path.clone()
        long = verdict.accepted > 1
        path[long] = path[long].roll(-1, 1).index_fill(1, torch.tensor([path.shape[1] - 1]), -1)
        return replace(verdict, path=path)
