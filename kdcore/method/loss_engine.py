"""Hidden states x head in chunks, over masked positions only; one gradient for each stream.

Peak memory holds the logits of one chunk, whatever B, T and V are. The result does not depend on
the chunk's length. What leaves is a scalar for each stream of terms whose backward hands the
gradients already computed to the body: one forward, and one backward per stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcore.method.gating import accepted_share, gate_all, gate_chunk, outside_range
from kdcore.method.generators import drawing_on, one_generator_each
from kdcore.method.known_gradients import known
from kdcore.method.logits import ALIGNED, AlignedLogits, HiddenLogits, TeacherLogits
from kdcore.method.objective import TASK, Objective
from kdcore.method.positions import LearnedChunk, MaskedPositions
from kdcore.method.records import Batch, of_shape
from kdcore.method.schedule import value_at

IMPORTANCE = "importance"
"""The name beside the gates' of the weight of tokens that a mixture of both models sampled."""


@dataclass(frozen=True, slots=True)
class StepLoss:
    """Loss of one micro-batch.

    The terms and acceptances are the micro-batch's shares of the step's means: their sum over the
    micro-batches is the step's mean.

    Attributes:
        losses: Scalar to call backward on, by stream.
        terms: Mean of each term before its weight.
        acceptance: Accepted share by gate label, averaged like an ungated term.
        scores: The scores [N] of the ranked gates by label.
        outside: Number of weights outside the range of their gate by label; see `outside_range`.
    """

    losses: dict[str, Tensor]
    terms: dict[str, Tensor]
    acceptance: dict[str, Tensor]
    scores: dict[str, Tensor]
    outside: dict[str, Tensor]

    @property
    def sound(self) -> Tensor:
        """Whether each loss is finite and each gate's weight in its range, as a scalar."""
        finite = torch.stack(list(self.losses.values())).isfinite().all()
        return torch.stack([finite, *(count == 0 for count in self.outside.values())]).all()

    @property
    def figures(self) -> dict[str, Tensor]:
        """``loss``, each ``term/NAME`` and ``acceptance/GATE``, as scalars without a graph."""
        loss = torch.stack([loss.detach() for loss in self.losses.values()]).sum()
        terms = {f"term/{name}": value for name, value in self.terms.items()}
        return {"loss": loss, **terms} | {f"acceptance/{k}": v for k, v in self.acceptance.items()}


