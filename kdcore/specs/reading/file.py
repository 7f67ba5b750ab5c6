"""A spec file as its model, with ``--set`` on top, and one message for all that is wrong."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdcore.components.job import Job
from kdcore.components.registry import Registry, installed
from kdcore.errors import MOST_NAMES, Mistakes, UserError, nearest, not_utf8, unreadable
from kdcore.specs.parts.fields import SpecModel
from kdcore.specs.reading import plain_yaml
from kdcore.specs.reading.mistakes import Mistake, mistakes, shown
from kdcore.specs.reading.plain_yaml import Place

LONGEST_PATH = 1000
"""Characters before the = of an assignment."""
BEGIN = "run `kdcore init` for an example spec"
_PLACING: ContextVar[_Document | None] = ContextVar("the document of `placing`", default=None)


def read_spec(
    path: Path,
    sets: Sequence[str] = (),
    *,
    registry: Registry | None = None,
    given_as: str = "--set",
) -> SpecModel:
    """Read and validate a spec file.

    Args:
        path: Spec file.
        sets: Assignments ``a.b.0.c=VALUE``, applied before validation. VALUE is YAML, a number
            indexes a list, missing mappings are created, and a component's bare name becomes a
            mapping with room for its parameters.
        registry: Known components (default: the installed ones).
        given_as: Prefix of an assignment in messages.

    Returns:
        The spec.

    Raises:
        UserError: The spec is invalid; the message lists each mistake with its line or assignment.
    """
    document = _Document.of_text(_text(path), str(path))
    return _validated(document, path.parent, sets, registry, given_as)


@contextmanager
def placing(path: Path, sets: Sequence[str] = (), *, given_as: str = "--set") -> Iterator[None]:
    """State where in a spec file the mistakes are that are raised inside and name a field.

    The file is read at once: a run may replace it, if it is the copy in its folder. A pipe, which
    cannot be read twice, has no lines to state.

    Args:
        path: Spec file.
        sets: See `read_spec`.
        given_as: See `read_spec`.

    Raises:
        UserError: A mistake was raised inside; now each has its line or assignment. A single one
            remains the same exception.
    """
    if not path.is_file():
        yield
        return
    document = _Document.of_text(_text(path), str(path))
    for assignment in sets:
        document.set(assignment, given_as)
    before = _PLACING.set(document)
    try:
        yield
    except UserError as wrong:
        told = placed(wrong)
        if told is wrong:
            raise
        if isinstance(wrong, Mistakes):
            raise told from wrong
        wrong.cause, wrong.cure, wrong.args = told.cause, told.cure, told.args
        wrong.placed = True
        raise
    finally:
        _PLACING.reset(before)


def placed(wrong: UserError) -> UserError:
    """A mistake with its place in the spec file, where `placing` reads one.

    Args:
        wrong: The mistake, or more than one.

    Returns:
        A new error; the same one if it names no field, has its place, or nothing is read.
    """
    document = _PLACING.get()
    several = isinstance(wrong, Mistakes)
    if document is None or wrong.placed or not (several or wrong.field):
        return wrong
    found = wrong.found if isinstance(wrong, Mistakes) else [wrong]
    return document.error([Mistake(document.place_of(m.field), m.cause, m.cure) for m in found])


def parse_spec(
    text: str, name: str, base: Path, sets: Sequence[str] = (), *, registry: Registry | None = None
) -> SpecModel:
    """Read and validate a spec from a text.

    Args:
        text: Spec in YAML.
        name: Name of the spec in messages.
        base: Folder of relative paths.
        sets: See `read_spec`.
        registry: See `read_spec`.

    Returns:
        The spec.

    Raises:
        UserError: See `read_spec`.
    """
    return _validated(_Document.of_text(text, name), base, sets, registry, "--set")


def validate_spec(
    data: Mapping[str, Any],
    base: Path,
    sets: Sequence[str] = (),
    *,
    registry: Registry | None = None,
    given_as: str = "--set",
) -> SpecModel:
    """`read_spec` of what a spec file would hold, as plain data.

    Args:
        data: The spec, which is left as it is.
        base: What relative paths are taken from.
        sets: Assignments, as of `read_spec`.
        registry: The known components; by default what is installed.
        given_as: What messages call an assignment.

    Raises:
        UserError: Lists each mistake.
    """
    document = _Document(copy.deepcopy(dict(data)), {(): (0, "the spec")})
    return _validated(document, base, sets, registry, given_as)


def _validated(
    document: _Document,
    base: Path,
    sets: Sequence[str],
    registry: Registry | None,
    given_as: str,
) -> SpecModel:
    for assignment in sets:
        document.set(assignment, given_as)
    registry = registry or installed()
    model = _job(document, registry).spec
    context = {"base": base.resolve(), "registry": registry}
    try:
        spec: SpecModel = model.model_validate(document.data, context=context)
    except ValidationError as error:
        raise document.error(mistakes(error, model)) from None
    if flags := list(_flags_as_numbers(document.data, spec.model_dump(mode="json"))):
        raise document.error(flags)
    return spec


def _job(document: _Document, registry: Registry) -> Job:
    """The job that a spec names. Raises UserError that says where the name is wrong."""
    name = document.data.get("job")
    if name is None:
        known = ", ".join(job.name for job, _ in registry.jobs())
        raise document.error([Mistake(("job",), "missing field", f"add it, one of: {known}")])
    try:
        return registry.job(str(name))
    except UserError as wrong:
        claimed_twice = name in registry.names(Job.kind)
        what = wrong.cause if claimed_twice else f"unknown job {shown(name)}"
        raise document.error([Mistake(("job",), what, wrong.cure)]) from None


class _Document:
    """The plain data of a spec, and which line or assignment each value came from."""

    def __init__(self, data: dict[str, Any], origin: dict[Place, tuple[int, str]]) -> None:
        self.data = data
        self._origin = origin

    @classmethod
    def of_text(cls, text: str, file: str) -> _Document:
        """Of a spec file's text."""
        data, lines = plain_yaml.parse(text, lambda line: f"{file}:{line}")
        if data is None:
            raise UserError(f"{file} is empty", BEGIN)
        if not isinstance(data, dict):
            raise UserError(f"{file}:1: a spec must be a mapping, not {shown(data)}", BEGIN)
        return cls(data, {place: (line, f"{file}:{line}") for place, line in lines.items()})

    def set(self, assignment: str, given_as: str) -> None:
        """Apply one ``a.b.0.c=VALUE``."""
        dotted, equals, text = assignment.partition("=")
        label = _shortened(f"{given_as} {assignment}")
        keys = dotted.split(".")
        if not equals or not all(keys) or len(dotted) > LONGEST_PATH:
            raise UserError(f"{label}: not an assignment", f"write {given_as} training.steps=100")
        keys = [*map(str, self.place_of(dotted))]  # a key of a grid contains dots
        value, _ = plain_yaml.parse(text, lambda line: label)
        into: Any = self.data
        place: Place = ()
        for key in keys:
            at = _key(into, key, place, label)
            place = (*place, at)
            old = into.get(at) if isinstance(into, dict) else into[at]
            if len(place) == len(keys):
                new = value
            elif isinstance(old, str):
                new = {"name": old}  # a bare name, which stands for {name: ...}
            elif old is None:
                new = {}
            else:
                into = old
                continue
            into[at] = new
            self._replaced(place, label)
            into = new

    def error(self, found: Sequence[Mistake]) -> UserError:
        """The mistakes as one error, in the order of their lines; of many, the first ones."""
        every = sorted((self._origin_of(mistake.place), mistake) for mistake in found)
        ordered = every[:MOST_NAMES]
        one_cure = len({mistake.cure for _, mistake in ordered}) == 1
        placed = []
        for (_, label), m in ordered:
            cause = f"{label}: {'' if m.what.startswith(m.dotted) else m.dotted + ': '}{m.what}"
            cure = m.cure
            if not one_cure:
                cure = cure.removeprefix("change it; ")
                if m.place:
                    cure = f"{m.dotted}: {cure.removeprefix(f'{m.place[-1]}: ')}"
            placed.append(UserError(cause, cure, m.dotted))
        told = placed[0] if len(every) == 1 else Mistakes(placed, len(every) - len(placed))
        told.placed = True
        return told

    def place_of(self, field: str) -> Place:
        """The place that a field names; a key may contain dots, as those of a grid do."""
        place: Place = ()
        into: Any = self.data
        keys = [key for key in field.split(".") if key]
        while keys:
            known = into if isinstance(into, dict) else {}
            if isinstance(into, list):
                known = dict(zip(map(str, range(len(into))), into, strict=True))
            joined = (".".join(keys[:count]) for count in range(len(keys), 0, -1))
            key = next((key for key in joined if key in known), keys[0])
            place = (*place, int(key) if isinstance(into, list) and key in known else key)
            into, keys = known.get(key), keys[key.count(".") + 1 :]
        return place

    def _replaced(self, place: Place, label: str) -> None:
        kept = {p: o for p, o in self._origin.items() if p[: len(place)] != place}
        self._origin = {**kept, place: (0, label)}

    def _origin_of(self, place: Place) -> tuple[int, str]:
        """Of the value at a place or, where there is none, of what should hold it."""
        if place not in self._origin:
            place = self.place_of(".".join(map(str, place)))
        while place not in self._origin:
            place = place[:-1]
        return self._origin[place]


