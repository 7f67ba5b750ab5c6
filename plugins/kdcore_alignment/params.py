"""Parameters of the methods."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kdcore import Params


class ULD(Params):
    """Parameters of the uld splitter."""

    merge: Literal["none", "product", "rest"] = Field(
        default="none",
        description="what the other tokens of a span count (method.alignment: spans or "
        "spans_last). none: nothing; product: the probabilities are multiplied by that of the "
        "other tokens, as GOLD does, so that their sum is below 1 (for total_variation); rest: "
        "likewise, and the missing probability is one more class (for any divergence)",
    )
