"""Speculative decoding: a target's session, draft trees, and the loop that joins them.

This package names the parts that the author of a drafter builds on. Each is loaded from its module
when it is first asked for, so that importing the package imports no torch.
"""

from typing import TYPE_CHECKING

from kdcore.components.exports import on_access

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
    # the same names as in the imports for type checkers above; a test compares the two
    _MODULES = {
        "kdcore.decoding.drafters.module": "DraftingModule",
        "kdcore.decoding.drafters.row_cache": "RowCache",
        "kdcore.decoding.layers.decoder_layer": "DecoderLayer LayerSize causal",
        "kdcore.decoding.tree": "backbone chain shape_of",
        "kdcore.models.features": "FeatureTap low_middle_high",
    }
    __getattr__, __dir__ = on_access(__name__, _MODULES)
