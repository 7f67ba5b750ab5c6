"""Logits in, named loss terms out: gate x splitter x divergence, per position.

The only place that knows the order: the gate's weight is the initial weight of the one part "kd",
splitters cut the part and multiply the weight, the divergence turns each part into a number per
position. Nothing here reduces over rows or positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.errors import UserError
from kdcore.method.protocols import (
    Advantage,
    Divergence,
    Gate,
    KnowledgeSplitter,
    Matcher,
    RankedGate,
    Stateful,
)
from kdcore.method.records import LogitBatch, Part, of_shape
from kdcore.method.schedule import Points, value_at

TASK = "task"
"""Term that every objective has: cross-entropy with the label, at temperature 1, ungated."""

LABEL = "label"
"""Optional term: the same cross-entropy, gated, e.g. by the position in a draft."""

FEATURE = "feature"
"""Optional term: smooth L1 distance (mean over H) of the hidden states that the two heads read,
gated. It requires a live teacher (or target) as wide as the student (or drafter)."""

POLICY = "policy"
"""The term of an `Advantage`: the policy gradient of sampled tokens, gated."""

OF_LABELS = (TASK, LABEL)
"""The terms that learn from the labels alone."""

DISTILLED = "distilled"
"""The figure of a step that is the sum of the parts' terms before their weights."""

_NO_PARTS = (*OF_LABELS, FEATURE, POLICY)


