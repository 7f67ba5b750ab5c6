"""YAML that means what it seems to mean, with the line of every value.

A subset of YAML 1.2: no anchors, tags or merges, no duplicate keys. ``1e-4`` is a number, ``no``
is text (which a true-or-false field understands), ``010`` is ten, and every key is text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import yaml

from kdcore.errors import UserError

Place: TypeAlias = tuple[str | int, ...]
"""The keys and indices on the way to a value."""

LONGEST = 2**18
"""Characters of a spec; a reader in Python takes seconds for more."""
_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[str, list[str], Callable[[str], Any]]] = {
    # tag: what matches it, the characters it may begin with, its value
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"], lambda text: text.lower() == "true"),
    "int": (r"[-+]?\d+(_\d+)*", [*"-+0123456789"], int),
    "float": (
        r"[-+]?(\d+(_\d+)*(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
        lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    ),
    "str": (r".*", [], str),
}
_CURES = (
    (r"'\\t'", "indent with spaces, not tabs"),
    (
        r"mapping values are not allowed",
        "quote text that contains ': ', and give keys of one mapping the same indentation",
    ),
    (r"could not find expected ':'", "write `key: value`, with a space after the colon"),
    (r"expected ',' or", "close the bracket, and separate its items with commas"),
    (r"unexpected end of stream", "add the closing quote"),
    (r"expected <block end>", "give the keys of one mapping the same indentation"),
    (r"another document", "a spec has one document: remove the line ---"),
    (r"cannot start any token", "put the text in quotes"),
)


class _Reader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise _refused(event.start_mark, "aliases (*name) are not supported")
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if event.tag is not None:
            raise _refused(event.start_mark, f"the tag {event.tag} is not supported")
        return super().compose_node(parent, index)


class _Writer(yaml.SafeDumper):
    """Quotes what `_Reader` would take for something else, and nothing more."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Reader, _Writer):
    _class.yaml_implicit_resolvers = {}  # those of YAML 1.1
for _name, (_pattern, _first, _) in _SCALARS.items():
    for _class in (_Reader, _Writer):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"({_pattern})\Z"), _first)


def parse(text: str, where: Callable[[int], str]) -> tuple[Any, dict[Place, int]]:
    """Parse a YAML text.

    Args:
        text: YAML text.
        where: Function from a line number to its name in messages.

    Returns:
        The plain data, and the line (from 1) of each value in it.

    Raises:
        UserError: The text is not in the accepted subset of YAML.
    """
    if len(text) > LONGEST:
        raise UserError(
            f"{where(1)}: longer than {LONGEST:,} characters",
            "name a spec file; data belongs in files of its own",
        )
    lines: dict[Place, int] = {}
    try:
        reader = _Reader(text)
        node = reader.get_single_node()
        return (None if node is None else _plain(node, (), lines)), lines
    except yaml.MarkedYAMLError as fault:
        mark, what = fault.problem_mark or fault.context_mark, fault.problem or "invalid YAML"
        cures = [cure for pattern, cure in _CURES if re.search(pattern, what)]
        line = mark.line + 1 if mark else 1
        cure = (
            fault.note
            or (cures or ["check the indentation, quotes and brackets near this line"])[0]
        )
        raise UserError(f"{where(line)}: {what}", cure) from None
    except (OverflowError, ValueError):  # of an escape such as \U0011FFFF
        what = "an escape (\\U) is not the number of a character"
        raise UserError(f"{where(reader.line + 1)}: {what}", "write the character itself") from None
    except RecursionError:
        cure = "use fewer nested brackets"
        raise UserError(f"{where(1)}: nested too deeply", cure) from None
    except yaml.reader.ReaderError as fault:
        what = f"the character {chr(fault.character)!r} is not allowed in YAML"
        line = text.count("\n", 0, fault.position) + 1
        raise UserError(f"{where(line)}: {what}", "save the file as plain UTF-8 text") from None


def dump(data: Any) -> str:
    """Plain data as a YAML text that `parse` reads back as it was."""
    return yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True)


def _plain(node: yaml.Node, place: Place, lines: dict[Place, int]) -> Any:
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*place, index), lines) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        plain: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused(key.start_mark, "a key must be a single word")
            name = _text(key)
            if name in plain:
                first = lines[(*place, name)]
                raise _refused(
                    key.start_mark,
                    f"duplicate key '{name}', first used in line {first}",
                    "remove one of them",
                )
            lines[(*place, name)] = key.start_mark.line + 1
            plain[name] = _plain(item, (*place, name), lines)
        return plain
    try:
        return _SCALARS[node.tag.removeprefix(_TAG)][2](_text(node))
    except ValueError:
        what = f"a number of {len(node.value)} digits is not supported"
        raise _refused(node.start_mark, what, "write a shorter number") from None


def _text(node: yaml.Node) -> str:
    """What a scalar says; escapes can make characters of it that no file and no name can have.

    JSON's escapes, two of them for a character beyond the first 65,536, are read as JSON is.
    """
    whole: str = node.value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if wrong := re.search("[\0\ud800-\udfff]", whole):
        what = f"the character {wrong[0]!r} is not valid text"
        raise _refused(node.start_mark, what, "write the file in UTF-8, without that character")
    return whole


def _refused(mark: Any, what: str, cure: str = "write the value itself") -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark, note=cure)
