"""Declarations of the baselines: one tuple of components for each kind."""

from __future__ import annotations

from collections.abc import Iterable

from kdcore import Component, hookimpl
from kdcore_baselines.decoders.components import DECODERS
from kdcore_baselines.drafting_components import DRAFTING
from kdcore_baselines.method import params
from kdcore_baselines.method.token_selection.components import TOKEN_SELECTION
from kdcore_baselines.scores.components import SCORES
from kdcore_baselines.sources.components import SOURCES

OURS = "implementation Apache-2.0"

GATES = (
    Component(
        kind="gate",
        name="all",
        build="kdcore_baselines.method.gates:everything",
        summary="gives every position weight 1",
        source="neutral element",
        licence=OURS,
    ),
    Component(
        kind="gate",
        name="uniform",
        build="kdcore_baselines.method.gates:uniform",
        summary="gives every position the same weight; control with the same mean weight",
        source="control",
        params=params.Uniform,
        licence=OURS,
    ),
    Component(
        kind="gate",
        name="random",
        build="kdcore_baselines.method.gates:Random",
        summary="keeps each position at random; control with the same acceptance rate",
        source="control",
        params=params.Random,
        licence=OURS,
    ),
    Component(
        kind="gate",
        name="inverted",
        build="kdcore_baselines.method.gates:inverted",
        summary="keeps the positions that another gate rejects",
        source="control",
        params=params.Inverted,
        licence=OURS,
    ),
    Component(
        kind="gate",
        name="entropy",
        build="kdcore_baselines.method.gates:entropy",
        summary="keeps or favours the positions where the teacher's entropy is low",
        source="common practice",
        params=params.Entropy,
        licence=OURS,
    ),
    Component(
        kind="gate",
        name="confidence",
        build="kdcore_baselines.method.gates:confidence",
        summary="keeps the positions where the teacher's maximum probability is high",
        source="common practice",
        params=params.Confidence,
        licence=OURS,
    ),
    Component(
        kind="gate",
        name="student_entropy",
        build="kdcore_baselines.method.gates:student_entropy",
        summary="keeps the fraction of positions with the highest student entropy",
        source="as SE-KD, arXiv 2602.01395, over a micro-batch",
        params=params.StudentEntropy,
    ),
    Component(
        kind="gate",
        name="hellinger",
        build="kdcore_baselines.method.gates:hellinger",
        summary="keeps the fraction of positions where student and teacher differ most",
        source="the difficulty of AdaKD, arXiv 2510.11615",
        params=params.Hellinger,
    ),
    Component(
        kind="gate",
        name="adaspec",
        build="kdcore_baselines.method.gates:adaspec",
        summary="keeps the fraction of positions where a reference model most outperforms the "
        "student",
        source="AdaSPEC, arXiv 2510.19779",
        params=params.AdaSPEC,
    ),
    Component(
        kind="gate",
        name="discount",
        build="kdcore_baselines.method.gates:discount",
        summary="decreases the weight along a row, for the deeper levels of a drafter",
        source="published code of EAGLE-3, arXiv 2503.01840",
        params=params.Discount,
    ),
)

SPLITTERS = (
    Component(
        kind="splitter",
        name="none",
        build="kdcore_baselines.method.splitters:Whole",
        summary="leaves the distillation loss whole",
        source="neutral element",
        licence=OURS,
    ),
    Component(
        kind="splitter",
        name="by_position",
        build="kdcore_baselines.method.splitters:ByPosition",
        summary="splits the loss by position, to give each level of a drafter its own weight or "
        "momentum",
        source="ours",
        params=params.ByPosition,
        licence=OURS,
    ),
)

DIVERGENCES = (
    Component(
        kind="divergence",
        name="forward_kl",
        build="kdcore_baselines.method.divergences:forward_kl",
        summary="KL(teacher || student)",
        source="Hinton et al., arXiv 1503.02531",
    ),
    Component(
        kind="divergence",
        name="reverse_kl",
        build="kdcore_baselines.method.divergences:reverse_kl",
        summary="KL(student || teacher)",
        source="MiniLLM, arXiv 2306.08543",
    ),
    Component(
        kind="divergence",
        name="jsd",
        build="kdcore_baselines.method.divergences:jsd",
        summary="generalised Jensen-Shannon divergence",
        source="GKD, arXiv 2306.13649",
        params=params.JSD,
    ),
    Component(
        kind="divergence",
        name="skew_kl",
        build="kdcore_baselines.method.divergences:skew_kl",
        summary="forward KL to a mixture of student and teacher",
        source="DistiLLM, arXiv 2402.03898",
        params=params.Skew,
    ),
    Component(
        kind="divergence",
        name="skew_reverse_kl",
        build="kdcore_baselines.method.divergences:skew_reverse_kl",
        summary="reverse KL to a mixture of teacher and student",
        source="DistiLLM, arXiv 2402.03898; detached: DistiLLM-2, arXiv 2503.07067",
        params=params.SkewReverse,
    ),
    Component(
        kind="divergence",
        name="total_variation",
        build="kdcore_baselines.method.divergences:total_variation",
        summary="total variation distance: half the L1 distance of the probabilities",
        source="f-distill, arXiv 2307.15190",
    ),
    Component(
        kind="divergence",
        name="alpha_beta",
        build="kdcore_baselines.method.divergences:alpha_beta",
        summary="alpha-beta divergence, between and beyond forward and reverse KL",
        source="ABKD, arXiv 2505.04560",
        params=params.AlphaBeta,
    ),
    Component(
        kind="divergence",
        name="akl",
        build="kdcore_baselines.method.divergences:akl",
        summary="forward and reverse KL, weighted by the gaps on the teacher's head and tail",
        source="AKL, arXiv 2404.02657",
        params=params.AKL,
    ),
    Component(
        kind="divergence",
        name="taid",
        build="kdcore_baselines.method.divergences:TAID",
        summary="forward KL to a target that moves from the student to the teacher",
        source="TAID, arXiv 2501.16937",
        params=params.TAID,
    ),
)

ADVANTAGES = (
    Component(
        kind="advantage",
        name="minillm",
        build="kdcore_baselines.method.advantages:MiniLLM",
        summary="mean log-ratio of teacher and student over the later tokens of the response",
        source="MiniLLM, arXiv 2306.08543",
        params=params.MiniLLM,
    ),
)

MOMENTA = (
    Component(
        kind="momentum",
        name="shared",
        build="kdcore_baselines.method.momentum:Shared",
        summary="uses one gradient for all terms; the optimizer keeps its momentum",
        source="neutral element",
        licence=OURS,
    ),
)


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Declare every baseline."""
    return (
        *(*GATES, *TOKEN_SELECTION, *SPLITTERS, *DIVERGENCES, *ADVANTAGES, *MOMENTA),
        *(*SOURCES, *DRAFTING, *DECODERS, *SCORES),
    )
