"""Sound drafters, a sound tree and sound verifiers, and those that break each in one way."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcore.decoding.sampling import draw
from kdcore.decoding.tree import DraftTree, TreeShape, chain, shape_of
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
