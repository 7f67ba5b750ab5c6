"""Declarations of the splitters and momentum policies of DeepKD and related papers."""

from __future__ import annotations

from collections.abc import Iterable

from kdcore import Component, hookimpl
from kdcore_deepkd import params

DEEPKD = "arXiv 2505.15133 (DeepKD, NeurIPS 2025)"
DKD = "arXiv 2203.08679 (Decoupled Knowledge Distillation, CVPR 2022)"
DOT = "Distillation-Oriented Trainer, ICCV 2023"


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Declare the splitters, the top-k mask and the momentum policies."""
    splitters, mask = "kdcore_deepkd.splitters", "kdcore_deepkd.top_k_mask"
    momentum = "kdcore_deepkd.momentum"
    return [
        Component(
            kind="splitter",
            name="task_kd",
            build=f"{splitters}:TaskKD",
            summary="leaves the distillation loss whole beside the task loss, as DOT does",
            source=DOT,
        ),
        Component(
            kind="splitter",
            name="standardise",
            build=f"{splitters}:Standardise",
            summary="divides the logits by their standard deviation, before any other splitter",
            source="arXiv 2403.01643 (Logit Standardization, CVPR 2024)",
        ),
        Component(
            kind="splitter",
            name="target_split",
            build=f"{splitters}:TargetSplit",
            summary="splits the loss at the label: label against rest, and the rest; exact sum",
            source=DKD,
        ),
        Component(
            kind="splitter",
            name="dkd",
            build=f"{splitters}:DKD",
            summary="like target_split, with free weights and a warm-up",
            source=DKD,
            params=params.DKDParams,
        ),
        Component(
            kind="splitter",
            name="top_k_mask",
            build=f"{mask}:TopKMask",
            summary="keeps the teacher's top k classes of one part; k follows a schedule",
            source=DEEPKD,
            params=params.TopKMaskParams,
        ),
        Component(
            kind="splitter",
            name="deepkd",
            build=f"{splitters}:DeepKDSplitter",
            summary="applies target_split, then top_k_mask on non_target",
            source=DEEPKD,
            params=params.CurriculumParams,
        ),
        Component(
            kind="momentum",
            name="per_term",
            build=f"{momentum}:PerTerm",
            summary="keeps a momentum buffer for each term, each with its own mu",
            source=DEEPKD,
            params=params.PerTermParams,
        ),
        Component(
            kind="momentum",
            name="dot",
            build=f"{momentum}:DOT",
            summary="uses momentum mu - d for the task and mu + d for distillation",
            source=DOT,
            params=params.DOTParams,
        ),
        Component(
            kind="momentum",
            name="deepkd",
            build=f"{momentum}:DeepKDMomentum",
            summary="uses momentum mu + d for task and non_target, and mu - d for target",
            source=DEEPKD,
            params=params.DeepKDParams,
        ),
    ]
