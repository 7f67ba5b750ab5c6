"""The extension points of speculative decoding: drafters, trees and verifiers.

All are structural: a plugin implements the methods and need not import this module. The extension
point of engines is in `kdcore.decoding.engines.protocols`, the records in `kdcore.decoding.tree`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from kdcore.decoding.engines.protocols import CompilingEngine
    from kdcore.decoding.tree import DraftTree, Verdict
    from kdcore.method.logits import Head


@runtime_checkable
class Drafter(Protocol):
    """Proposes continuations that the target then verifies. It keeps its own cache of B rows.

    A drafter may have an attribute ``tree``, the tree of its proposals, which a spec may replace.
    The default is the ``tree`` of its params.

    Attributes:
        layers: Indices of the target's hidden_states that it reads, () for none and before
            ``bind``; their concatenation is called features, F = len(layers) * H.
    """

    layers: tuple[int, ...]

    def bind(self, target: Any, tokenizer: Any) -> None:
        """Bind to the target model: share its head and embeddings, and create the weights.

        Args:
            target: The transformers model.
            tokenizer: Its tokenizer.

        Raises:
            UserError: The target does not fit, e.g. has no linear head or not the ``layers``.
        """

    def start(self, first: Tensor) -> None:
        """Reset the drafter and start B new rows.

        Args:
            first: [B] int64, the first token of each row, which has no feature before it.
        """

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: Generator | None
    ) -> DraftTree:
        """Propose a tree of continuations after each row's newest token.

        The call runs in torch's inference mode: training must not read tensors that it creates.

        Args:
            tokens: [B, A] int64 tokens committed since the last call (in the first call: since the
                row's first), right-padded to the longest row; the target has yet to run the last.
            features: [B, A, F] target features of the position *before* each of these tokens.
            lengths: [B] int64, the number of real tokens. 0 means that nothing was committed,
                since the row has finished or its prompt is one token; it proposes nothing.
            generator: Generator of all samples, on the tokens' device; None for torch's own.

        Returns:
            The proposed tree.
        """


@runtime_checkable
class TrainedDrafter(Drafter, Protocol):
    """A drafter with trained weights of its own: a torch.nn.Module.

    ``bind`` creates its parameters; weights shared with the target are not among them. Its forward,
    on B whole sequences, gives D hidden states for each position r, its anchor: that of level i
    (from 1) predicts the token at r + 1 + i from the features up to r and the tokens up to r + 1,
    like ``propose`` (a drafter that reads its own drafts reads the real tokens here).

    Attributes:
        depth: D, the number of tokens ahead.
        vocabulary: [V'] int64, increasing ids of the target's tokens that it can propose, or None
            for all.
    """

    depth: int
    vocabulary: Tensor | None

    @property
    def head(self) -> Head:
        """The map from a hidden state to the logits of ``vocabulary``."""

    def choose_vocabulary(self, counts: Tensor) -> None:
        """Choose ``vocabulary``, once, before training.

        Args:
            counts: [V] int64, the frequency of each token among the labels of the training rows.
        """

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Compute the hidden states that the head reads.

        Args:
            tokens: [B, T] int64, right-padded.
            features: [B, T, F] features of the target.

        Returns:
            The hidden states [B, T, D, H].
        """

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the tensors to store: weights, and the vocabulary if it chose one."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any:
        """Restore the tensors of `state_dict`, after ``bind``."""


@runtime_checkable
class CompiledDrafter(Drafter, Protocol):
    """A drafter whose passes an engine can run, after ``bind``."""

    def use_engine(self, engine: CompilingEngine | None) -> None:
        """Choose what runs the passes from the next ``start`` on.

        Args:
            engine: The engine; None for torch, as at first.

        Raises:
            UserError: The engine cannot run the passes; they then run in torch.
        """


@runtime_checkable
class TreeBuilder(Protocol):
    """Arranges the proposals of a drafter that gives one distribution per depth.

    ``branches`` (bool, default False): whether a node of its trees may have several children, so
    that a verifier which follows a single chain is refused with it.

    A tree that is sized by what a round costs may carry ``tune(measure)``: it is called by each
    decoder, before the first round, with a function that takes the time of some passes and returns
    a `kdcore.decoding.trials.round_cost.RoundCost`. Until then it works without.

    A tree may also carry ``account``, a `kdcore.decoding.trials.drafting_account.DraftingAccount`:
    where it says so, a round does not ask the drafter, which reads the tokens of such rounds in its
    next proposal. Without an account, or one of the decoder's, each round asks the drafter.
    """

    def __call__(self, logp: Tensor, active: Tensor) -> DraftTree:
        """Build a draft tree.

        Args:
            logp: [B, D, V] log-probs at depths 1 to D.
            active: [B] bool, the rows that propose.

        Returns:
            The tree.
        """


@runtime_checkable
class TreeGrower(Protocol):
    """Arranges the proposals of a drafter that reads its own, a pass of it for each depth.

    ``branches`` (bool, default False): as of a `TreeBuilder`.
    """

    def grow(
        self,
        logp: Tensor,
        following: Callable[[Tensor, Tensor], Tensor],
        depth: int,
        active: Tensor,
    ) -> DraftTree:
        """Grow a draft tree with at most D - 1 calls of ``following``.

        Args:
            logp: [B, V] log-probs of the tokens at depth 1.
            following: Function (places [B, M], tokens [B, M]) -> [B, M, V], the log-probs after M
                tokens. Each token follows a token of the previous call, whose index is in
                ``places``; in the first call they follow the root, and places are all 0.
            depth: D, the maximum depth of the tree.
            active: [B] bool, the rows that propose.

        Returns:
            The tree.
        """


@runtime_checkable
class Verifier(Protocol):
    """Decides which branch of a draft tree the target keeps.

    A verifier may have two further attributes. ``greedy`` (bool, default False): whether it always
    takes the most likely token; it is then lossless at temperature 0 and refused above. ``chain``
    (bool, default False): whether it follows a single chain; it is then refused with a tree whose
    ``branches`` is True, and raises UserError for any other branching tree.

    Attributes:
        lossless: Whether the emitted tokens follow the target's distribution exactly.
    """

    lossless: bool

    def __call__(
        self, tree: DraftTree, logp: Callable[[Tensor], Tensor], generator: Generator | None
    ) -> Verdict:
        """Choose the accepted path of a draft tree.

        Request only the slots on the path: top-p of 64 nodes can cost as much as their pass.

        Args:
            tree: Draft tree.
            logp: Function from slots [B, M] int64 to [B, M, V] float32, the log-probs of the
                target's next token after each slot (0: the root, 1 + n: node n), with temperature,
                top-k and so on applied.
            generator: Generator of all samples, on the tree's device; None for torch's own.

        Returns:
            The accepted path and the next token.
        """
