"""Errors of a spec that is part of another one, as `kdcore.specs.reading.mistakes` reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from kdcore.components.choice import PARAMS_ERROR, USER_MESSAGE
from kdcore.specs.parts.changes import Keys


def errors_of(
    fault: ValidationError,
    model: type[BaseModel],
    place: Callable[[Keys], Keys] | None = None,
    called: str = "",
) -> PydanticCustomError:
    """The errors of an inner spec, to be raised where the outer one holds it.

    Args:
        fault: The errors.
        model: The model of the inner spec.
        place: Keys of a field of the inner spec -> those of the value in the outer one that sets
            it (default: the same ones).
        called: What each mistake begins with.
    """
    return _errors(fault.errors(include_url=False), model, place, called)


def mistake_at(keys: Keys, cause: str, cure: str, value: Any = None) -> PydanticCustomError:
    """One error, to be raised by the validator of what is around its place.

    Args:
        keys: The way to its place from there.
        cause: What is wrong.
        cure: What to type or change.
        value: The wrong value.
    """
    cause = cause.encode("utf-8", "backslashreplace").decode()  # it may name what is no text
    told = {"type": USER_MESSAGE, "msg": cause, "ctx": {"cause": cause, "cure": cure}}
    return _errors(
        [told | {"loc": (), "input": value}], BaseModel, lambda _: keys, said=f"{cause}: {cure}"
    )


def _errors(
    errors: list[Any],
    model: type[BaseModel],
    place: Callable[[Keys], Keys] | None = None,
    called: str = "",
    said: str = "invalid spec",
) -> PydanticCustomError:
    context = {"errors": errors, "model": model, "place": place, "called": called, "said": said}
    return PydanticCustomError(PARAMS_ERROR, "{said}", context)
