"""What this package adds to kdcore."""

from __future__ import annotations

from collections.abc import Iterable

from kdcore import Component, hookimpl
from kdcore_deepkd import params

DEEPKD = "arXiv 2505.15133 (DeepKD, NeurIPS 2025)"
DKD = "arXiv 2203.08679 (Decoupled Knowledge Distillation, CVPR 2022)"
DOT = "Distillation-Oriented Trainer, ICCV 2023"


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Splitters, the top-k mask and the momentum policies."""
    splitters, mask = "kdcore_deepkd.splitters", "kdcore_deepkd.top_k_mask"
    momentum = "kdcore_deepkd.momentum"
    return [
        Component(
            kind="splitter",
            name="task_kd",
            build=f"{splitters}:TaskKD",
            summary="the whole distillation loss beside the task's: nothing to cut",
            source=DOT,
        ),
        Component(
            kind="splitter",
            name="standardise",
            build=f"{splitters}:Standardise",
            summary="divide both logits by their standard deviation, before any cut",
            source="arXiv 2403.01643 (Logit Standardization, CVPR 2024)",
        ),
        Component(
            kind="splitter",
            name="target_split",
            build=f"{splitters}:TargetSplit",
            summary="the label against the rest, and the rest among itself; they add up to the "
            "whole",
            source=DKD,
        ),
        Component(
            kind="splitter",
            name="dkd",
            build=f"{splitters}:DKD",
            summary="target_split under free weights, with a warm-up",
            source=DKD,
            params=params.DKDParams,
        ),
        Component(
            kind="splitter",
            name="top_k_mask",
            build=f"{mask}:TopKMask",
            summary="of one part, the teacher's k best classes; k follows a curriculum",
            source=DEEPKD,
            params=params.TopKMaskParams,
        ),
        Component(
            kind="splitter",
            name="deepkd",
            build=f"{splitters}:DeepKDSplitter",
            summary="target_split, then top_k_mask on non_target",
            source=DEEPKD,
            params=params.CurriculumParams,
        ),
        Component(
            kind="momentum",
            name="per_term",
            build=f"{momentum}:PerTerm",
            summary="a momentum buffer for each term, each with its own mu",
            source=DEEPKD,
            params=params.PerTermParams,
        ),
        Component(
            kind="momentum",
            name="dot",
            build=f"{momentum}:DOT",
            summary="the task at mu - d, distillation at mu + d",
            source=DOT,
            params=params.DOTParams,
        ),
        Component(
            kind="momentum",
            name="deepkd",
            build=f"{momentum}:DeepKDMomentum",
            summary="task and non_target at mu + d, target at mu - d",
            source=DEEPKD,
            params=params.DeepKDParams,
        ),
    ]
