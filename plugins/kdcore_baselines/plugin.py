"""What this package adds to kdcore: one tuple of components for each kind."""

from __future__ import annotations

from collections.abc import Iterable

from kdcore.method.hookspecs import Component, hookimpl
from kdcore_baselines import params
from kdcore_baselines.drafting_components import DRAFTING
from kdcore_baselines.source_components import SOURCES

OURS = "implementation Apache-2.0"

GATES = (
    Component(
        "gate",
        "all",
        "kdcore_baselines.gates:everything",
        "weight 1 everywhere",
        "neutral element",
        licence=OURS,
    ),
    Component(
        "gate",
        "uniform",
        "kdcore_baselines.gates:uniform",
        "one weight everywhere: the control at the same mean weight",
        "control",
        params.Uniform,
        OURS,
    ),
    Component(
        "gate",
        "random",
        "kdcore_baselines.gates:Random",
        "keep each position by chance: the control at the same acceptance rate",
        "control",
        params.Random,
        OURS,
    ),
    Component(
        "gate",
        "inverted",
        "kdcore_baselines.gates:inverted",
        "keep what another gate refuses",
        "control",
        params.Inverted,
        OURS,
    ),
    Component(
        "gate",
        "entropy",
        "kdcore_baselines.gates:entropy",
        "keep or weigh up the positions where the teacher's entropy is low",
        "common practice",
        params.Entropy,
        OURS,
    ),
    Component(
        "gate",
        "confidence",
        "kdcore_baselines.gates:confidence",
        "keep the positions where the teacher's largest probability is high",
        "common practice",
        params.Confidence,
        OURS,
    ),
    Component(
        "gate",
        "student_entropy",
        "kdcore_baselines.gates:student_entropy",
        "keep the fraction of positions where the student is the least sure",
        "SE-KD, arXiv 2602.01395",
        params.StudentEntropy,
    ),
    Component(
        "gate",
        "hellinger",
        "kdcore_baselines.gates:hellinger",
        "keep the fraction of positions where student and teacher differ most",
        "AdaKD, arXiv 2510.11615",
        params.Hellinger,
    ),
    Component(
        "gate",
        "adaspec",
        "kdcore_baselines.gates:adaspec",
        "keep the fraction of positions where a reference model is the most ahead of the student",
        "AdaSPEC, arXiv 2510.19779",
        params.AdaSPEC,
    ),
    Component(
        "gate",
        "discount",
        "kdcore_baselines.gates:discount",
        "weigh less and less along a row: a drafter's deeper levels",
        "EAGLE, arXiv 2401.15077",
        params.Discount,
    ),
)

SPLITTERS = (
    Component(
        "splitter",
        "none",
        "kdcore_baselines.splitters:Whole",
        "leave the knowledge whole",
        "neutral element",
        licence=OURS,
    ),
    Component(
        "splitter",
        "by_position",
        "kdcore_baselines.splitters:ByPosition",
        "a part for each position of a row: a drafter's levels, each with a weight or a momentum",
        "ours",
        params.ByPosition,
        OURS,
    ),
)

DIVERGENCES = (
    Component(
        "divergence",
        "forward_kl",
        "kdcore_baselines.divergences:forward_kl",
        "KL(teacher || student)",
        "Hinton et al., arXiv 1503.02531",
    ),
    Component(
        "divergence",
        "reverse_kl",
        "kdcore_baselines.divergences:reverse_kl",
        "KL(student || teacher)",
        "MiniLLM, arXiv 2306.08543",
    ),
    Component(
        "divergence",
        "jsd",
        "kdcore_baselines.divergences:jsd",
        "generalised Jensen-Shannon divergence",
        "GKD, arXiv 2306.13649",
        params.JSD,
    ),
    Component(
        "divergence",
        "skew_kl",
        "kdcore_baselines.divergences:skew_kl",
        "forward KL to a student mixed with the teacher",
        "DistiLLM, arXiv 2402.03898",
        params.Skew,
    ),
    Component(
        "divergence",
        "skew_reverse_kl",
        "kdcore_baselines.divergences:skew_reverse_kl",
        "reverse KL to a teacher mixed with the student",
        "DistiLLM, arXiv 2402.03898",
        params.Skew,
    ),
    Component(
        "divergence",
        "total_variation",
        "kdcore_baselines.divergences:total_variation",
        "half the sum of the differences of probability",
        "f-distill, arXiv 2307.15190",
    ),
    Component(
        "divergence",
        "akl",
        "kdcore_baselines.divergences:akl",
        "forward and reverse KL, weighed by where the teacher's head and tail differ",
        "AKL, arXiv 2404.02657",
        params.AKL,
    ),
    Component(
        "divergence",
        "taid",
        "kdcore_baselines.divergences:TAID",
        "forward KL to a target that moves from the student to the teacher",
        "TAID, arXiv 2501.16937",
        params.TAID,
    ),
)

MOMENTA = (
    Component(
        "momentum",
        "shared",
        "kdcore_baselines.momentum:Shared",
        "one gradient for all terms; the optimiser keeps its momentum",
        "neutral element",
        licence=OURS,
    ),
)


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Declare every baseline."""
    return (*GATES, *SPLITTERS, *DIVERGENCES, *MOMENTA, *SOURCES, *DRAFTING)
