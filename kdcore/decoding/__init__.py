"""Speculative decoding: a target's session, draft trees, and the loop that joins them.

This package names the parts that the author of a drafter builds on. Each is loaded from its module
when it is first asked for, so that importing the package imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "DecoderLayer",
    "DraftingModule",
    "FeatureTap",
    "LayerSize",
    "RowCache",
    "backbone",
    "causal",
    "chain",
    "low_middle_high",
    "shape_of",
]

if TYPE_CHECKING:
    from kdcore.decoding.drafters.module import DraftingModule
    from kdcore.decoding.drafters.row_cache import RowCache
    from kdcore.decoding.layers.decoder_layer import DecoderLayer, LayerSize, causal
    from kdcore.decoding.tree import backbone, chain, shape_of
    from kdcore.models.features import FeatureTap, low_middle_high
else:
    # what the imports above say to type checkers; a test holds them together
    _MODULES = {
        "kdcore.decoding.drafters.module": "DraftingModule",
        "kdcore.decoding.drafters.row_cache": "RowCache",
        "kdcore.decoding.layers.decoder_layer": "DecoderLayer LayerSize causal",
        "kdcore.decoding.tree": "backbone chain shape_of",
        "kdcore.models.features": "FeatureTap low_middle_high",
    }
    _MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'kdcore.decoding' has no attribute '{name}'")
        found = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
