"""Tools and their calls in the forms of public data sets, as chat templates read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kdcore.errors import UserError


def from_json(value: Any, field: str, place: str) -> Any:
    """Read JSON text: columns of a table often hold such text.

    Args:
        value: Value of a field.
        field: Name of the field in messages.
        place: Name of the row in messages.

    Returns:
        What the text says; a value that is not a text stays.

    Raises:
        UserError: The text is not valid JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as fault:
        raise UserError(
            f"{place}: '{field}' is text that is not valid JSON: {fault}", "write valid JSON"
        ) from fault


def tools_of(value: Any, field: str, place: str) -> list[dict[str, Any]]:
    """Read the tools of a row.

    Args:
        value: A list of tools, or of their JSON texts, or JSON text of the list.
        field: Name of the field in messages.
        place: Name of the row in messages.

    Returns:
        The tools as templates and servers read them, ``{type: function, function: {...}}``.

    Raises:
        UserError: These are not tools.
    """
    found = from_json(value or [], field, place)
    if isinstance(found, list):
        found = [
            from_json(tool, field, place) if str(tool).lstrip().startswith("{") else tool
            for tool in found
        ]
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise UserError(
            f"{place}: '{field}' must be a list of mappings, the tools that can be called",
            "write a list of JSON schemas, or JSON text of one",
        )
    return [_tool(tool) for tool in found]


def calls_of(value: Any, field: str, place: str) -> list[dict[str, Any]]:
    """Read the tool calls of a message.

    Args:
        value: A list of calls, or JSON text of it.
        field: Name of the field in messages.
        place: Name of the row in messages.

    Returns:
        The calls, whose arguments are mappings: JSON text is read.

    Raises:
        UserError: These are not calls.
    """
    found = from_json(value or [], field, place)
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(call, dict) for call in found):
        raise UserError(
            f"{place}: '{field}' must be a list of mappings",
            'write [{"function": {"name": ..., "arguments": {...}}}]',
        )
    return [_call(call) for call in found]


def are_calls(value: Any) -> bool:
    """Whether a value is a list of names with arguments, as xLAM writes calls."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and {*each} == {"name", "arguments"} for each in value)
    )


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with its type, and with a JSON schema of its arguments."""
    if "function" in tool or not isinstance(tool.get("name"), str):
        return tool
    arguments = tool.get("parameters")
    named = isinstance(arguments, Mapping) and not {"type", "properties"} & arguments.keys()
    if named and arguments and all(isinstance(each, Mapping) for each in arguments.values()):
        tool = tool | {"parameters": {"type": "object", "properties": arguments}}
    return {"type": "function", "function": tool}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    if "function" not in call and isinstance(call.get("name"), str):
        call = {"type": "function", "function": call}
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return call
    try:
        read = json.loads(arguments)
    except ValueError:
        return call  # not JSON: the template prints the text
    if not isinstance(function, dict) or not isinstance(read, dict):
        return call
    return call | {"function": function | {"arguments": read}}