class LossEngine:
    """Applies an objective to the masked positions of a batch.

    Args:
        objective: Loss to compute.
        streams: Terms that share a backward pass, by stream; terms of other rows, which the
            objective does not have, are left out.
        chunk: Number of positions computed at once.
    """

    def __init__(
        self, objective: Objective, streams: Mapping[str, tuple[str, ...]], chunk: int
    ) -> None:
        self.objective = objective
        members = {
            s: tuple(t for t in terms if t in objective.weights) for s, terms in streams.items()
        }
        self.streams = {stream: terms for stream, terms in members.items() if terms}
        self.chunk = chunk

    def __call__(
        self,
        student: HiddenLogits,
        teacher: TeacherLogits,
        batch: Batch,
        *,
        whole: float,
        progress: float,
        generator: torch.Generator,
        reference: TeacherLogits | None = None,
    ) -> StepLoss:
        """Compute the loss of one micro-batch.

        L = sum over streams and their terms of weight * sum_n share_n * term_n / whole, with
        share_n = 1 / |row of n|, or 1 for 'token', or 1 / (sum of the row's gate) for 'accepted';
        the task term, which has no gate, then keeps 1 / |row of n|.

        Args:
            student: Logits of the student at the N masked positions.
            teacher: Logits of the teacher at the same positions.
            batch: Padded rows.
            whole: Denominator of the step's mean over all micro-batches and processes: the number
                of rows with a masked position, or of masked positions if ``normalize`` is 'token'.
            progress: Share of the training done, in [0, 1].
            generator: Source of the seeds of all that is drawn, on the CPU.
            reference: Logits of a third model, which only gates read.

        Returns:
            The loss of each stream, with the figures to log.
        """
        gates = self.objective.gates
        generators = one_generator_each(gates, generator, batch.mask.device)
        drawing = drawing_on(batch.mask.device, generator)
        positions = MaskedPositions.of(batch, student, teacher, reference, progress, drawing)
        rows = batch.positions // batch.mask.shape[1]
        per_row = 1.0 / batch.mask.sum(1)[rows]
        weights = {label: torch.empty_like(per_row) for label in gates}
        if isinstance(teacher, AlignedLogits):
            weights[ALIGNED] = teacher.compared.to(per_row.dtype)
            if self.objective.reads_spans:
                rest = teacher.rest(value_at(self.objective.tau, progress), self.chunk)
                positions = replace(
                    positions, uncut=teacher.span_on_cpu, span=teacher.span, teacher_rest=rest
                )
        if batch.sampled and (self.objective.advantage or batch.teacher_share):
            positions = self._sampled(positions, weights)
        scores: dict[str, Tensor] = {}
        if gates and self.objective.looks_ahead:
            softening, scores = gate_all(gates, positions, self.chunk, weights, generators)
            # no gate reads the reference again
            positions = replace(positions, reference=None, softening=softening)
        ungated, share = self._shares(rows, per_row, weights, whole)

        scheduled = self.objective.weight_of(progress)
        every = TASK in scheduled or positions.span is not None
        features = getattr(teacher, "features", None)  # a cache has none
        means = {term: share.new_zeros(()) for term in scheduled}
        streams = {stream: _StreamLoss(student) for stream in self.streams}
        for chunk in positions.chunks(self.chunk):
            place = chunk.place
            if not self.objective.looks_ahead:
                gate_chunk(gates, chunk.logits, place, weights, generators)
            gate = _product([weight[place] for weight in weights.values()], share[place])
            kept = _kept(gate, every)
            learned = positions.learned(chunk, kept, features)
            with torch.enable_grad():
                found = self.objective.terms(learned.logits, gate[None, kept])
                sums = {
                    name: ((ungated if name == TASK else share)[place][kept] * term[0]).sum()
                    for name, term in found.items()
                }
                members = {s: [t for t in own if t in sums] for s, own in self.streams.items()}
                losses = {
                    stream: torch.stack([scheduled[t] * sums[t] for t in terms]).sum()
                    for stream, terms in members.items()
                    if terms  # others are those of matchers
                }
            for name, total in sums.items():
                means[name] += total.detach()
            for count, (stream, loss) in enumerate(losses.items(), start=1):
                streams[stream].add(loss, learned, retain_graph=count < len(losses))

        acceptance = {
            label: (ungated * accepted_share(gates.get(label), weight)).sum()
            for label, weight in weights.items()
            if label != IMPORTANCE
        }
        outside = {label: outside_range(gate, weights[label]) for label, gate in gates.items()}
        attached = {stream: loss.attached() for stream, loss in streams.items()}
        gated = share * _product(list(weights.values()), share)
        ours, theirs = student.layers, getattr(teacher, "layers", None)
        for label, matcher in self.objective.matchers.items():
            assert ours is not None and theirs is not None  # refused before the run
            total = ours.distance(matcher, theirs, gated, self.chunk)
            means[label] += total.detach()
            for stream in (s for s, members in self.streams.items() if label in members):
                attached[stream] = attached[stream] + scheduled[label] * total
        return StepLoss(attached, means, acceptance, scores, outside)

    def gate_weights(
        self,
        student: HiddenLogits,
        teacher: TeacherLogits,
        batch: Batch,
        *,
        progress: float,
        generator: torch.Generator,
        reference: TeacherLogits | None = None,
    ) -> dict[str, Tensor]:
        """What each gate gives the N masked positions of a micro-batch, [N], as in a step."""
        gates = self.objective.gates
        generators = one_generator_each(gates, generator, batch.mask.device)
        positions = MaskedPositions.of(batch, student, teacher, reference, progress, generator)
        like = torch.empty(len(positions.labels), device=positions.labels.device)
        weights = {label: torch.empty_like(like) for label in gates}
        gate_all(gates, positions, self.chunk, weights, generators)
        return weights

    @torch.no_grad()
    def _sampled(self, positions: MaskedPositions, weights: dict[str, Tensor]) -> MaskedPositions:
        """The positions with their advantages; the importance joins the gates' weights."""
        tokens = replace(positions, reference=None).sampled_tokens(self.chunk)
        place = positions.batch.positions
        if positions.batch.teacher_share:
            weights[IMPORTANCE] = tokens.importance.flatten()[place]
        if self.objective.advantage is None:
            return positions
        found = self.objective.advantage(tokens)
        found = of_shape(found, tokens.mask.shape, "the advantage", "values")
        return replace(positions, advantage=found.flatten()[place])

    def _shares(
        self, rows: Tensor, per_row: Tensor, weights: Mapping[str, Tensor], whole: float
    ) -> tuple[Tensor, Tensor]:
        """The factors [N] of a position in the mean: of an ungated term, and of the others."""
        by_token = self.objective.normalize == "token"
        ungated = (torch.ones_like(per_row) if by_token else per_row) / whole
        if self.objective.normalize != "accepted":
            return ungated, ungated
        gate = _product(list(weights.values()), per_row)
        accepted = torch.zeros_like(per_row).index_add(0, rows, gate)[rows]
        return ungated, torch.where(accepted > 0, 1.0 / accepted, 0.0) / whole


