"""Hidden states x head in chunks, over masked positions only; one gradient for each stream.

Peak memory holds the logits of one chunk, whatever B, T and V are. The result does not depend on
the chunk's length. What leaves is a scalar for each stream of terms whose backward hands the
gradients already computed to the body: one forward, and one backward per stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcore.method.aligned import ALIGNED, AlignedLogits
from kdcore.method.logits import HiddenLogits, MaskedPositions, TeacherLogits, masked_positions
from kdcore.method.objective import TASK, Objective
from kdcore.method.protocols import Gate, RankedGate
from kdcore.method.records import Batch, LogitBatch
from kdcore.method.schedule import value_at


@dataclass(frozen=True, slots=True)
class StepLoss:
    """Loss of one micro-batch.

    The terms and acceptances are the micro-batch's shares of the step's means: their sum over the
    micro-batches is the step's mean.

    Attributes:
        losses: Scalar to call backward on, by stream.
        terms: Mean of each term before its weight.
        acceptance: Accepted share by gate label, averaged like an ungated term.
    """

    losses: dict[str, Tensor]
    terms: dict[str, Tensor]
    acceptance: dict[str, Tensor]

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
        streams: Terms that share a backward pass, by stream.
        chunk: Number of positions computed at once.
    """

    def __init__(
        self, objective: Objective, streams: Mapping[str, tuple[str, ...]], chunk: int
    ) -> None:
        self.objective = objective
        self.streams = streams
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
        rows = batch.positions // batch.mask.shape[1]
        per_row = 1.0 / batch.mask.sum(1)[rows]
        by_token = self.objective.normalize == "token"
        ungated = (torch.ones_like(per_row) if by_token else per_row) / whole
        device = batch.mask.device
        generators = one_generator_each(self.objective.gates, generator, device)
        drawing = _drawing_on(device, generator)
        positions = masked_positions(student, teacher, reference, batch, progress, drawing)
        weights = {label: torch.empty_like(per_row) for label in self.objective.gates}
        spans = rest = None
        if isinstance(teacher, AlignedLogits):
            weights[ALIGNED] = teacher.compared.to(per_row.dtype)
            if self.objective.reads_spans:
                positions, spans = replace(positions, uncut=teacher.span_on_cpu), teacher.span
                rest = teacher.rest(value_at(self.objective.tau, progress), self.chunk)
        if self.objective.looks_ahead:
            self._gate_all(positions, weights, generators)
            positions = replace(positions, reference=None)  # all who read it have been asked
        by_accepted = self.objective.normalize == "accepted"
        share = _of_accepted(rows, weights, per_row) / whole if by_accepted else ungated

        values = {stream: share.new_zeros(()) for stream in self.streams}
        grads = {stream: _Gradients(student) for stream in self.streams}
        means = {term: share.new_zeros(()) for term in self.objective.weights}
        scheduled = self.objective.weight_of(progress)
        features = getattr(teacher, "features", None)  # what a cache has not
        whole_logits = student.head.weight is None
        by_chunk = {
            stream: pointwise
            for stream, members in self.streams.items()
            if (pointwise := [term for term in members if term not in self.objective.matchers])
        }

        for chunk, linear, logits in positions.chunks(self.chunk):
            if not self.objective.looks_ahead:
                gate_chunk(self.objective.gates, logits, chunk, weights, generators)
            gate = _product([weight[chunk] for weight in weights.values()], share[chunk])
            kept = _kept(gate, TASK in scheduled or rest is not None)
            hidden = student.hidden[chunk][kept].detach().requires_grad_()
            # a leaf, as the product with the head is known already
            product = hidden if whole_logits else linear[kept].detach().requires_grad_()
            with torch.enable_grad():
                accepted = LogitBatch(
                    student.from_linear(product)[None],
                    logits.teacher[:, kept],
                    logits.labels[:, kept],
                    logits.mask[:, kept],
                    progress,
                    drawing,
                    logits.position[:, kept],
                    None if student.features is None else hidden[None],
                    None if features is None else features[chunk][kept].detach()[None],
                    sampled=batch.sampled,
                    span=None if spans is None else spans[None, chunk],
                    teacher_rest=None if rest is None else rest[None, chunk],
                )
                terms = self.objective.terms(accepted, gate[None, kept])
                sums = {
                    name: ((ungated if name == TASK else share)[chunk][kept] * term[0]).sum()
                    for name, term in terms.items()
                }
                losses = {
                    stream: torch.stack([scheduled[t] * sums[t] for t in members]).sum()
                    for stream, members in by_chunk.items()
                }
            for name, total in sums.items():
                means[name] += total.detach()
            for place, (stream, loss) in enumerate(losses.items()):
                values[stream] += loss.detach()
                more = place + 1 < len(losses)
                # unused: a stream of features alone does not reach the head, others no features
                found = torch.autograd.grad(
                    loss,
                    [hidden] if whole_logits else [hidden, product],
                    retain_graph=more,
                    allow_unused=True,
                )
                grads[stream].add(chunk, kept, hidden.detach(), *found)
        acceptance = {
            label: (ungated * accepted_share(self.objective.gates.get(label), weight)).sum()
            for label, weight in weights.items()
        }
        graph = [student.hidden, *student.head.parameters]
        attached = {
            stream: _Known.apply(value, grads[stream].all, *graph)  # type: ignore[no-untyped-call]
            for stream, value in values.items()
        }
        gate = _product(list(weights.values()), share)
        for label, matcher in self.objective.matchers.items():
            theirs = getattr(teacher, "states", {})
            pairs = [(student.states[i], theirs[j].detach()) for i, j in matcher.pairs]
            ours_of, theirs_of = zip(*pairs, strict=True)
            total = (share * gate * matcher(ours_of, theirs_of).to(share.dtype)).sum()
            means[label] += total.detach()
            for stream in (s for s, members in self.streams.items() if label in members):
                attached[stream] = attached[stream] + scheduled[label] * total
        return StepLoss(attached, means, acceptance)

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
        device = batch.mask.device
        generators = one_generator_each(self.objective.gates, generator, device)
        positions = masked_positions(student, teacher, reference, batch, progress, generator)
        like = torch.empty(len(positions.labels), device=positions.labels.device)
        weights = {label: torch.empty_like(like) for label in self.objective.gates}
        self._gate_all(positions, weights, generators)
        return weights

    def _gate_all(
        self,
        positions: MaskedPositions,
        weights: dict[str, Tensor],
        generators: Mapping[str, torch.Generator],
    ) -> None:
        """The first pass: every gate's weight at every position, ranked ones included."""
        ranked = {
            label: gate
            for label, gate in self.objective.gates.items()
            if isinstance(gate, RankedGate)
        }
        plain = {k: v for k, v in self.objective.gates.items() if k not in ranked}
        for chunk, _, logits in positions.chunks(self.chunk):
            gate_chunk(plain, logits, chunk, weights, generators)
            with torch.no_grad():
                for label, gate in ranked.items():
                    scores = gate.score(replace(logits, generator=generators[label]))
                    _refuse_shape(label, "scores", scores, logits.mask)
                    weights[label][chunk] = scores[0].to(weights[label].dtype)
        with torch.no_grad():
            for label, gate in ranked.items():
                found = gate.weigh(weights[label])
                _refuse_shape(label, "weights", found, weights[label])
                weights[label] = found


