"""What is wrong with a spec, said in the spec's own words instead of the validator's."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo

from kdcore.components.choice import PARAMS_ERROR, USER_MESSAGE
from kdcore.errors import nearest
from kdcore.specs.reading.plain_yaml import Place

_WANTED = {
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "an integer",
    "list": "a list",
    "none": "no value",
    "path": "a path",
    "string": "a string",
    "tuple": "a list",
}
_TYPES = re.compile(
    rf"({'|'.join(_WANTED)})_(type|parsing|parsing_size|from_float|required|unicode)"
)
_UNKNOWN = "extra_forbidden"
_MOST = 500
"""Errors of the validator that are looked into: each takes a millisecond."""
_SIZES = {
    "too_short": "at least {min_length} item",
    "too_long": "at most {max_length} item",
    "string_too_short": "at least {min_length} character",
    "string_too_long": "at most {max_length} character",
}


@dataclass(frozen=True, slots=True, order=True)
class Mistake:
    """One thing to mend: where in the spec, what is wrong, what to write instead."""

    place: Place
    what: str
    cure: str

    @property
    def dotted(self) -> str:
        """The path as ``--set`` would take it."""
        return ".".join(map(str, self.place))


def mistakes(error: ValidationError, model: type[BaseModel]) -> list[Mistake]:
    """The mistakes behind a validation error of a spec model; of very many, the first ones."""
    by_place: dict[Place, list[_Found]] = defaultdict(list)
    for found in _first(error, model):
        by_place[found.union or found.place].append(found)
    return [mistake for group in by_place.values() for mistake in _told(group)]


def unknown_fields(error: ValidationError, model: type[BaseModel]) -> list[Place]:
    """The places of the fields that a spec has and its model lacks."""
    return [each.place for each in _first(error, model) if each.error["type"] == _UNKNOWN]


def shown(value: Any) -> str:
    """A value as a message shows it, on one line and not too long."""
    if isinstance(value, Mapping | list | tuple):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


@dataclass(frozen=True, slots=True)
class _Found:
    """Pydantic error with its place in the spec.

    Attributes:
        place: Path of the value.
        name: Last key on the way in the spec that holds it, even if `place` is elsewhere.
        union: Path of an untagged union of several types on the way, or None.
        model: Innermost model on the way.
        field: Last field on the way.
        around: Validated models on the way, the outermost first, with their places.
        called: What the mistake begins with.
    """

    place: Place
    name: str
    union: Place | None
    model: type[BaseModel]
    field: FieldInfo | None
    error: Mapping[str, Any]
    around: tuple[tuple[Place, type[BaseModel]], ...]
    called: str = ""


def _first(error: ValidationError, model: type[BaseModel]) -> Iterator[_Found]:
    return islice(_found(error.errors(include_url=False), model, ()), _MOST)


def _found(
    errors: Sequence[Any],
    model: type[BaseModel],
    base: Place,
    outer: tuple[tuple[Place, type[BaseModel]], ...] = (),
) -> Iterator[_Found]:
    around = (*outer, (base, model))
    for error in errors:
        path, union, inner, field = _follow(error["loc"], model)
        if error["type"] == _UNKNOWN:
            path, union = (*path, error["loc"][-1]), None
        if error["type"] == PARAMS_ERROR:
            here, context = base + path, error["ctx"]
            for each in _found(context["errors"], context["model"], here, around):
                yield each if context.get("place") is None else _moved(each, here, context)
        else:
            union = None if union is None else base + union
            place = base + path
            name = next((key for key in reversed(place) if isinstance(key, str)), "")
            yield _Found(place, name, union, inner, field, error, around)


def _moved(found: _Found, base: Place, context: Mapping[str, Any]) -> _Found:
    """An error of an inner spec whose fields stand elsewhere: see `parts.inner_errors`."""
    place = (*base, *context["place"](found.place[len(base) :]))
    return replace(found, place=place, called=context["called"] + found.called)


def _follow(
    loc: Place, model: type[BaseModel]
) -> tuple[Place, Place | None, type[BaseModel], FieldInfo | None]:
    """A location without pydantic's own labels for the members of a union, and what lies there."""
    annotations: list[Any] = [model]
    path: Place = ()
    union, field = None, None
    for element in loc:
        inside = [found for annotation in annotations for found in _inside(annotation, element)]
        if inside:
            models = [a for a in annotations if _is_model(a) and element in a.model_fields]
            field = models[0].model_fields[element] if models else field
            path, annotations = (*path, element), inside
            model = next(filter(_is_model, annotations), model)
        elif meant := _tagged(field, element):
            annotations, model = [meant], meant
        else:
            union = path
    return path, union, model, field


def _tagged(field: FieldInfo | None, tag: str | int) -> Any:
    """The model of a field's union that a tag stands for, if one does."""
    members = _tagged_members(field.annotation) if field else ()
    tagged = [m for m in members if Tag(str(tag)) in m.__metadata__]
    return get_args(tagged[0])[0] if tagged else None


def _tagged_members(annotation: Any) -> Iterator[Any]:
    """The members of a union that have a tag, also where the union is a member of another one."""
    for member in get_args(annotation):
        metadata = getattr(member, "__metadata__", ())
        if any(isinstance(each, Tag) for each in metadata):
            yield member
        elif metadata:
            yield from _tagged_members(get_args(member)[0])


