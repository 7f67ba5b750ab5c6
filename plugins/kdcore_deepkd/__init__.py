"""DeepKD: splitters of the distillation loss, and a momentum for each part."""

from typing import TYPE_CHECKING

from kdcore.components.exports import on_access

__all__ = [
    "DKD",
    "DOT",
    "DeepKDMomentum",
    "DeepKDSplitter",
    "PerTerm",
    "Standardise",
    "TargetSplit",
    "TaskKD",
    "TopKMask",
]

if TYPE_CHECKING:
    from kdcore_deepkd.momentum import DOT, DeepKDMomentum, PerTerm
    from kdcore_deepkd.splitters import DKD, DeepKDSplitter, Standardise, TargetSplit, TaskKD
    from kdcore_deepkd.top_k_mask import TopKMask
else:
    # the same names as in the imports for type checkers above; a test compares the two
    _MODULES = {
        ".momentum": "DOT DeepKDMomentum PerTerm",
        ".splitters": "DKD DeepKDSplitter Standardise TargetSplit TaskKD",
        ".top_k_mask": "TopKMask",
    }
    __getattr__, __dir__ = on_access(__name__, _MODULES)