class _Gradients:
    """One stream's gradients: at the hidden states [N, H], and of the head's parameters."""

    def __init__(self, student: HiddenLogits) -> None:
        self._head = student.head
        self._hidden = torch.zeros_like(student.hidden)
        self._of_head = [torch.zeros_like(parameter) for parameter in student.head.parameters]

    @torch.no_grad()
    def add(
        self,
        chunk: slice,
        kept: Tensor | slice,
        hidden: Tensor,
        to_hidden: Tensor | None,
        to_linear: Tensor | None = None,
    ) -> None:
        """Add what one chunk gave, to the head's gradients in place: they are large.

        Args:
            chunk: Place of the chunk among the N positions.
            kept: Positions of the chunk that the loss has.
            hidden: [C, H] their hidden states.
            to_hidden: [C, H] gradient of the loss at them, but for what comes through the head.
            to_linear: [C, V] gradient of the loss at the head's linear output.
        """
        if to_linear is not None and self._head.weight is not None:
            through = (to_linear @ self._head.weight.to(to_linear.dtype)).to(hidden.dtype)
            to_hidden = through if to_hidden is None else to_hidden + through
            for total in self._of_head:
                if total.dim() == 1:
                    total += to_linear.sum(0)
                elif total.dtype == to_linear.dtype:
                    total.addmm_(to_linear.mT, hidden.to(total.dtype))
                else:
                    total += to_linear.mT @ hidden.to(to_linear.dtype)
        if to_hidden is not None:
            self._hidden[chunk][kept] = to_hidden

    @property
    def all(self) -> list[Tensor]:
        """In the order in which the graph takes them."""
        return [self._hidden, *self._of_head]


