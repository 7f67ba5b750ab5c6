"""DeepKD: splitters of the knowledge, and a momentum for each part."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcore_deepkd.momentum import DOT, DeepKDMomentum, PerTerm
    from kdcore_deepkd.splitters import DKD, DeepKDSplitter, Standardise, TargetSplit, TaskKD
    from kdcore_deepkd.top_k_mask import TopKMask

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
_MODULES = ("momentum", "splitters", "top_k_mask")


def __getattr__(name: str) -> Any:
    """A component, whose module brings torch, when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    modules = (vars(import_module(f"{__name__}.{module}")) for module in _MODULES)
    return next(names[name] for names in modules if name in names)
