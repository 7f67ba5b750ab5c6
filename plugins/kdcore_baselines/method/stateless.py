"""Components that are a single formula without state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec

from pydantic import BaseModel

from kdcore import by_keywords

if TYPE_CHECKING:
    from torch import Tensor

    from kdcore import BuildContext

Keywords = ParamSpec("Keywords")


def stateless(
    params: Callable[Keywords, BaseModel],
) -> Callable[[Callable[..., Tensor]], Callable[Keywords, Callable[..., Tensor]]]:
    """Turn a formula into the builder of a component.

    Args:
        params: Params model, whose fields are keyword arguments of the formula.

    Returns:
        A decorator of the formula, which gives a builder that binds the params to it.
    """

    def component(formula: Callable[..., Tensor]) -> Callable[Keywords, Callable[..., Tensor]]:
        def build(given: BaseModel, context: BuildContext) -> Callable[..., Tensor]:
            built = functools.partial(formula, **dict(given))
            vars(built).update(vars(formula))  # attributes such as teacher_classes
            return built

        build.__name__, build.__doc__ = formula.__name__, formula.__doc__
        build.__module__, build.__qualname__ = formula.__module__, formula.__qualname__
        return by_keywords(params)(build)

    return component
