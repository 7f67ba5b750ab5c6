"""A component chosen by a spec: its name, with its parameters beside it.

``gates: [{name: speckd, k: 5}]``; a bare string means ``{name: ...}``. The parameters are
validated by the component's own params model, and the JSON schema lists what is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import PydanticCustomError, core_schema

from kdcore.components.registry import Registry, describe, installed
from kdcore.errors import UserError, nearest, with_article

COMPONENT_REFERENCE = "x-kdcore-component"
"""The JSON schema key of a reference that the installed components have yet to fill."""

PARAMS_ERROR = "component"
"""The type of a pydantic error whose context holds the params model and its own errors."""

USER_MESSAGE = "said"
"""The type of a pydantic error whose context holds a cause and a cure."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A component of a kind, with validated params."""

    kind: str
    name: str
    params: BaseModel

    def dump(self) -> dict[str, Any]:
        """As a spec would say it, defaults included."""
        return {"name": self.name, **self.params.model_dump(mode="json")}


@dataclass(frozen=True, slots=True)
class OfKind:
    """Marks a `Choice` field with the kind of component it takes."""

    kind: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(Choice.dump),
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """A marker that `kdcore.specs.json_schema` replaces by the installed choices."""
        return {COMPONENT_REFERENCE: self.kind}

    def _validate(self, value: Any, info: core_schema.ValidationInfo) -> Choice:
        if isinstance(value, Choice):
            return value
        registry: Registry = (info.context or {}).get("registry") or installed()
        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise _said(
                f"must be the name of {with_article(self.kind)}, or {{name: NAME, "
                "PARAMETER: VALUE}",
                nearest("", registry.names(self.kind)),
            )
        try:
            component = registry.component(self.kind, given["name"])
        except UserError as unknown:
            raise _said(unknown.cause, unknown.cure) from unknown
        params = {key: item for key, item in given.items() if key != "name"}
        try:
            valid = component.params.model_validate(params, context=info.context)
        except ValidationError as inner:
            raise PydanticCustomError(
                PARAMS_ERROR,
                "invalid parameters of {kind} '{name}'",
                {
                    "kind": self.kind,
                    "name": component.name,
                    "errors": inner.errors(include_url=False),
                    "model": component.params,
                },
            ) from inner
        except Exception as fault:
            plugin = registry.plugin_of(self.kind, component.name)
            raise _said(
                f"{plugin.distribution} {plugin.version} failed while checking the "
                f"parameters of {self.kind} '{component.name}': {describe(fault)}",
                "reinstall that package, or choose another component",
            ) from fault
        return Choice(self.kind, component.name, valid)


def choices(part: Any, place: str = "") -> Iterator[tuple[str, Choice]]:
    """Find the components that a part of a spec names, and those in their params.

    Args:
        part: Part of a spec.
        place: Field of the part; for a component in another one's params, the other one's kind.

    Yields:
        The place and the choice of each component.
    """
    if isinstance(part, Choice):
        yield place, part
        yield from choices(part.params, part.kind)
    elif isinstance(part, BaseModel):
        for name in type(part).model_fields:
            yield from choices(getattr(part, name), name)
    elif isinstance(part, dict):
        for each in part.values():
            yield from choices(each, place)
    elif isinstance(part, list | tuple):
        for each in part:
            yield from choices(each, place)


def _said(cause: str, cure: str) -> PydanticCustomError:
    cause = cause.encode("utf-8", "backslashreplace").decode()  # it may name what is no text
    return PydanticCustomError(USER_MESSAGE, "{cause}", {"cause": cause, "cure": cure})


GateChoice: TypeAlias = Annotated[Choice, OfKind("gate")]
SplitterChoice: TypeAlias = Annotated[Choice, OfKind("splitter")]
DivergenceChoice: TypeAlias = Annotated[Choice, OfKind("divergence")]
AdvantageChoice: TypeAlias = Annotated[Choice, OfKind("advantage")]
MatcherChoice: TypeAlias = Annotated[Choice, OfKind("matcher")]
MomentumChoice: TypeAlias = Annotated[Choice, OfKind("momentum")]
SourceChoice: TypeAlias = Annotated[Choice, OfKind("source")]
DrafterChoice: TypeAlias = Annotated[Choice, OfKind("drafter")]
TreeChoice: TypeAlias = Annotated[Choice, OfKind("tree")]
VerifierChoice: TypeAlias = Annotated[Choice, OfKind("verifier")]
EngineChoice: TypeAlias = Annotated[Choice, OfKind("engine")]
BaselineChoice: TypeAlias = Annotated[Choice, OfKind("baseline")]
ScoreChoice: TypeAlias = Annotated[Choice, OfKind("score")]
