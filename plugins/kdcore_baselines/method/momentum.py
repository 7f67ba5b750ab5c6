"""Neutral momentum policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kdcore import Params, by_keywords

if TYPE_CHECKING:
    from torch import Tensor

    from kdcore import BuildContext


class Shared:
    """Momentum policy with one backward pass for all terms and the optimizer's own momentum."""

    owns_momentum = False

    @by_keywords(Params)
    def __init__(self, params: Params, context: BuildContext) -> None:
        pass

    def streams(self, terms: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {"all": tuple(terms)}

    def combine(
        self, gradients: Mapping[str, Sequence[Tensor]], parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        return list(gradients["all"])

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass
