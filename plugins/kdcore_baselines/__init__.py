"""The methods that every other one is compared with."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcore_baselines.divergences import (
        TAID,
        akl,
        forward_kl,
        jsd,
        reverse_kl,
        skew_kl,
        skew_reverse_kl,
        total_variation,
    )
    from kdcore_baselines.gates import (
        Random,
        adaspec,
        confidence,
        discount,
        entropy,
        everything,
        hellinger,
        inverted,
        student_entropy,
        uniform,
    )
    from kdcore_baselines.momentum import Shared
    from kdcore_baselines.splitters import ByPosition, Whole

__all__ = [
    "TAID",
    "ByPosition",
    "Random",
    "Shared",
    "Whole",
    "adaspec",
    "akl",
    "confidence",
    "discount",
    "entropy",
    "everything",
    "forward_kl",
    "hellinger",
    "inverted",
    "jsd",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "student_entropy",
    "total_variation",
    "uniform",
]
_MODULES = ("divergences", "gates", "momentum", "splitters")


def __getattr__(name: str) -> Any:
    """A component, whose module brings torch, when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    modules = (vars(import_module(f"{__name__}.{module}")) for module in _MODULES)
    return next(names[name] for names in modules if name in names)
