"""A spec's method, built: the loss, and the policy that makes an update of its gradients."""

from __future__ import annotations

from dataclasses import dataclass

from kdcore.errors import UserError, nearest
from kdcore.method.choice import Choice
from kdcore.method.objective import FEATURE, TASK, Objective
from kdcore.method.protocols import BuildContext, Gate, MomentumPolicy, RankedGate
from kdcore.models.assembly import Assembly
from kdcore.runs.folder import Run
from kdcore.specs.train_drafter import TrainedSpec
from kdcore.specs.training import MethodSpec
from kdcore.training.arguments import training_arguments


@dataclass(frozen=True, slots=True)
class Method:
    """What a run learns by."""

    objective: Objective
    policy: MomentumPolicy

    @classmethod
    def build(cls, spec: TrainedSpec, assembly: Assembly, run: Run) -> Method:
        """Build it, and refuse a training section that it cannot be trained by.

        Raises UserError as `build_objective`, the policy and `training_arguments` do, and when
        policy and optimiser would both keep a momentum.
        """
        objective = build_objective(spec.method, assembly)
        policy: MomentumPolicy = assembly.build(spec.method.momentum)
        _refuse_two_momenta(spec, policy)
        training_arguments(spec, run)
        return cls(objective, policy)

    @property
    def streams(self) -> dict[str, tuple[str, ...]]:
        """Stream -> the terms of the loss that share its backward pass."""
        return self.policy.streams(tuple(self.objective.weights))


def _refuse_two_momenta(spec: TrainedSpec, policy: MomentumPolicy) -> None:
    """Raises UserError when the optimiser would do again what the policy does already.

    A policy that owns the momentum gives the whole update. Momentum would then be applied twice,
    and clipping would cut the update, whose norm has another scale, instead of the gradient.
    """
    training = spec.training
    wanted = {"optimizer": "sgd", "momentum": 0.0, "clip": 0.0, "weight_decay": 0.0}
    wrong = [name for name, value in wanted.items() if getattr(training, name) != value]
    if policy.owns_momentum and wrong:
        raise UserError(
            f"momentum policy '{spec.method.momentum.name}' gives the whole update, and training "
            f"has its own {', '.join(wrong)}",
            "set "
            + ", ".join(f"training.{name}: {wanted[name]}" for name in wrong)
            + "; clip and weight_decay are parameters of the policy",
        )


def build_objective(spec: MethodSpec, context: BuildContext) -> Objective:
    """Build every component of a method.

    Raises UserError for a weight of a term that the splitters do not give, and when no term
    has one.
    """
    splitters = tuple(context.build(choice) for choice in spec.splitters)
    names: tuple[str, ...] = ("kd",)
    for splitter in splitters:
        names = splitter.parts(names)
    unknown = sorted(set(spec.terms) - {TASK, FEATURE, *names})
    if unknown:
        raise UserError(
            f"method.terms sets a weight for unknown term '{unknown[0]}'",
            nearest(unknown[0], [TASK, FEATURE, *names]),
        )
    weights = {TASK: 0.0, FEATURE: 0.0} | dict.fromkeys(names, 1.0) | spec.terms
    if not any(weights.values()):
        raise UserError(
            "method.terms gives every term the weight 0: nothing would be learned",
            f"set a weight above 0 for one of: {', '.join(weights)}",
        )
    return Objective(
        gates=_labelled(spec.gates, context),
        splitters=splitters,
        divergence=context.build(spec.divergence),
        weights={name: weight for name, weight in weights.items() if weight != 0.0},
        tau=spec.tau,
        normalize=spec.normalize,
    )


def _labelled(gates: list[Choice], context: BuildContext) -> dict[str, Gate | RankedGate]:
    """Gates by name; a second one of the same name becomes ``name#2``."""
    labelled: dict[str, Gate | RankedGate] = {}
    for choice in gates:
        count = sum(label.split("#")[0] == choice.name for label in labelled)
        labelled[f"{choice.name}#{count + 1}" if count else choice.name] = context.build(choice)
    return labelled
