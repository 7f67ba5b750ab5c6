"""Distillation between models of other tokenizers or other widths."""

from typing import TYPE_CHECKING

from kdcore.components.exports import on_access

__all__ = ["ULD", "Attention", "Gold", "Hidden"]

if TYPE_CHECKING:
    from kdcore_alignment.attention import Attention
    from kdcore_alignment.hidden_states import Hidden
    from kdcore_alignment.shared_classes import Gold
    from kdcore_alignment.sorted_classes import ULD
else:
    # the same names as in the imports for type checkers above; a test compares the two
    _MODULES = {
        ".attention": "Attention",
        ".hidden_states": "Hidden",
        ".shared_classes": "Gold",
        ".sorted_classes": "ULD",
    }
    __getattr__, __dir__ = on_access(__name__, _MODULES)