def _inside(annotation: Any, element: str | int) -> list[Any]:
    """The annotations of what lies at an element (a field, a key, an index) of a type."""
    if _is_model(annotation):
        field = annotation.model_fields.get(element)
        return [] if field is None else _members(field.annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(element, int):
        return [m for a in arguments for m in _members(a)] if origin in (list, tuple) else []
    return _members(arguments[1]) if origin is dict and element != "[key]" else []


def _members(annotation: Any) -> list[Any]:
    """The types an annotation offers, with unions and Annotated opened."""
    if _is_model(annotation) or get_origin(annotation) in (list, tuple, dict):
        return [annotation]
    return [m for a in get_args(annotation) for m in _members(a)] or [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _told(group: Sequence[_Found]) -> Iterator[Mistake]:
    """The mistakes of one place. Of a union's types, those that fitted furthest were meant."""
    depth = max(len(found.place) for found in group)
    meant = [found for found in group if found.union is None or len(found.place) == depth]
    kinds = list(dict.fromkeys(wanted(found.error) for found in meant))
    if len(kinds) > 1 and all(kinds) and len({found.place for found in meant}) == 1:
        cures = [_cure(found) for found in meant]
        near = [cure for cure in cures if cure.startswith("did you mean")]
        what = f"must be {' or '.join(kinds)}, not {shown(meant[0].error['input'])}"
        yield Mistake(meant[0].place, meant[0].called + what, (near or [_about(meant[0])])[0])
    else:
        for found in meant:
            yield Mistake(found.place, found.called + _what(found), _cure(found))


def _what(found: _Found) -> str:
    context, kind, value = found.error.get("ctx", {}), found.error["type"], found.error["input"]
    if kind == "missing":
        return "missing field"
    if kind == _UNKNOWN:
        return "unknown key"
    if kind == USER_MESSAGE:
        return str(context["cause"])
    if right := wanted(found.error):
        return "missing value" if value is None else f"must be {right}, not {shown(value)}"
    if "error" in context:
        return _message(found)[0]
    if kind in _SIZES:
        size = _SIZES[kind].format_map(context)
        return f"must have {size}{'' if ' 1 ' in size else 's'}, not {len(value)}"
    what = str(found.error["msg"]).replace("Input should", "must")
    return what if isinstance(value, Mapping | list) else f"{what}, not {shown(value)}"


def _cure(found: _Found) -> str:
    kind, value = found.error["type"], found.error["input"]
    if kind == "missing":
        return f"add it; {_about(found)}"
    if kind == _UNKNOWN:
        return _right_name(found)
    if kind == USER_MESSAGE:
        return str(found.error["ctx"]["cure"])
    if "error" in found.error.get("ctx", {}) and (cure := _message(found)[1]):
        return cure
    if kind == "literal_error" and (words := re.findall(r"'([^']*)'", wanted(found.error))):
        return nearest(str(value), words)
    if kind == "none_required":
        return f"remove the line; {_about(found)}"
    if value is None and wanted(found.error):
        return f"fill it in, or remove the line; {_about(found)}"
    if kind == "list_type":
        return (
            "write it as a list item, with '- ' in front"
            if isinstance(value, Mapping)
            else f"write [{shown(value)}]"
        )
    if kind == "string_type" and not isinstance(value, Mapping | list):
        return f'put it in quotes: "{shown(value)}"'
    about = _about(found)
    return about if about.startswith(("write ", "see ", "run ")) else f"change it; {about}"


def _message(found: _Found) -> tuple[str, str]:
    """Cause and cure of a validator that raised ValueError("cause: cure"), or the cause alone."""
    cause, _, cure = str(found.error["ctx"]["error"]).partition(": ")
    return cause, cure


def wanted(error: Mapping[str, Any]) -> str:
    """Describe the expected type of a value.

    Args:
        error: Pydantic error.

    Returns:
        The expected type, or '' if the type is not the mistake.
    """
    kind = error["type"]
    if kind in ("enum", "literal_error"):
        return str(error["ctx"]["expected"])
    if kind in ("model_type", "model_attributes_type", "dataclass_type"):
        return "a mapping of fields"
    match = _TYPES.fullmatch(kind)
    return _WANTED[match[1]] if match else ""


def _about(found: _Found) -> str:
    """What to write for a field, in its own words."""
    if found.field is None:
        return "run `kdcore init` for an example spec"
    name = found.name
    for member in filter(_is_model, _members(found.field.annotation)):
        needed = [key for key, field in member.model_fields.items() if field.is_required()]
        fields = ", ".join(f"{key}: ..." for key in needed or member.model_fields)
        return f"write {name}: {{{fields}}}"
    if found.field.description:
        return f"{name}: {found.field.description}"
    if found.field.is_required():
        return f"see `kdcore schema` for the values of {name}"
    return f"the default of {name} is {shown(found.field.default)}"


def _right_name(found: _Found) -> str:
    word = found.name
    *outer, last = word.split(".")
    if outer and word in _paths(found.model):
        nested = "".join(f"{key}: {{" for key in outer) + f"{last}: ..." + "}" * len(outer)
        return f"nest it: write {nested}"
    cure = nearest(word, found.model.model_fields)
    bases = [("".join(f"{key}." for key in place), model) for place, model in found.around]
    # the types of a union may have it in common
    paths = dict.fromkeys(path for base, model in bases for path in _paths(model, base))
    elsewhere = [path for path in paths if path.rpartition(".")[2] == word]
    if elsewhere and not cure.startswith("did you mean"):
        return f"'{word}' belongs at {' or '.join(elsewhere)}"
    return cure


def _paths(model: type[BaseModel], base: str = "") -> Iterator[str]:
    """The dotted path of every field of a model and of the models inside it."""
    for name, field in model.model_fields.items():
        yield base + name
        for member in _members(field.annotation):
            if _is_model(member):
                yield from _paths(member, f"{base}{name}.")