def _key(into: Any, key: str, place: Place, label: str) -> str | int:
    """A part of a dotted path as what it is to the container it points into."""
    if isinstance(into, dict):
        return key
    outer = ".".join(map(str, place))
    if not isinstance(into, list):
        cure = "set a field of a mapping or an item of a list"
        raise UserError(f"{label}: {outer} is {shown(into)}, so '{key}' cannot be set in it", cure)
    if not key.isdecimal() or len(key) > 9 or int(key) >= len(into):
        cure = f"give the index of an item, counted from 0, or set all of {outer}"
        raise UserError(f"{label}: {outer} is a list of {len(into)} and has no item '{key}'", cure)
    return int(key)


def _shortened(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def _text(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as opened:
            return opened.read(plain_yaml.LONGEST + 1)  # which `parse` refuses
    except FileNotFoundError:
        beside = [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        cure = f"name a spec file; {nearest(file.name, beside)}" if beside else BEGIN
        raise UserError(f"file not found: {file}", cure) from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder", "give the path of the spec file inside it") from None
    except UnicodeDecodeError as fault:
        raise not_utf8(file, fault) from None
    except OSError as fault:
        raise unreadable(file, fault, "the working directory") from None


def _flags_as_numbers(given: Any, taken: Any, place: Place = ()) -> Iterator[Mistake]:
    """Where the spec says true or false and the model, being lenient, took 1 or 0."""
    if isinstance(given, bool) and isinstance(taken, int | float) and not isinstance(taken, bool):
        yield Mistake(
            place, f"must be a number, not {shown(given)}", f"if you mean {taken}, write {taken}"
        )
    elif isinstance(given, dict) and isinstance(taken, dict):
        for key in given.keys() & taken.keys():
            yield from _flags_as_numbers(given[key], taken[key], (*place, key))
    elif isinstance(given, list) and isinstance(taken, list):
        for index, pair in enumerate(zip(given, taken, strict=False)):
            yield from _flags_as_numbers(*pair, (*place, index))
