"""A model behind an OpenAI-compatible endpoint, as a spec names it."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from kdcore.specs.parts.fields import SpecModel


def _address(url: str) -> str:
    wrong = "not an http or https URL: write e.g. http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        (parts.hostname or "").encode("idna")
    except ValueError:  # a port or a host that cannot be
        raise ValueError(wrong) from None
    if not valid or not re.fullmatch(r"[^\s\0-\x1f\x7f]+", url):
        raise ValueError(wrong)
    if "@" in parts.netloc or parts.query:
        raise ValueError(
            "the URL contains credentials or a query: remove them, and put the key into an "
            "environment variable"
        )
    return url


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):  # what it is instead, a key perhaps, is not shown
        raise ValueError(
            "not the name of an environment variable: write the variable's name, e.g. "
            "OPENAI_API_KEY"
        )
    return name


def kind_of_teacher(given: Any) -> str:
    """The tag of a teacher in a union of models and endpoints."""
    fields = given if isinstance(given, dict) else getattr(given, "__dict__", ())
    return "an endpoint" if "endpoint" in fields else "a model"


Address: TypeAlias = Annotated[str, AfterValidator(_address)]
"""The base URL of an API."""


class EndpointSpec(SpecModel):
    """A model behind an OpenAI-compatible endpoint."""

    endpoint: Address = Field(description="base URL of the API, e.g. http://localhost:8000/v1")
    model: str = Field(min_length=1, description="name of the model on the server")
    key: Annotated[str, AfterValidator(_variable)] | None = Field(
        None, description="name of the environment variable that holds the API key"
    )
    timeout: Annotated[float, Field(gt=0, le=86400)] = Field(
        600, description="maximum seconds for a request, with its retries"
    )
