"""Sound drafters, a sound tree and sound verifiers, and those that break each in one way."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcore.decoding.sampling import draw
from kdcore.decoding.tree import chain, is_chain, shape_of, walk
from kdcore.errors import UserError
from kdcore.method.records import DraftTree, TreeShape, Verdict
from tests.kdcore.testing.components import Built
from tests.tiny.toy_drafter import Matrices, Params

LogProbs = Callable[[Tensor], Tensor]


class SoundTree(Built):
    """Two candidates at each depth, the likeliest alone expanded."""

    branches = True

    def __call__(self, logp: Tensor, active: Tensor) -> DraftTree:
        tokens = logp.topk(2).indices.flatten(1)
        return DraftTree(tokens, self.shape(logp.shape[1]), active[:, None].expand_as(tokens))

    def shape(self, depth: int) -> TreeShape:
        level = torch.arange(2 * depth) // 2
        return shape_of(torch.where(level == 0, -1, 2 * level - 2)[None])


class SoundGrower(SoundTree):
    expanded = 0

    def grow(
        self,
        logp: Tensor,
        following: Callable[[Tensor, Tensor], Tensor],
        depth: int,
        active: Tensor,
    ) -> DraftTree:
        found = [logp.topk(2).indices]
        while len(found) < depth:
            token = found[-1][:, self.expanded, None]
            found.append(following(torch.zeros_like(token), token)[:, 0].topk(2).indices)
        tokens = torch.cat(found, 1)
        return DraftTree(tokens, self.shape(depth), active[:, None].expand_as(tokens))


class ExpandsAnother(SoundGrower):
    """It asks about the second candidate, and puts what it hears below the first."""

    expanded = 1


class TwinChildren(SoundTree):
    def __call__(self, logp: Tensor, active: Tensor) -> DraftTree:
        tree = super().__call__(logp, active)
        return replace(tree, tokens=tree.tokens[:, ::2].repeat_interleave(2, 1))


class ChildrenFirst(SoundTree):
    """The chain from its end to its beginning."""

    def __call__(self, logp: Tensor, active: Tensor) -> DraftTree:
        depth = logp.shape[1]
        tokens = logp.argmax(-1)
        parents = torch.arange(1, depth + 1)
        parents[-1] = -1
        shape = replace(chain(depth, logp.device), parents=parents[None])
        return DraftTree(tokens, shape, active[:, None].expand_as(tokens))


class SeesSiblings(SoundTree):
    """A node attends to whatever stands before it."""

    def shape(self, depth: int) -> TreeShape:
        shape = super().shape(depth)
        return replace(shape, sees=torch.ones_like(shape.sees).tril())


class HidesBranches(SoundTree):
    branches = False


class TooDeep(SoundTree):
    def __call__(self, logp: Tensor, active: Tensor) -> DraftTree:
        return super().__call__(torch.cat([logp, logp[:, -1:]], 1), active)


class DraftsForAll(SoundTree):
    def __call__(self, logp: Tensor, active: Tensor) -> DraftTree:
        return super().__call__(logp, torch.ones_like(active))


class AveragesLevels(SoundTree):
    def __call__(self, logp: Tensor, active: Tensor) -> DraftTree:
        return super().__call__(logp.mean(0, keepdim=True).expand_as(logp), active)


class LeavesOrphans(SoundTree):
    """The first node is padding, and its children are not."""

    def __call__(self, logp: Tensor, active: Tensor) -> DraftTree:
        tree = super().__call__(logp, active)
        if logp.shape[1] == 1:
            return tree
        return replace(tree, mask=tree.mask & (torch.arange(tree.tokens.shape[1]) > 0))


class SoundDrafter(Built):
    """Drafts by a number that all tokens of a row make together."""

    layers: tuple[int, ...] = (0, 3)
    tree: Any = SoundTree()
    depth = 3

    def bind(self, target: Any, tokenizer: Any) -> None:
        self.classes = target.config.vocab_size
        table = torch.Generator().manual_seed(0)
        self.levels = torch.randn(97, self.depth, self.classes, generator=table).log_softmax(-1)

    def start(self, first: Tensor) -> None:
        self.state = first.clone()

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: Any
    ) -> DraftTree:
        self.read(tokens, lengths)
        return self.drafted(lengths > 0, generator)

    def read(self, tokens: Tensor, lengths: Tensor) -> None:
        for place in range(tokens.shape[1]):
            read = (self.state * 31 + tokens[:, place]) % 97
            self.state = torch.where(place < lengths, read, self.state)

    def drafted(self, active: Tensor, generator: Any) -> DraftTree:
        tree: DraftTree = self.tree(self.levels[self.state], active)
        return tree


class DraftsTwins(SoundDrafter):
    tree = TwinChildren()


class DraftsSeeingSiblings(SoundDrafter):
    tree = SeesSiblings()


class DraftsForFinished(SoundDrafter):
    def drafted(self, active: Tensor, generator: Any) -> DraftTree:
        return super().drafted(torch.ones_like(active), generator)


class ReadsPaddedTokens(SoundDrafter):
    def read(self, tokens: Tensor, lengths: Tensor) -> None:
        super().read(tokens, torch.where(lengths > 0, tokens.shape[1], 0))


class StaleCache(SoundDrafter):
    """Keeps its own first draft among the tokens read, accepted or not."""

    def drafted(self, active: Tensor, generator: Any) -> DraftTree:
        tree = super().drafted(active, generator)
        super().read(tree.tokens[:, :1], active.long())
        return tree


class NeverForgets(SoundDrafter):
    def __init__(self, params: object = None, context: object = None) -> None:
        self.served = 0

    def start(self, first: Tensor) -> None:
        self.state = (first + self.served) % 97
        self.served += 1


class AltersTarget(SoundDrafter):
    def bind(self, target: Any, tokenizer: Any) -> None:
        super().bind(target, tokenizer)
        with torch.no_grad():
            target.get_output_embeddings().weight.neg_()


class ListsLayers(SoundDrafter):
    layers = [0, 3]  # type: ignore[assignment]  # noqa: RUF012


class SoundSampler(SoundDrafter):
    """A sampled chain."""

    temperature = 1.0

    def drafted(self, active: Tensor, generator: Any) -> DraftTree:
        logp = self.levels[self.state]
        tokens = draw((logp / self.temperature).softmax(-1), generator)
        mask = active[:, None].expand_as(tokens)
        return DraftTree(tokens, chain(self.depth, tokens.device), mask, logp)


class DraftsGlobally(SoundSampler):
    def drafted(self, active: Tensor, generator: Any) -> DraftTree:
        return super().drafted(active, None)


class DraftsSeededOnly(SoundSampler):
    def drafted(self, active: Tensor, generator: Any) -> DraftTree:
        return super().drafted(active.to(generator.device), generator)


class MisstatesLogp(SoundSampler):
    temperature = 1.3


class SoundLearner(Matrices):
    """Drafts by a matrix a level."""

    def __init__(self, params: object = None, context: object = None) -> None:
        super().__init__(Params(), context)


class DetachesLevels(SoundLearner):
    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        return super().forward(tokens, features).detach()


class ForgetsALevel(SoundLearner):
    """The last level is trained as the one before it, and drafts as itself."""

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        return super().forward(tokens, features)[:, :, [0, 1, 1]]


class ClimbsUphill(SoundLearner):
    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        hidden = super().forward(tokens, features)
        return 2 * hidden.detach() - hidden


class OwnsTheEmbeddings(SoundLearner):
    """Stores the target's embeddings as its own."""

    def bind(self, target: Any, tokenizer: Any) -> None:
        super().bind(target, tokenizer)
        self.embeddings = target.get_input_embeddings()


class ThawsTheTarget(SoundLearner):
    def bind(self, target: Any, tokenizer: Any) -> None:
        super().bind(target, tokenizer)
        target.get_output_embeddings().requires_grad_(True)


class WritesToTheTarget(SoundLearner):
    """Trims the target's head while it is trained."""

    def bind(self, target: Any, tokenizer: Any) -> None:
        super().bind(target, tokenizer)
        self._target = [target]

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        with torch.no_grad():
            self._target[0].get_output_embeddings().weight.mul_(0.99)
        return super().forward(tokens, features)


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
