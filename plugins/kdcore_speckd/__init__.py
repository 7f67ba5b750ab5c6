"""SpecKD: a gate for speculative knowledge distillation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcore_speckd.gate import SpecKD, speckd_v1

__all__ = ["SpecKD", "speckd_v1"]
_MODULES = ("gate",)


def __getattr__(name: str) -> Any:
    """Import a component on first access, since its module imports torch."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    modules = (vars(import_module(f"{__name__}.{module}")) for module in _MODULES)
    return next(names[name] for names in modules if name in names)
