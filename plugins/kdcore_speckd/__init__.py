"""SpecKD: a gate for speculative knowledge distillation."""

from typing import TYPE_CHECKING

from kdcore.components.exports import on_access

__all__ = ["SpecKD", "speckd_v1"]

if TYPE_CHECKING:
    from kdcore_speckd.gate import SpecKD, speckd_v1
else:
    # the same names as in the imports for type checkers above; a test compares the two
    _MODULES = {
        ".gate": "SpecKD speckd_v1",
    }
    __getattr__, __dir__ = on_access(__name__, _MODULES)
