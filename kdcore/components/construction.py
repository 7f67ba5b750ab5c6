"""Components built: from the choice of a spec, or by the keywords of their params.

Imports no torch.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from pydantic import BaseModel, ValidationError

from kdcore.components.choice import Choice
from kdcore.components.component import PROTOCOLS
from kdcore.components.registry import Registry, describe, installed
from kdcore.errors import UserError, nearest

Keywords = ParamSpec("Keywords")
Built = TypeVar("Built")
Self = TypeVar("Self")


class NamedModel(Protocol):
    """What a component sees of a loaded model: the model, its tokenizer and where it came from."""

    @property
    def model(self) -> Any:
        """The transformers model."""

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""

    @property
    def name(self) -> str:
        """The name that messages use."""

    @property
    def digest(self) -> str:
        """The sha256 of config and weights."""


class BuildContext(Protocol):
    """What a component may ask for while it is built."""

    def build(self, choice: Choice) -> Any:
        """Build a component named inside this one's params (e.g. the gate that is inverted)."""

    def load_model(self, model: str) -> NamedModel:
        """A frozen language model, named as a spec names one."""


@dataclass(frozen=True, slots=True)
class ChoiceBuilder:
    """A `BuildContext` of components alone, which loads no model.

    registry: where names are looked up, by default what is installed.
    """

    registry: Registry = field(default_factory=installed)

    def build(self, choice: Choice) -> Any:
        """Import, construct and check one component.

        Raises UserError, naming the distribution, when it cannot be imported or built, or
        lacks a member of its Protocol; a UserError of its own passes through.
        """
        component = self.registry.component(choice.kind, choice.name)
        plugin = self.registry.plugin_of(choice.kind, choice.name)
        try:
            built = self.registry.attribute(component)(choice.params, self)
        except UserError:
            raise
        except (Exception, SystemExit) as fault:
            raise UserError(
                f"{choice.kind} '{choice.name}' of {plugin.distribution} {plugin.version} "
                f"cannot be built: {describe(fault)}",
                "report it to the plugin's author, or choose another component",
            ) from fault
        accepted = protocols_of(choice.kind)
        if not isinstance(built, accepted):
            wanted = " or ".join(protocol.__name__ for protocol in accepted)
            raise UserError(
                f"{choice.kind} '{choice.name}' of {plugin.distribution} {plugin.version} "
                f"does not satisfy the Protocol {wanted}",
                "report it to the plugin's author; kdcore.testing shows what is missing",
            )
        return built

    def load_model(self, model: str) -> Any:
        """See `BuildContext`. Raises UserError: there is none to give."""
        raise UserError(
            f"the component needs the model '{model}', and only a run loads models for components",
            "choose another component, or write a spec and run it",
        )


def protocols_of(kind: str) -> tuple[type, ...]:
    """The Protocols of which a component of a kind must satisfy one."""
    places = (place.split(":") for place in PROTOCOLS[kind])
    return tuple(getattr(importlib.import_module(module), name) for module, name in places)


class _TakesKeywords(Protocol[Keywords]):
    """What `by_keywords` returns, as type checkers see it: for a function, and for a method."""

    @overload
    def __call__(
        self, build: Callable[[Any, BuildContext], Built], /
    ) -> Callable[Keywords, Built]: ...

    @overload
    def __call__(
        self, build: Callable[[Self, Any, BuildContext], None], /
    ) -> Callable[Concatenate[Self, Keywords], None]: ...


def by_keywords(params: Callable[Keywords, BaseModel]) -> _TakesKeywords[Keywords]:
    """Let a component be built by the keywords of its params, e.g. ``SpecKD(k=3)``.

    It decorates an ``__init__(self, params, context)`` or a function ``build(params, context)``.
    The registry still calls it so. Called with keywords it validates them by ``params``, and the
    component gets a context that builds installed components and loads no model.

    Args:
        params: The params model.

    Returns:
        The decorator. What it decorates raises UserError for a wrong keyword or value.
    """

    def decorate(build: Callable[..., Any]) -> Callable[..., Any]:
        declared = inspect.signature(build)
        *owner, _, _ = declared.parameters.values()

        @functools.wraps(build)
        def built(*given: Any, **keywords: Any) -> Any:
            if len(given) == len(owner) + 2:
                return build(*given)
            name = type(given[0]).__name__ if owner else build.__name__
            if len(given) > len(owner):
                raise UserError(f"{name} takes keywords only", f"write {name}(NAME=VALUE, ...)")
            return build(*given, _validated(params, name, keywords), ChoiceBuilder())

        fields = inspect.signature(params).parameters.values()
        vars(built)["__signature__"] = declared.replace(parameters=[*owner, *fields])
        return built

    return decorate


def _validated(
    params: Callable[..., BaseModel], name: str, keywords: Mapping[str, Any]
) -> BaseModel:
    """Raises UserError with all mistakes in one line."""
    try:
        return params(**keywords)
    except ValidationError as wrong:
        errors = wrong.errors(include_url=False)
    known = inspect.signature(params).parameters
    unknown = [str(each["loc"][0]) for each in errors if each["type"] == "extra_forbidden"]
    if unknown:
        raise UserError(f"{name} has no parameter '{unknown[0]}'", nearest(unknown[0], known))
    told = [
        ": ".join(filter(None, (".".join(map(str, each["loc"])), _message(each))))
        for each in errors
    ]
    raise UserError(f"{name}: {'; '.join(told)}", f"parameters: {', '.join(known)}")


def _message(error: Any) -> str:
    """One of pydantic's errors in a spec's words, with those of a component inside it."""
    inner = error.get("ctx", {}).get("errors")
    if inner:
        told = (f"{'.'.join(map(str, each['loc']))}: {_message(each)}" for each in inner)
        return f"{error['msg']} ({'; '.join(told)})"
    return str(error["msg"]).removeprefix("Value error, ").replace("Input should", "must")
