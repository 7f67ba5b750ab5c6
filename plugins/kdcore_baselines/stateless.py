"""Components that are a single formula without state."""

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
    """Turn a formula into the builder of a component.

    Args:
        formula: Function that takes its params as keyword arguments.

    Returns:
        A builder, which binds the params to the formula.
    """

    @functools.wraps(formula)
    def build(params: BaseModel, context: BuildContext) -> Callable[..., Tensor]:
        built = functools.partial(formula, **dict(params))
        vars(built).update(vars(formula))  # attributes such as teacher_classes
        return built

    return build
