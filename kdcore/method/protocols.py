"""The extension points of training, nothing else.

All are structural: a plugin implements the methods and need not import this module. A component
is built as ``attribute(params, context)``: its own params model, validated, and a
`kdcore.components.construction.BuildContext`. Shapes: see `kdcore.method.records`. The extension
point of data sources is in `kdcore.data.source`, that of scores in `kdcore.data.responses.score`,
and those of decoding are in `kdcore.decoding.protocols` and `kdcore.decoding.engines.protocols`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from kdcore.method.records import LogitBatch, Part, SampledTokens, StateSizes


@runtime_checkable
class Gate(Protocol):
    """How much of the distillation loss each position receives. Gates multiply.

    A gate, ranked or not, may carry:

    - ``floor`` (float, default 0): the weight of a refused position. The logged acceptance rate is
      ``(weight - floor) / (1 - floor)``, meaned as ``normalize`` says.
    - ``teacher_classes`` (int or None, the default): how many of the teacher's best classes decide
      what it gives, None for all. A teacher cache of as many is enough for it. A splitter or
      divergence that needs as many may carry it too.
    - ``reference`` (str or None, the default): a third model, named as in a spec, whose logits the
      batch then has. A run has one; a drafter's has none, and held-out rows neither, on which such
      a gate is not measured.
    - ``any_tokenizer`` (bool, default False): whether it works where the teacher's classes are
      other tokens, in another number, than the student's. It does if ``teacher_classes`` is 0.
    """

    def __call__(self, batch: LogitBatch) -> Tensor:
        """Weights [B, T] in [0, 1], detached. Called under no_grad, on chunks of positions."""


@runtime_checkable
class RankedGate(Protocol):
    """A gate that compares positions with one another (top fractions), in two passes.

    Both run over one micro-batch: the first in chunks, so that [B, T, V] never exists whole.
    Whatever has ``score`` and ``weigh`` is ranked, whether or not it can also be called.

    A ranked gate may carry, beside what a `Gate` may:

    - ``within_rows`` (bool, default False): whether it compares the positions of one row only. The
      second pass is then called for each row.
    - ``temperatures(scores, weights) -> Tensor``: a method that gives, from the scores [N] and its
      own weights [N], the factors [N] above 0 of each position's loss temperature. Those of several
      gates multiply.
    - ``remember(scores)``: a method that is called after each optimizer step with the scores [M] of
      all its training positions, of all micro-batches and processes. What the gate keeps of them
      is its state (`Stateful`).
    """

    def score(self, batch: LogitBatch) -> Tensor:
        """Scores [B, T] float, independent of other positions."""

    def weigh(self, scores: Tensor, progress: float) -> Tensor:
        """Weigh the masked positions of a micro-batch, or of one row of it.

        Args:
            scores: [N] scores; N may be 0.
            progress: Share of the training done, in [0, 1].

        Returns:
            [N] weights in [0, 1].
        """


@runtime_checkable
class KnowledgeSplitter(Protocol):
    """Cuts parts of the knowledge into finer parts, or masks classes in them. Splitters chain.

    A splitter may carry:

    - ``any_tokenizer`` (bool, default False), as a gate; or ``joins_tokenizers`` (likewise): it
      makes parts whose K classes can be compared of parts whose classes are other tokens for the
      teacher than for the student.
    - ``reads_spans`` (bool, default False), if it joins: whether it reads the ``span`` and
      ``teacher_rest`` of the batch, which are else None.
    - ``bind(student, teacher)``: a method that is called once for a teacher with another tokenizer,
      with the meaning of each class of both models: the text of a token as bytes, or the name of a
      special token as a string.
    - ``keeps_classes`` (bool, default False): whether it leaves the classes of a position together.
      It is then accepted for multi-label classifiers, whose positions have two classes.
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
class Advantage(Protocol):
    """How much better or worse a sampled token was than expected: a policy gradient.

    The term ``policy`` of the loss is ``-w_t A_t log q(y_t)`` at each token of a response that was
    sampled during the training, with the advantage A_t and the weight w_t of the gates and of the
    sampling (`SampledTokens.importance`); its gradient is that of REINFORCE. Gates, normalisation,
    streams and momenta treat it like any term. On responses of the data it is 0.
    """

    def __call__(self, tokens: SampledTokens) -> Tensor:
        """Compute the advantages. Called under no_grad, on all rows of a micro-batch.

        Args:
            tokens: The tokens [B, T], each row a whole response. Rows must not see each other.

        Returns:
            [B, T] the advantages, of either sign; those outside the mask are not read.
        """


@runtime_checkable
class Matcher(Protocol):
    """Compares hidden states of student and teacher: a torch.nn.Module, which may have weights.

    Each matcher is a term of the loss with its own weight, to which the gates apply. Its weights
    are trained with the student's and stored in checkpoints; they are no part of the student that a
    run saves.

    A matcher may carry ``attention`` (bool, default False): whether it compares attention maps
    instead. Its pairs are then numbers of layers, from 1 to L. For hidden states [N, H] it gets
    maps [C, heads, S] of C queries: float32 scores of the S keys, before the softmax, with
    `kdcore.method.records.LOG_ZERO` for the keys that one of the two queries does not see, and
    gives [C]. It may then carry ``values`` (bool, default False): whether its maps are those of the
    layers' values with themselves, in place of queries and keys.

    What is compared, hidden states or queries, is that of the learned positions of a language
    model, and of all positions of a classifier's row, whose distance is their mean.

    Attributes:
        pairs: After ``bind``, the numbers of the hidden states that are compared: that of the
            student and that of the teacher, each as in `kdcore.method.records.StateSizes`.
    """

    pairs: tuple[tuple[int, int], ...]

    def bind(self, student: StateSizes, teacher: StateSizes) -> None:
        """Choose the pairs and create the weights, once, from torch's global generator.

        Args:
            student: The sizes of the student.
            teacher: The sizes of the teacher.

        Raises:
            UserError: The matcher names a hidden state that a model does not have.
        """

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Compute the distance at each position.

        Args:
            student: [N, H] hidden states of the student for each pair, with gradient.
            teacher: [N, H'] hidden states of the teacher for each pair, detached.

        Returns:
            [N] the distance, with gradient for the student's hidden states and the weights.
        """

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the weights, for the checkpoint."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any:
        """Restore the weights of `state_dict`, after ``bind``."""


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
        May write to and return the gradients it is given; parameters are only read. Those of a
        model that FSDP shards are DTensors, and ``to_local()`` is this process's shard.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Named buffers, for the checkpoint."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the buffers of `state_dict` back, before the first `combine`."""


@runtime_checkable
class Stateful(Protocol):
    """Any gate, splitter, divergence or advantage whose behaviour depends on past steps."""

    def step_done(self, metrics: Mapping[str, float]) -> None:
        """Update the state after a step.

        Args:
            metrics: Means of the step: ``loss``, ``progress``, each ``term/NAME`` before its
                weight, ``distilled``, the sum of those terms that the splitters make, and each
                gate's ``acceptance/NAME``.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Named tensors, for the checkpoint."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
