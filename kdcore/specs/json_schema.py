"""The JSON schema of a spec, for editors: every reference open into the installed choices."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel

from kdcore.components.choice import COMPONENT_REFERENCE
from kdcore.components.component import Component, Kind
from kdcore.components.registry import Registry, describe

JOB_REFERENCE = "x-kdcore-job"
"""The JSON schema key of a reference that the specs of the comparable jobs have yet to fill."""


def json_schema(model: type[BaseModel], registry: Registry) -> dict[str, Any]:
    """The schema of a spec model, with one definition for each kind and each component."""
    definitions: dict[str, Any] = {}
    root: dict[str, Any] = _opened(model.model_json_schema(), definitions, "")
    for kind in get_args(Kind):
        definitions[kind] = {"anyOf": [{"enum": registry.names(kind)}]}
    for component, _ in registry.components():
        name = f"{component.kind}.{component.name}"
        params = _opened(params_schema(component), definitions, f"{name}.")
        params["title"] = name
        params["description"] = component.summary
        params["properties"] = {"name": {"const": component.name}, **params.get("properties", {})}
        params["required"] = ["name", *params.get("required", [])]
        definitions[name] = params
        definitions[component.kind]["anyOf"].append({"$ref": f"#/$defs/{name}"})
    if "job" in definitions:
        comparable = [job for job, _ in registry.jobs() if job.comparable]
        for job in comparable:
            name = f"job.{job.name}"
            definitions[name] = _opened(model_schema(job.spec), definitions, f"{name}.")
        definitions["job"] = {"anyOf": [{"$ref": f"#/$defs/job.{job.name}"} for job in comparable]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def params_schema(component: Component) -> dict[str, Any]:
    """The schema of a component's params; one that allows anything when its model has none."""
    return model_schema(component.params)


def model_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of a model with its references closed; see `params_schema`."""
    try:
        return model.model_json_schema()
    except Exception as fault:  # a guest's model, of a type that JSON cannot say
        return {"type": "object", "$comment": f"the params have no schema: {describe(fault)}"}


def _opened(schema: Any, definitions: dict[str, Any], prefix: str) -> Any:
    """A copy with markers turned into references and local definitions hoisted under a prefix."""
    if isinstance(schema, list):
        return [_opened(item, definitions, prefix) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if COMPONENT_REFERENCE in schema:
        rest = {key: value for key, value in schema.items() if key != COMPONENT_REFERENCE}
        return {"$ref": f"#/$defs/{schema[COMPONENT_REFERENCE]}", **rest}
    if JOB_REFERENCE in schema:
        definitions["job"] = {}
        rest = {key: value for key, value in schema.items() if key != JOB_REFERENCE}
        return {"$ref": "#/$defs/job", **rest}
    for name, local in schema.get("$defs", {}).items():
        definitions[prefix + name] = _opened(local, definitions, prefix)
    opened = {k: _opened(v, definitions, prefix) for k, v in schema.items() if k != "$defs"}
    if isinstance(opened.get("$ref"), str):
        opened["$ref"] = opened["$ref"].replace("#/$defs/", f"#/$defs/{prefix}")
    return opened
