"""A method's loss for a training loop of one's own: the loss engine, called with plain tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from kdcore.components.choice import Choice
from kdcore.components.construction import ChoiceBuilder, protocols_of
from kdcore.components.registry import Registry, installed
from kdcore.errors import UserError, with_article
from kdcore.method.gating import refuse_outside
from kdcore.method.generators import generator_at
from kdcore.method.logits import HiddenLogits, no_teacher
from kdcore.method.loss_engine import LossEngine, StepLoss
from kdcore.method.protocols import Divergence, MomentumPolicy
from kdcore.method.records import Batch
from kdcore.method.schedule import Points
from kdcore.specs.parts.student_method import StudentMethodSpec
from kdcore.specs.reading.mistakes import mistakes
from kdcore.training.loss_tensors import (
    IGNORED,
    Logits,
    classes_of,
    learned_rows,
    made_of,
    refuse_other_types,
    refuse_unlike,
    whole_of,
)
from kdcore.training.method import labelled, objective_of
from kdcore.training.step_scores import StepScores


class DistillationLoss:
    """The loss of a spec's method section, without the spec.

    It shifts, masks, cuts into chunks, counts and seeds as a run of kdcore does: the same tensors
    at the same step give the same loss and the same gradients, bit by bit.

    A component is its name, ``{"name": ..., PARAMETER: VALUE}`` as in a spec, or the object itself.

    Args:
        gates: Gates whose weights are multiplied; none keeps every token.
        splitters: Splitters, applied in order.
        divergence: The divergence of student and teacher.
        momentum: The momentum policy, which says what terms share a gradient stream.
        terms: Term -> weight or schedule; see `kdcore.specs.parts.training.MethodSpec`.
        tau: Temperature of the loss, or its schedule.
        normalize: 'sequence', 'token' or 'accepted'.
        classes: V, where the first V classes are compared and the rest is padding; None for all.
        steps: Optimizer steps of the whole training, which schedules and components with a memory
            need; `step` then counts them.
        chunk: Positions whose logits and loss are made at once.
        seed: Seed of what gates sample.
        divergences: Part -> divergence, of single parts that the splitters make.
        sampled_divergence: The divergence on responses that the student sampled; None for the same.
        advantage: The advantage of sampled tokens, the weight in the term 'policy'; None for none.
        registry: The known components; None for what is installed.

    Attributes:
        policy: The momentum policy.
        last: The figures of the last micro-batch, as tensors.

    Raises:
        UserError: An unknown or wrong component or field, a weight of an unknown term.
    """

    def __init__(
        self,
        *,
        gates: Sequence[Any] = (),
        splitters: Sequence[Any] = (),
        divergence: Any = "forward_kl",
        momentum: Any = "shared",
        terms: Mapping[str, float | Points] | None = None,
        tau: float | Points = 1.0,
        normalize: str = "sequence",
        classes: int | None = None,
        steps: int | None = None,
        chunk: int = 512,
        seed: int = 0,
        divergences: Mapping[str, Any] | None = None,
        sampled_divergence: Any = None,
        advantage: Any = None,
        registry: Registry | None = None,
    ) -> None:
        for name, count in {"classes": classes, "steps": steps, "chunk": chunk}.items():
            if count is not None and count < 1:
                raise UserError(f"{name}={count} is below 1", f"pass {name}=1 or more")
        context = ChoiceBuilder(registry or installed())
        chosen = {
            "gate": [_chosen("gates", gate, context) for gate in gates],
            "splitter": [_chosen("splitters", splitter, context) for splitter in splitters],
            "divergence": [_chosen("divergence", divergence, context)],
            "momentum": [_chosen("momentum", momentum, context)],
            "advantage": [] if advantage is None else [_chosen("advantage", advantage, context)],
        }
        made = {
            kind: [_built(kind, each, context) for each in given] for kind, given in chosen.items()
        }

        def compares(given: Any) -> Divergence:
            found: Divergence = _built("divergence", _chosen("divergence", given, context), context)
            return found

        spec = _checked({"terms": terms or {}, "tau": tau, "normalize": normalize}, context)
        self.policy: MomentumPolicy = made["momentum"][0]
        objective = objective_of(
            labelled([_name(gate) for gate in chosen["gate"]], made["gate"]),
            made["splitter"],
            made["divergence"][0],
            spec.terms,
            tau=spec.tau,
            normalize=spec.normalize,
            sampled_divergence=None if sampled_divergence is None else compares(sampled_divergence),
            advantage=next(iter(made["advantage"]), None),
            part_divergences={part: compares(each) for part, each in (divergences or {}).items()},
        )
        streams = self.policy.streams(tuple(objective.weights))
        self.engine = LossEngine(objective, streams, chunk)
        self.classes, self.steps, self.seed = classes, steps, seed
        if objective.stateful and steps is None:
            raise UserError(
                f"{', '.join(objective.stateful)} learns from each step of the training",
                "give steps=, the number of optimizer steps, and call step() after each of them",
            )
        self.last: StepLoss | None = None
        self._step = self._micro_step = 0
        self._figures: dict[str, Tensor] = {}
        self._outside: dict[str, Tensor] = {}
        self._scores = StepScores(objective.gates)
        self._uncounted = 0

    def __call__(
        self,
        student: Logits,
        teacher: Logits | None,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        reference: Logits | None = None,
        num_items: float | Tensor | None = None,
        shifted: bool = False,
        sampled: bool = False,
        teacher_share: float = 0.0,
    ) -> Tensor:
        """The loss of one micro-batch.

        Args:
            student: Logits [B, T, V] with their graph, or hidden states [B, T, H] and their head.
            teacher: The same of the teacher, detached here; None where only labels are learned.
            labels: [B, T] int64, -100 where nothing is learned. As transformers takes them:
                position t of the logits predicts ``labels[t + 1]``. [B] for a classifier.
            mask: [B, T] bool, further positions of the labels that are not learned; None for none.
            reference: Logits of the third model that a gate asks for.
            num_items: What the whole step's loss is a mean over, in all micro-batches and
                processes: rows with a learned position, or learned positions if ``normalize`` is
                'token'. None counts those of this micro-batch.
            shifted: Whether ``labels[t]`` is already what position t predicts.
            sampled: Whether the labels are whole responses that the student sampled at temperature
                1 with its present weights: then the advantage and the sampled divergence apply.
            teacher_share: Share of the teacher in the mixture that sampled them, below 1; every
                term but 'task' is then weighed by the importance of the tokens.

        Returns:
            [] the loss: its backward gives the sum of the streams' gradients.

        Raises:
            UserError: Tensors of a wrong type or that do not fit each other, a label that is not a
                class, a wrong ``num_items``, a missing teacher or reference.
        """
        losses = self.by_stream(
            student,
            teacher,
            labels,
            mask=mask,
            reference=reference,
            num_items=num_items,
            shifted=shifted,
            sampled=sampled,
            teacher_share=teacher_share,
        )
        return torch.stack(list(losses.values())).sum()

    @property
    def streams(self) -> Mapping[str, tuple[str, ...]]:
        """Stream -> the terms whose gradients the momentum policy takes together."""
        return self.engine.streams

    def by_stream(
        self,
        student: Logits,
        teacher: Logits | None,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        reference: Logits | None = None,
        num_items: float | Tensor | None = None,
        shifted: bool = False,
        sampled: bool = False,
        teacher_share: float = 0.0,
    ) -> dict[str, Tensor]:
        """The loss of each gradient stream of the momentum policy: stream -> [].

        The arguments and errors are those of a call.
        """
        objective = self.engine.objective
        if teacher is None and objective.of_teacher:
            raise UserError(
                f"there is no teacher, and {objective.of_teacher[0]} needs one",
                "pass the teacher's logits, or set the weights of all terms but 'task' to 0",
            )
        if reference is None and objective.reference is not None:
            raise UserError(
                f"a gate compares with the reference model '{objective.reference}'",
                "pass its logits: reference=",
            )
        if not 0 <= teacher_share < 1 or (teacher_share and not sampled):
            raise UserError(
                f"teacher_share={teacher_share:g} is not a share of what sampled the labels",
                "pass a share from 0 to below 1, and sampled=True with it",
            )
        whose = {"student": student, "teacher": teacher, "reference": reference}
        given = {who: logits for who, logits in whose.items() if logits is not None}
        refuse_other_types(given, labels, mask)
        refuse_unlike(given, labels, self.classes)
        labels = labels.long()
        learned = labels != IGNORED if mask is None else (labels != IGNORED) & mask.bool()
        last = labels.shape[-1]
        if labels.ndim == 1:  # a classifier's rows have one position
            labels, learned, last = labels[:, None], learned[:, None], 1
        elif not shifted:
            labels, learned, last = labels[:, 1:], learned[:, 1:], last - 1
        positions = learned.flatten().nonzero()[:, 0]
        batch = Batch(
            {},
            labels,
            learned,
            torch.arange(len(labels)),
            positions,
            sampled=sampled,
            teacher_share=teacher_share,
        )
        flat = {who: self._at(positions, logits, last) for who, logits in given.items()}
        classes = classes_of(student) if self.classes is None else self.classes
        rows = learned_rows(labels, learned, classes)
        counted, items = rows, "rows with a learned position"
        if objective.normalize == "token":
            counted, items = len(positions), "learned positions"
        place = (self.seed, self._step, self._micro_step, _process())
        self.last = self.engine(
            flat["student"],
            flat.get("teacher", no_teacher(batch)),
            batch,
            whole=whole_of(num_items, counted, items),
            progress=self._progress,
            generator=generator_at("cpu", *place),
            reference=flat.get("reference"),
        )
        self._micro_step += 1
        self._uncounted += num_items is None
        self._scores.add(self.last)
        for name, value in self.last.figures.items():
            self._figures[name] = self._figures.get(name, 0.0) + value
        for label, count in self.last.outside.items():
            self._outside[label] = self._outside.get(label, 0) + count
        return self.last.losses

    def step(self) -> dict[str, float]:
        """End an optimizer step: call it after the optimizer's.

        Returns:
            The step's means, over its micro-batches and all processes: ``loss``, ``progress``,
            ``term/NAME`` before its weight, ``acceptance/GATE``.

        Raises:
            UserError: When no loss was made since the last call, or a gate gave weights outside
                its range in this step.
        """
        if not self._figures:
            raise UserError(
                "step() was called, but no loss was made in this step",
                "call the loss for each micro-batch, then step() of the optimizer, and then "
                "step() of the loss",
            )
        sums = torch.stack([*self._figures.values(), *self._outside.values()])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        values = iter(sums.tolist())
        # with num_items each micro-batch gave a share of the step's mean, without it a mean
        parts = max(1, self._uncounted * _processes())
        figures = {name: next(values) / parts for name in self._figures}
        outside = dict(zip(self._outside, values, strict=True))
        refuse_outside(outside, self.engine.objective.gates, f"in step {self._step + 1}")
        if self.steps is not None:
            figures["progress"] = self._progress
        self.engine.objective.step_done(figures)
        self._scores.close()
        self._step += 1
        self._micro_step = self._uncounted = 0
        self._figures, self._outside = {}, {}
        return figures

    def state_dict(self) -> dict[str, Tensor]:
        """The step and the components' memories, as named tensors for a checkpoint."""
        return {"step": torch.tensor(self._step)} | self.engine.objective.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave, at the end of a step.

        Raises:
            UserError: The state is that of a loss with other components.
        """
        other = ", ".join(sorted(self.state_dict().keys() ^ state.keys()))
        if other:
            raise UserError(
                f"the state is not of this loss: only one of the two has {other}",
                "build the loss with the components of the one that was saved",
            )
        self._step = int(state["step"])
        self.engine.objective.load_state_dict(state)

    @property
    def _progress(self) -> float:
        """Share of the training done, in [0, 1]; NaN where nobody knows it."""
        return float("nan") if self.steps is None else self._step / max(1, self.steps)

    def _at(self, positions: Tensor, logits: Logits, last: int) -> HiddenLogits:
        """The logits at positions [N] of the first ``last`` ones of each row, laid flat."""
        made, head = made_of(logits)
        by_position = made[:, None] if made.ndim == 2 else made[:, :last]
        classes = classes_of(logits) if self.classes is None else self.classes
        return HiddenLogits(by_position[positions // last, positions % last], head, classes)


def _chosen(field: str, given: Any, context: ChoiceBuilder) -> Any:
    """The `Choice` that a name or a mapping means; any other object as it is."""
    if not isinstance(given, str | Mapping):
        return given
    several = field in ("gates", "splitters")
    found = getattr(_checked({field: [given] if several else given}, context), field)
    return found[0] if several else found


def _checked(fields: dict[str, Any], context: ChoiceBuilder) -> StudentMethodSpec:
    """Raises UserError for the first mistake."""
    try:
        return StudentMethodSpec.model_validate(fields, context={"registry": context.registry})
    except ValidationError as wrong:
        first = mistakes(wrong, StudentMethodSpec)[0]
        raise UserError(f"{first.dotted}: {first.what}", first.cure) from wrong


def _built(kind: str, chosen: Any, context: ChoiceBuilder) -> Any:
    """The component of a choice, or the object given, once it has what the kind's Protocol asks."""
    if isinstance(chosen, Choice):
        return context.build(chosen)
    accepted = protocols_of(kind)
    if isinstance(chosen, type) or not isinstance(chosen, accepted):
        wanted = " or ".join(each.__name__ for each in accepted)
        raise UserError(
            f"{chosen!r} does not satisfy the Protocol {wanted}",
            f"pass the name of {with_article(kind)}, a mapping with its name, or an object built "
            "of its class",
        )
    return chosen


def _name(gate: Any) -> str:
    return gate.name if isinstance(gate, Choice) else type(gate).__name__


def _process() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
