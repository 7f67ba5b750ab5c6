"""Components that are one formula and keep no state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import Tensor

    from kdcore import BuildContext


def stateless(
    formula: Callable[..., Tensor],
) -> Callable[[BaseModel, BuildContext], Callable[..., Tensor]]:
    """What builds the component: the formula with its params bound as keywords."""

    @functools.wraps(formula)
    def build(params: BaseModel, context: BuildContext) -> Callable[..., Tensor]:
        built = functools.partial(formula, **dict(params))
        vars(built).update(vars(formula))  # what the formula says of itself
        return built

    return build
