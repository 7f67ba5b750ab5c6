"""The extension points, nothing else.

All are structural: a plugin implements the methods and need not import this module. A component
is built as ``attribute(params, context)``: its own params model, validated, and a `BuildContext`.
Shapes: see `kdcore.method.records`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kdcore.method.engine import CompilingEngine as CompilingEngine
from kdcore.method.engine import Engine as Engine
from kdcore.method.matcher import Matcher as Matcher
from kdcore.method.score import AnswerScore as AnswerScore

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from kdcore.method.choice import Choice
    from kdcore.method.logits import Head
    from kdcore.method.records import DraftTree, LogitBatch, Part, Row, Verdict


class NamedModel(Protocol):
    """What a component sees of a loaded model: the model, its tokenizer and where it came from."""

    @property
    def model(self) -> Any:
        """The transformers model."""

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""

    @property
    def name(self) -> str:
        """The name that messages use."""

    @property
    def digest(self) -> str:
        """The sha256 of config and weights."""


class BuildContext(Protocol):
    """What a component may ask for while it is built."""

    def build(self, choice: Choice) -> Any:
        """Build a component named inside this one's params (e.g. the gate that is inverted)."""

    def load_model(self, model: str) -> NamedModel:
        """A frozen language model, named as a spec names one."""


@runtime_checkable
class Gate(Protocol):
    """How much of the distillation loss each position receives. Gates multiply.

    A gate may carry ``floor`` (float, default 0): the weight of a refused position. The logged
    acceptance rate is ``(weight - floor) / (1 - floor)``, meaned as ``normalize`` says.

    A gate, ranked or not, may carry ``teacher_classes`` (int or None, the default): how many of the
    teacher's best classes decide what it gives, all for None. A teacher cache that holds as many
    is enough for it. A splitter or divergence that cannot do with fewer may carry it too.

    A gate, ranked or not, may carry ``reference`` (str or None, the default): a third model, named
    as a spec names one, whose logits it then finds in the batch. A run has one such model; a
    drafter's has none, and nor have held-out rows, on which such a gate is not measured.

    A gate, ranked or not, may carry ``any_tokenizer`` (bool, default False): whether it works where
    the teacher's classes are other tokens than the student's, and other in number. One whose
    ``teacher_classes`` is 0 always does.
    """

    def __call__(self, batch: LogitBatch) -> Tensor:
        """Weights [B, T] in [0, 1], detached. Called under no_grad, on chunks of positions."""


@runtime_checkable
class RankedGate(Protocol):
    """A gate that compares positions with one another (top fractions), in two passes.

    Both run over one micro-batch: the first in chunks, so that [B, T, V] never exists whole.
    Whatever has ``score`` and ``weigh`` is ranked, whether or not it can also be called.
    """

    def score(self, batch: LogitBatch) -> Tensor:
        """Scores [B, T] float, independent of other positions."""

    def weigh(self, scores: Tensor) -> Tensor:
        """Weights [N] in [0, 1] from the scores [N] of all masked positions; N may be 0."""


@runtime_checkable
class KnowledgeSplitter(Protocol):
    """Cuts parts of the knowledge into finer parts, or masks classes in them. Splitters chain.

    A splitter may carry ``joins_tokenizers`` (bool, default False): whether it makes parts whose K
    classes can be compared out of parts whose classes are different tokens for student and teacher;
    or ``any_tokenizer``, as a gate. One that joins may carry ``reads_spans`` (bool, default False):
    whether it reads the ``span`` and ``teacher_rest`` of the batch, which it else does not find.
    One that leaves the classes of a position together may carry ``keeps_classes`` (bool, default
    False): it is then accepted for multi-label classifiers, whose positions have two classes.
    """

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names that come out when ``names`` go in. The first splitter gets ('kd',)."""

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        """The parts, split; K may change, [B, T] may not."""


@runtime_checkable
class Divergence(Protocol):
    """How far the student's distribution is from the teacher's, per position."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[B, T] from the log-probs [B, T, K] of both; never reduces over positions.

        A class of probability exactly 0 in both contributes exactly nothing, and no NaN.
        """


@runtime_checkable
class MomentumPolicy(Protocol):
    """Named gradients in, the gradient of the update out. State lives in named buffers only.

    ``owns_momentum`` (bool): the policy gives the whole update, so the optimizer must be
    plain SGD with momentum 0; the spec check says so.

    A policy may have a method ``norms() -> {name: float}``: the L2 norm of each of its buffers,
    which are logged where ``training.probe_every`` asks for it.
    """

    owns_momentum: bool

    def streams(self, terms: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Which terms share a backward pass: stream name -> its terms. Each term once.

        Terms of equal momentum belong in one stream, since a momentum is linear in the gradient.
        """

    def combine(
        self, gradients: Mapping[str, Sequence[Tensor]], parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        """One gradient for each parameter from {stream: one gradient for each parameter}.

        Called once per optimizer step, after accumulation and all-reduce, before clipping.
        May write to and return the gradients it is given; parameters are only read.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Named buffers, for the checkpoint."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the buffers of `state_dict` back, before the first `combine`."""


@runtime_checkable
class Stateful(Protocol):
    """Any gate, splitter or divergence whose behaviour depends on past steps."""

    def step_done(self, metrics: Mapping[str, float]) -> None:
        """Update the state after a step.

        Args:
            metrics: Means of the step: ``loss``, ``progress``, each ``term/NAME`` before its
                weight, and each gate's ``acceptance/NAME``.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Named tensors, for the checkpoint."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""


@runtime_checkable
class DataSource(Protocol):
    """Examples, and how one becomes a `Row`.

    A source may carry ``model_class`` (str): the transformers class its rows are for, if not
    AutoModelForCausalLM; ``classes`` (list of str): a classifier's labels in their order; and a
    static method ``recognise(path)`` for `kdcore init --data`: the params that read a file, without
    its path, {} if the defaults do, or None if the source does not read such files. With
    ``multi_label = True`` a row has a position for each label, whose value is 0 or 1.

    A source may have a method ``fingerprint() -> str | None``, which tells all that its examples
    and its ``encode`` depend on beside the tokenizer (digests of files, params, a version of its
    code) without reading the examples. Rows are then encoded once, and later runs find them.
    Without it, or if it returns None, each process encodes the rows again and keeps them in memory.
    """

    def read(self) -> Sequence[Any]:
        """All examples, in a fixed order. `kdcore.data.Conversation` for language models.

        The sequence may read an example when it is asked for, as `kdcore.data.examples` does.
        """

    def encode(self, example: Any, tokenizer: Any, max_length: int) -> Row:
        """Tokenise, shift and mask one example. The processor is an image model's tokenizer."""


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
        """Bind to the target model: share its head and embeddings, check that they fit."""

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
        head: Map from a hidden state to the logits of ``vocabulary``.
    """

    depth: int
    vocabulary: Tensor | None
    head: Head

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
    a `kdcore.decoding.round_cost.RoundCost`. Until then it works without.
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
