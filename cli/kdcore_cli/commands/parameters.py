"""Parameters of a component as text, from the JSON schema of its params model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from kdcore.components.choice import COMPONENT_REFERENCE
from kdcore.components.component import Component
from kdcore.specs.json_schema import model_schema
from kdcore.specs.parts.fields import BEYOND_USE

_WORDS = {
    "array": "list",
    "boolean": "boolean",
    "integer": "integer",
    "null": "null",
    "number": "float",
    "object": "mapping",
    "string": "string",
}
_BOUNDS = {
    "exclusiveMinimum": ">",
    "minimum": ">=",
    "exclusiveMaximum": "<",
    "maximum": "<=",
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One field of a params model.

    Attributes:
        name: Name of the field.
        type: Type and bounds as text.
        default: Default value as JSON; None for a required field.
        description: Description of the field.
    """

    name: str
    type: str
    default: str | None
    description: str


def parameters(component: Component) -> list[Parameter]:
    """Return the parameters that a spec may set on a component.

    Args:
        component: Declared component.

    Returns:
        One record for each parameter.
    """
    return fields_of(component.params)


def fields_of(model: type[BaseModel]) -> list[Parameter]:
    """Return the fields of a params model or of a job's spec.

    Args:
        model: Pydantic model.

    Returns:
        One record for each field.
    """
    schema = model_schema(model)
    return [
        Parameter(
            name,
            _type(field, schema.get("$defs", {})),
            None if name in schema.get("required", ()) else json.dumps(field.get("default")),
            field.get("description", ""),
        )
        for name, field in schema.get("properties", {}).items()
    ]


def _type(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if COMPONENT_REFERENCE in schema:
        return str(schema[COMPONENT_REFERENCE])
    if "$ref" in schema:
        return _type(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if union := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(one, definitions) for one in union))
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(one) for one in schema.get("enum", [schema.get("const")]))
    word = _WORDS.get(schema.get("type", ""), "any")
    items = [schema["items"]] if "items" in schema else schema.get("prefixItems", [])
    if word == "list" and items:
        types = list(dict.fromkeys(_type(each, definitions) for each in items))
        # a pair of numbers with bounds of their own is shown as a pair of numbers
        return f"list of {types[0] if len(types) == 1 else types[0].split()[0]}"
    bounds = {sign: schema[key] for key, sign in _BOUNDS.items() if key in schema}
    told = [f"{sign} {value}" for sign, value in bounds.items() if abs(value) not in BEYOND_USE]
    return " ".join([word, *told])