@dataclass(frozen=True, slots=True)
class Objective:
    """Loss of a method, from built components.

    Attributes:
        gates: Gates by label, in the spec's order.
        splitters: Splitters in the order of their application.
        divergence: Divergence of each part.
        weights: Scheduled weights by term, without the terms of constant weight 0.
        tau: Loss temperature.
        normalize: Normalisation of the loss, as in a spec.
        sampled_divergence: Divergence of each part on responses that the student sampled; None
            means the other one.
        matchers: Matchers of hidden states by label, which is the name of their term.
        part_divergences: Divergences of single parts by name, in place of the other two.
        advantage: Advantage of sampled tokens, the weight in the term `POLICY`.
    """

    gates: Mapping[str, Gate | RankedGate]
    splitters: tuple[KnowledgeSplitter, ...]
    divergence: Divergence
    weights: Mapping[str, float | Points]
    tau: float | Points = 1.0
    normalize: str = "sequence"
    sampled_divergence: Divergence | None = None
    matchers: Mapping[str, Matcher] = field(default_factory=dict)
    advantage: Advantage | None = None
    part_divergences: Mapping[str, Divergence] = field(default_factory=dict)

    @property
    def looks_ahead(self) -> bool:
        """Whether some position's loss depends on all positions' gates: then two passes."""
        ranked = any(isinstance(gate, RankedGate) for gate in self.gates.values())
        return ranked or self.normalize == "accepted"

    @property
    def compares(self) -> bool:
        """Whether a term compares the distributions of student and teacher."""
        return not self.weights.keys() <= {*_NO_PARTS, *self.matchers}

    @property
    def reads_spans(self) -> bool:
        """Whether a splitter reads the spans of a teacher with another tokenizer."""
        spans = (getattr(splitter, "reads_spans", False) for splitter in self.splitters)
        return self.compares and any(spans)

    @property
    def reference(self) -> str | None:
        """The third model that gates ask for, as a spec names one.

        Raises UserError when two gates ask for different ones.
        """
        said = (getattr(gate, "reference", None) for gate in self.gates.values())
        asked = {model for model in said if model is not None}
        if len(asked) > 1:
            raise UserError(
                f"the gates name different reference models: {', '.join(sorted(asked))}",
                "set the same reference model for all gates",
            )
        return next(iter(asked), None)

    @property
    def of_teacher(self) -> list[str]:
        """What of it needs a teacher, as messages name it."""
        gates = [f"gate '{label}'" for label in self.gates]
        splitters = ["a splitter"] * len(self.splitters)
        return (
            gates + splitters + [f"term '{name}'" for name in self.weights if name not in OF_LABELS]
        )

    @property
    def stateful(self) -> dict[str, Stateful]:
        """The components with a memory, by a name that a checkpoint can use."""
        every: dict[str, Any] = {f"gate.{label}": gate for label, gate in self.gates.items()}
        every |= {f"splitter.{i}": splitter for i, splitter in enumerate(self.splitters)}
        every |= {"divergence": self.divergence, "sampled_divergence": self.sampled_divergence}
        every |= {"advantage": self.advantage}
        every |= {f"divergence.{part}": each for part, each in self.part_divergences.items()}
        return {name: part for name, part in every.items() if isinstance(part, Stateful)}

    def step_done(self, figures: Mapping[str, float]) -> None:
        """Tell the components with a memory the figures of a step, and what they add up to.

        Args:
            figures: ``loss``, ``progress``, each ``term/NAME`` and each ``acceptance/GATE``.
        """
        others = {*_NO_PARTS, *self.matchers}
        parts = [figures.get(f"term/{name}", 0.0) for name in self.weights if name not in others]
        for component in self.stateful.values():
            component.step_done({**figures, DISTILLED: sum(parts)})

    def state_dict(self) -> dict[str, Tensor]:
        """The memories of the stateful components and the weights of the matchers.

        Returns:
            ``COMPONENT/NAME`` -> tensor.
        """
        return {
            f"{name}/{key}": value
            for name, part in self._stored.items()
            for key, value in part.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state_dict`; other tensors of ``state`` are left alone."""
        for name, part in self._stored.items():
            part.load_state_dict(owned(name, state))

    @property
    def _stored(self) -> dict[str, Stateful | Matcher]:
        return self.stateful | {f"matcher.{label}": each for label, each in self.matchers.items()}

    def weight_of(self, progress: float) -> dict[str, float]:
        """The weight of each term at a progress in [0, 1]."""
        return {name: value_at(weight, progress) for name, weight in self.weights.items()}

    def terms(self, batch: LogitBatch, gate: Tensor) -> dict[str, Tensor]:
        """Compute each term at each position, before its own weight.

        A distillation term is ``tau^2 * weight * D(student part, teacher part)``, where tau is the
        loss temperature times the factor that gates set at this position.

        Args:
            batch: Logits of student and teacher.
            gate: [B, T] in [0, 1], the product of the gates.

        Returns:
            The values [B, T] by term.
        """
        tau: float | Tensor = value_at(self.tau, batch.progress)
        if batch.softening is not None:
            tau = tau * batch.softening
        divided_by = tau[..., None] if isinstance(tau, Tensor) else tau
        divergence = (self.sampled_divergence if batch.sampled else None) or self.divergence
        parts: dict[str, Part] = {}
        if self.compares:
            parts = {"kd": Part(batch.student / divided_by, batch.teacher / divided_by, gate)}
            for splitter in self.splitters:
                parts = splitter(parts, batch)
        terms = {}
        for name, part in parts.items():
            if name in self.weights:
                found = self.part_divergences.get(name, divergence)(*part.compared)
                at = gate.shape
                value = of_shape(found, at, f"the divergence of the term '{name}'", "values")
                weight = of_shape(part.weight, at, f"the splitter of '{name}'", "weights")
                terms[name] = tau**2 * weight * value
        if any(name in self.weights for name in (*OF_LABELS, POLICY)):
            classes_first = batch.student.movedim(-1, 1)
            surprise = F.cross_entropy(classes_first, batch.labels, reduction="none")
            advantage = torch.zeros_like(gate) if batch.advantage is None else batch.advantage
            each = {TASK: surprise, LABEL: gate * surprise, POLICY: gate * advantage * surprise}
            terms |= {name: value for name, value in each.items() if name in self.weights}
        if FEATURE in self.weights:
            terms[FEATURE] = gate * _feature_distance(batch)
        return terms


def owned(owner: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``state`` whose names begin with ``OWNER/``, by the rest of their names."""
    prefix = f"{owner}/"
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _feature_distance(batch: LogitBatch) -> Tensor:
    """[B, T]."""
    ours, theirs = batch.student_hidden, batch.teacher_hidden
    if ours is None or theirs is None or ours.shape != theirs.shape:
        wide = "no hidden states" if theirs is None else f"hidden states of size {theirs.shape[-1]}"
        raise UserError(
            f"method.terms sets a weight for 'feature', but the teacher gives {wide}",
            "use a live teacher with the student's hidden size, or remove the term",
        )
    return F.smooth_l1_loss(ours.float(), theirs.float(), reduction="none").mean(-1)