class _StreamLoss:
    """The sum of one stream's losses, and its gradients at the hidden states and the head.

    Args:
        student: Logits of the student at the N masked positions.
    """

    def __init__(self, student: HiddenLogits) -> None:
        self._student = student
        self._value = torch.zeros((), device=student.hidden.device)
        self._of_hidden = torch.zeros_like(student.hidden)
        self._of_head = [torch.zeros_like(parameter) for parameter in student.head.parameters]

    def add(self, loss: Tensor, learned: LearnedChunk, *, retain_graph: bool) -> None:
        """Add the loss of one chunk.

        Args:
            loss: Scalar with a graph down to the leaves of the chunk.
            learned: The chunk.
            retain_graph: Whether another stream reads the same graph.
        """
        self._value += loss.detach()
        if torch.is_inference_mode_enabled():  # only the value can be asked for
            return
        hidden, linear = learned.hidden, learned.linear
        # unused: a stream of features alone does not reach the head, others no features
        to_hidden, *to_linear = torch.autograd.grad(
            loss,
            [hidden] if linear is None else [hidden, linear],
            retain_graph=retain_graph,
            allow_unused=True,
        )
        with torch.no_grad():
            for found in to_linear:
                if found is not None:
                    through = self._through_head(found, hidden.detach())
                    to_hidden = through if to_hidden is None else to_hidden + through
            if to_hidden is not None:
                self._of_hidden[learned.place][learned.kept] = to_hidden

    def _through_head(self, to_linear: Tensor, hidden: Tensor) -> Tensor:
        """Add to the head's gradients, in place since they are large.

        Args:
            to_linear: [C, V] gradient of the loss at the head's linear output.
            hidden: [C, H] hidden states.

        Returns:
            [C, H] the gradient at the hidden states.
        """
        weight = self._student.head.weight
        assert weight is not None, "an identity has no linear output of its own"
        for total in self._of_head:
            if total.dim() == 1:
                total += to_linear.sum(0)
            elif total.dtype == to_linear.dtype:
                total.addmm_(to_linear.mT, hidden.to(total.dtype))
            else:
                total += to_linear.mT @ hidden.to(to_linear.dtype)
        return (to_linear @ weight.to(to_linear.dtype)).to(hidden.dtype)

    def attached(self) -> Tensor:
        """The sum, as a scalar whose backward passes the gradients on to body and head."""
        graph = [self._student.hidden, *self._student.head.parameters]
        grads = [self._of_hidden, *self._of_head]
        return known(self._value, grads, graph)


def _product(weights: list[Tensor], like: Tensor) -> Tensor:
    gate = torch.ones_like(like)
    for weight in weights:
        gate = gate * weight
    return gate


def _kept(gate: Tensor, every: bool) -> Tensor | slice:
    """The positions whose loss the gate does not zero; all of them as a slice: no copy.

    An accelerator keeps all: to compute those in vain takes less time than to make the host wait
    for their number in each chunk.
    """
    if gate.device.type != "cpu":
        return slice(None)
    nonzero = gate != 0
    return slice(None) if every or bool(nonzero.all()) else nonzero
