"""Speculative knowledge distillation: a gate on the teacher's tokens."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcore_speckd.gate import SpecKD, speckd_v1

__all__ = ["SpecKD", "speckd_v1"]
_MODULES = ("gate",)


def __getattr__(name: str) -> Any:
    """A component, whose module brings torch, when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    modules = (vars(import_module(f"{__name__}.{module}")) for module in _MODULES)
    return next(names[name] for names in modules if name in names)
