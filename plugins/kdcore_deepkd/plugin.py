"""What this package adds to kdcore."""

from __future__ import annotations

from collections.abc import Iterable

from kdcore.method.hookspecs import Component, hookimpl
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
            "splitter",
            "task_kd",
            f"{splitters}:TaskKD",
            "the whole distillation loss beside the task's: nothing to cut",
            DOT,
        ),
        Component(
            "splitter",
            "standardise",
            f"{splitters}:Standardise",
            "divide both logits by their standard deviation, before any cut",
            "arXiv 2403.01643 (Logit Standardization, CVPR 2024)",
        ),
        Component(
            "splitter",
            "target_split",
            f"{splitters}:TargetSplit",
            "the label against the rest, and the rest among itself; they add up to the whole",
            DKD,
        ),
        Component(
            "splitter",
            "dkd",
            f"{splitters}:DKD",
            "target_split under free weights, with a warm-up",
            DKD,
            params.DKDParams,
        ),
        Component(
            "splitter",
            "top_k_mask",
            f"{mask}:TopKMask",
            "of one part, the teacher's k best classes; k follows a curriculum",
            DEEPKD,
            params.TopKMaskParams,
        ),
        Component(
            "splitter",
            "deepkd",
            f"{splitters}:DeepKD",
            "target_split, then top_k_mask on non_target",
            DEEPKD,
            params.CurriculumParams,
        ),
        Component(
            "momentum",
            "per_term",
            f"{momentum}:PerTerm",
            "a momentum buffer for each term, each with its own mu",
            DEEPKD,
            params.PerTermParams,
        ),
        Component(
            "momentum",
            "dot",
            f"{momentum}:DOT",
            "the task at mu - d, distillation at mu + d",
            DOT,
            params.DOTParams,
        ),
        Component(
            "momentum",
            "deepkd",
            f"{momentum}:DeepKD",
            "task and non_target at mu + d, target at mu - d",
            DEEPKD,
            params.DeepKDParams,
        ),
    ]