class _Known(torch.autograd.Function):
    """A scalar whose gradients are known already; backward hands them on."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = upstream
        return None, None, *(grad * scale.to(grad.dtype) for grad in ctx.grads)


def generator_at(device: torch.device | str, *place: str | int) -> torch.Generator:
    """A generator seeded from a place in a training, so that a resumed one needs no state.

    Args:
        device: The device of the tensors that are drawn.
        *place: The seed of the training, the optimizer step, and what it is for.
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def one_generator_each(
    gates: Mapping[str, Any], generator: torch.Generator, device: torch.device
) -> dict[str, torch.Generator]:
    """Create a generator for each gate: gates that shared one would interleave by chunks.

    Args:
        gates: Label -> gate.
        generator: Source of the seeds, on the CPU: the host would wait for those of another device.
        device: Device of the logits.

    Returns:
        Label -> generator on the device.
    """
    return {
        label: torch.Generator(device).manual_seed(seed)
        for label, seed in zip(gates, _seeds(generator, len(gates)), strict=True)
    }


def _drawing_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """The generator itself on the CPU, or one that it seeds on another device."""
    if device.type == "cpu":
        return generator
    (seed,) = _seeds(generator, 1)
    return torch.Generator(device).manual_seed(seed)


def _seeds(generator: torch.Generator, count: int) -> list[int]:
    drawn = torch.randint(torch.iinfo(torch.int64).max, (count,), generator=generator)
    seeds: list[int] = drawn.tolist()
    return seeds


@torch.no_grad()
def gate_chunk(
    gates: Mapping[str, Any],
    logits: LogitBatch,
    chunk: slice,
    weights: Mapping[str, Tensor],
    generators: Mapping[str, torch.Generator],
) -> None:
    """Ask each gate of one chunk, as B = 1, and put the answer at its place in ``weights`` [N].

    Raises ValueError when a gate gives another shape than the mask's.
    """
    for label, gate in gates.items():
        found = gate(replace(logits, generator=generators[label]))
        _refuse_shape(label, "weights", found, logits.mask)
        weights[label][chunk] = found[0].to(weights[label].dtype)


def _refuse_shape(label: str, what: str, found: Tensor, like: Tensor) -> None:
    """A shape that broadcasts would give every position one value, and say nothing."""
    if found.shape != like.shape:
        raise ValueError(
            f"gate '{label}' returned {what} of shape {list(found.shape)}, expected "
            f"{list(like.shape)}"
        )


def _of_accepted(rows: Tensor, weights: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """1 / (sum of the gate over the row) of each position's row, [N]; 0 where that sum is 0."""
    gate = _product(list(weights.values()), like)
    accepted = torch.zeros_like(like).index_add(0, rows, gate)[rows]
    return torch.where(accepted > 0, 1.0 / accepted, 0.0)


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


def accepted_share(gate: Gate | RankedGate | None, weight: Tensor) -> Tensor:
    """How far each position is accepted, in [0, 1]: 0 where its weight is the gate's floor."""
    floor = float(getattr(gate, "floor", 0.0))
    return torch.ones_like(weight) if floor == 1.0 else (weight - floor) / (1.0 - floor)
