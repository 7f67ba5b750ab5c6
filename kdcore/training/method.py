"""From a spec to its method: the objective, from components and weights, and the momentum policy.

`Method.build` reads a spec; `objective_of` is the part that needs none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kdcore.components.construction import BuildContext
from kdcore.errors import UserError, nearest
from kdcore.method.objective import FEATURE, LABEL, OF_LABELS, POLICY, TASK, Objective
from kdcore.method.protocols import (
    Advantage,
    Divergence,
    Gate,
    KnowledgeSplitter,
    Matcher,
    MomentumPolicy,
    RankedGate,
)
from kdcore.method.schedule import Points
from kdcore.models.assembly import Assembly
from kdcore.models.matching.attention import SDPA, other_attention
from kdcore.models.matching.layers import reads_attention
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.student_method import StudentMethodSpec
from kdcore.specs.parts.training import MethodSpec
from kdcore.specs.train_drafter import TrainedSpec
from kdcore.training.arguments import shards_the_model, training_arguments

Labelled = TypeVar("Labelled")

_RESERVED = frozenset({TASK, LABEL, FEATURE, POLICY})


@dataclass(frozen=True, slots=True)
class Method:
    """A built method.

    Attributes:
        objective: The loss.
        policy: The momentum policy, which combines the gradients of the streams.
        auxiliary: The loss on auxiliary rows, or None.
    """

    objective: Objective
    policy: MomentumPolicy
    auxiliary: Objective | None = None

    @classmethod
    def build(cls, spec: TrainedSpec, assembly: Assembly, run: Run) -> Method:
        """Build a spec's method, and check that its training section fits.

        Args:
            spec: The spec of the run.
            assembly: The builder of components.
            run: The spec's run folder, which need not exist.

        Returns:
            The method.

        Raises:
            UserError: `build_objective`, the policy or `training_arguments` refuses the spec, or
                policy and optimizer would both apply momentum.
        """
        objective = build_objective(spec.method, assembly)
        policy: MomentumPolicy = assembly.build(spec.method.momentum)
        _refuse_two_momenta(spec, policy)
        training_arguments(spec, run)
        method = cls(objective, policy, _on_auxiliary_rows(spec, objective))
        _refuse_matchers(spec, objective)
        _refuse_reentrant(spec, method)
        _refuse_sharded(spec)
        return method

    @property
    def streams(self) -> dict[str, tuple[str, ...]]:
        """Stream -> the terms of the loss that share its backward pass."""
        others = () if self.auxiliary is None else self.auxiliary.weights
        return self.policy.streams(tuple(dict.fromkeys([*self.objective.weights, *others])))


def _on_auxiliary_rows(spec: TrainedSpec, objective: Objective) -> Objective | None:
    """The objective on auxiliary rows; None without them."""
    asked = spec.data.auxiliary if isinstance(spec, DistillSpec) else None
    if asked is None:
        return None
    try:
        return on_other_rows(objective, asked.terms)
    except UserError as wrong:  # whose words are those of the other weights
        field = "data.auxiliary.terms"
        raise UserError(wrong.cause.replace("method.terms", field), wrong.cure, field) from wrong


def _refuse_two_momenta(spec: TrainedSpec, policy: MomentumPolicy) -> None:
    """Raises UserError when the optimizer would repeat the work of the policy.

    A policy that owns the momentum returns the whole update. The optimizer would apply momentum a
    second time, and clip the update, whose norm has another scale, instead of the gradient.
    """
    training = spec.training
    wanted = {"optimizer": "sgd", "momentum": 0.0, "clip": 0.0, "weight_decay": 0.0}
    wrong = [name for name, value in wanted.items() if getattr(training, name) != value]
    if policy.owns_momentum and wrong:
        raise UserError(
            f"momentum policy '{spec.method.momentum.name}' computes the whole update, which "
            f"conflicts with training.{', training.'.join(wrong)}",
            "set "
            + ", ".join(f"training.{name}: {wanted[name]}" for name in wrong)
            + "; clip and weight_decay are parameters of the policy",
            f"training.{wrong[0]}",
        )


def _refuse_matchers(spec: TrainedSpec, objective: Objective) -> None:
    """Raises UserError for matchers whose teacher does not run here, or reads other rows."""
    if not objective.matchers or not isinstance(spec, DistillSpec):
        return
    field = "method.matchers"
    if spec.local_teacher is None or spec.data.teacher_cache is not None:
        label, matcher = next(iter(objective.matchers.items()))
        what = "the attention" if reads_attention(matcher) else "hidden states"
        raise UserError(
            f"matcher '{label}' compares {what} of the models, which needs a live teacher"
            + (f": a teacher cache does not have {what}" if spec.data.teacher_cache else ""),
            "set teacher, and remove data.teacher_cache if it is set; or remove the matcher",
            field,
        )
    of_attention = [label for label, each in objective.matchers.items() if reads_attention(each)]
    for role, model in {"teacher": spec.local_teacher, "student": spec.student}.items():
        implementation = getattr(model, "attention", None) or SDPA
        if of_attention and implementation != SDPA:
            raise other_attention(f"the {role}", implementation, role)
    asked = {
        "method.alignment": spec.method.alignment,
        "data.teacher_prompt": spec.data.teacher_prompt,
    }
    for label in of_attention:
        for name in (name for name, value in asked.items() if value is not None):
            raise UserError(
                f"matcher '{label}' compares attention over the same tokens, and with {name} the "
                "teacher reads others",
                f"remove {name}, or the matcher",
                field,
            )


def _refuse_reentrant(spec: TrainedSpec, method: Method) -> None:
    """Raises UserError for checkpointing that allows one backward pass of the loss alone."""
    trainer = spec.training.trainer
    # transformers 5.23 takes both names
    names = ("gradient_checkpointing", "activation_checkpointing")
    name = next((each for each in names if trainer.get(each)), None)
    if name is None or not (trainer.get(f"{name}_kwargs") or {}).get("use_reentrant"):
        return
    policy, count = f"momentum policy '{spec.method.momentum.name}'", len(method.streams)
    wrong = [f"supports one backward pass, and {policy} needs {count}"] if count > 1 else []
    wrong += [
        f"gives no gradient to the attention that matcher '{label}' reads"
        for label, matcher in method.objective.matchers.items()
        if reads_attention(matcher)
    ]
    for why in wrong:
        field = f"training.trainer.{name}_kwargs"
        raise UserError(f"{field}.use_reentrant {why}", "set use_reentrant: false", field)


def _refuse_sharded(spec: TrainedSpec) -> None:
    """Raises UserError for what a student that FSDP shards cannot do."""
    training = spec.training
    if not shards_the_model(training):
        return
    wanted = {
        "data.on_policy: each process would sample at its own pace": (
            isinstance(spec, DistillSpec) and spec.data.on_policy is not None
        ),
        "student.quantization: FSDP does not shard quantised weights": (
            isinstance(spec, DistillSpec) and spec.student.quantization is not None
        ),
        "method.matchers: no process has the whole weights of the layers that they read": (
            isinstance(spec, DistillSpec) and bool(spec.method.matchers)
        ),
        "training.keep_best: no process has the whole weights": training.keep_best,
        "training.probe_every: no process has the whole gradient of a term": training.probe_every,
    }
    for what in (what for what, wants in wanted.items() if wants):
        field, _, why = what.partition(": ")
        name = field.partition(" ")[0]
        raise UserError(
            f"a sharded student (training.trainer.fsdp) does not support {field}: {why}",
            f"remove {name}, or use several processes without fsdp (DDP)",
            name,
        )


def build_objective(spec: MethodSpec, context: BuildContext) -> Objective:
    """Build the components of a method's loss.

    Args:
        spec: The method section of a spec.
        context: The builder of components.

    Returns:
        The objective.

    Raises:
        UserError: `objective_of` rejects the weights.
    """
    sampled = spec.sampled_divergence if isinstance(spec, StudentMethodSpec) else None
    advantage = spec.advantage if isinstance(spec, StudentMethodSpec) else None
    gates: list[Gate | RankedGate] = [context.build(choice) for choice in spec.gates]
    matchers = spec.matchers if isinstance(spec, StudentMethodSpec) else []
    return objective_of(
        labelled([choice.name for choice in spec.gates], gates),
        [context.build(choice) for choice in spec.splitters],
        context.build(spec.divergence),
        spec.terms,
        tau=spec.tau,
        normalize=spec.normalize,
        sampled_divergence=None if sampled is None else context.build(sampled),
        matchers=labelled(
            [choice.name for choice in matchers], [context.build(choice) for choice in matchers]
        ),
        advantage=None if advantage is None else context.build(advantage),
        part_divergences={part: context.build(each) for part, each in spec.divergences.items()},
    )


def objective_of(
    gates: Mapping[str, Gate | RankedGate],
    splitters: Sequence[KnowledgeSplitter],
    divergence: Divergence,
    terms: Mapping[str, float | Points],
    *,
    tau: float | Points = 1.0,
    normalize: str = "sequence",
    sampled_divergence: Divergence | None = None,
    matchers: Mapping[str, Matcher] | None = None,
    advantage: Advantage | None = None,
    part_divergences: Mapping[str, Divergence] | None = None,
) -> Objective:
    """The objective of components; the arguments are the attributes of `Objective`.

    ``terms`` are the weights that are set. Otherwise `TASK`, `LABEL` and `FEATURE` have weight 0,
    and each part of the splitters, each matcher and, with an advantage, `POLICY` weight 1.

    Raises:
        UserError: A weight or a divergence of what the splitters do not give, or no weight
            above 0.
    """
    names = _parts(splitters)
    for part in (part for part in part_divergences or {} if part not in names):
        raise UserError(
            f"method.divergences names unknown part '{part}'",
            nearest(part, names),
            "method.divergences",
        )
    if taken := {*_RESERVED, *names} & (matchers or {}).keys():
        raise UserError(
            f"matcher '{min(taken)}' has the name of a term of the loss",
            "choose another matcher, or other splitters",
        )
    names = (*names, *(matchers or {}), *([] if advantage is None else [POLICY]))
    unknown = sorted(set(terms) - {TASK, LABEL, FEATURE, *names})
    if unknown:
        raise UserError(
            f"method.terms sets a weight for unknown term '{unknown[0]}'",
            nearest(unknown[0], [TASK, LABEL, FEATURE, *names]),
            "method.terms",
        )
    weights = {TASK: 0.0, LABEL: 0.0, FEATURE: 0.0} | dict.fromkeys(names, 1.0) | dict(terms)
    if not any(weights.values()):
        raise UserError(
            "method.terms sets the weight of every term to 0, so the model would learn nothing",
            f"set a weight above 0 for one of: {', '.join(weights)}",
            "method.terms",
        )
    used = {name: weight for name, weight in weights.items() if weight != 0.0}
    return Objective(
        gates,
        tuple(splitters),
        divergence,
        used,
        tau,
        normalize,
        sampled_divergence,
        {label: each for label, each in (matchers or {}).items() if label in used},
        advantage if POLICY in used else None,
        part_divergences or {},
    )


def on_other_rows(objective: Objective, terms: Mapping[str, float | Points]) -> Objective:
    """The same method on rows whose terms have weights of their own.

    Components that none of the terms needs are left out, so that ``task`` alone asks for no
    teacher. Stateful components are shared: the other rows read their state.

    Args:
        objective: The objective on the training rows.
        terms: The weights; all other terms have weight 0.

    Raises:
        UserError: `objective_of` refuses the weights.
    """
    every = (
        *_parts(objective.splitters),
        *objective.matchers,
        *([POLICY] if objective.advantage else []),
    )
    ungated, of_labels = set(terms) <= {TASK}, set(terms) <= set(OF_LABELS)
    parts = {} if of_labels else objective.part_divergences
    return objective_of(
        {} if ungated else objective.gates,
        () if of_labels else objective.splitters,
        objective.divergence,
        dict.fromkeys(("kd",) if of_labels else every, 0.0) | dict(terms),
        tau=objective.tau,
        normalize=objective.normalize,
        matchers={} if of_labels else objective.matchers,
        advantage=None if of_labels else objective.advantage,
        part_divergences=parts,
    )


def _parts(splitters: Sequence[KnowledgeSplitter]) -> tuple[str, ...]:
    """The names of the parts that splitters make of "kd"."""
    names: tuple[str, ...] = ("kd",)
    for splitter in splitters:
        names = splitter.parts(names)
    return names


def labelled(names: Sequence[str], components: Sequence[Labelled]) -> dict[str, Labelled]:
    """Label components by their names; a second one of the same name becomes ``name#2``.

    Args:
        names: The components' names.
        components: The components.

    Returns:
        Label -> component, in order.
    """
    numbers = [names[: place + 1].count(name) for place, name in enumerate(names)]
    labels = [f"{name}#{n}" if n > 1 else name for name, n in zip(names, numbers, strict=True)]
    return dict(zip(labels, components, strict=True))
