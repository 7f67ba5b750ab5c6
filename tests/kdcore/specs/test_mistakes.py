"""Whatever a spec says wrong is told in our words, with what to write: never in the validator's."""

from __future__ import annotations

import ast
import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from kdcore.components.component import Kind
from kdcore.components.registry import installed
from kdcore.errors import UserError
from kdcore.specs.jobs import JOBS
from kdcore.specs.parts.decoding import DraftingSpec
from kdcore.specs.reading.file import parse_spec
from kdcore.specs.reading.mistakes import _is_model, _members, mistakes
from tests.fixtures.pages import ROOT

REGISTRY = installed()
ROWS = {"name": "chat", "path": "rows.jsonl"}
BOTH = {"train": ROWS, "heldout": ROWS}
SPECS: dict[str, dict[str, Any]] = {
    "distill": {"teacher": {"model": "some/teacher"}, "student": {"layers": [0]}, "data": BOTH},
    "compare": {
        "base": {"teacher": {"model": "a"}, "student": {"layers": [0]}, "data": BOTH},
        "arms": {"a": {}},
    },
    "train-drafter": {"target": {"model": "a"}, "drafter": "fasteagle", "data": {"train": ROWS}},
    "bench": {"target": {"model": "a"}, "methods": {"m": {}}, "sets": {"a": ROWS}},
    "evaluate": {"model": {"model": "a"}, "heldout": ROWS},
    "generate-data": {"teacher": {"endpoint": "http://a/v1", "model": "a"}, "source": ROWS},
}
WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 1.5, 1e308, 10**30, float("inf"), float("nan")),
    *("", "x", "x\0y", "\ud800", "9" * 5000),
    *([], [3], ["x"], [None], [[]], [0.5] * 3, [[0, 1, 2]]),
    *({}, {"x": 1}, {"": {}}, {"An Arm": {}}, {"name": 3}, {"name": "x"}),
)
THEIRS = re.compile(
    r"pydantic|Spec\b|Params|Input|should|[Vv]alid\b(?! name\b)|after validation|Unable|raw data|"
    r"pattern|None|True|False|Value error|https://errors"
)
"""What only the validator, or Python, would say."""

SLOTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "gate": ("distill", ("method", "gates")),
    "splitter": ("distill", ("method", "splitters")),
    "divergence": ("distill", ("method", "divergence")),
    "advantage": ("distill", ("method", "advantage")),
    "matcher": ("distill", ("method", "matchers")),
    "momentum": ("distill", ("method", "momentum")),
    "source": ("distill", ("data", "train")),
    "drafter": ("train-drafter", ("drafter",)),
    "tree": ("bench", ("methods", "m", "tree")),
    "verifier": ("bench", ("methods", "m", "verifier")),
    "engine": ("bench", ("methods", "m", "engine")),
    "baseline": ("bench", ("baselines", "other")),
    "score": ("distill", ("evaluation", "answers")),
}
"""Where a component of each kind may be named."""


def with_value(job: str, path: tuple[str, ...], value: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {"job": job} | copy.deepcopy(SPECS[job])
    into = spec
    for key in path[:-1]:
        if not isinstance(into.get(key), dict):
            into[key] = {}
        into = into[key]
    into[path[-1]] = value
    return spec


def fields_of(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field, and of those inside it."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        for member in filter(_is_model, _members(field.annotation)):
            yield from fields_of(member, (*above, name))


def assert_told_in_our_words(job: str, spec: dict[str, Any]) -> int:
    """How many mistakes it has."""
    context = {"base": Path.cwd(), "registry": REGISTRY}
    try:
        JOBS[job].spec.model_validate(spec, context=context)
    except ValidationError as wrong:
        found = mistakes(wrong, JOBS[job].spec)
        for each in found:
            theirs = THEIRS.search(f"{each.what} {each.cure}")
            assert not theirs, f"{each.dotted}: {each.what} / {each.cure}"
            assert each.what and each.cure.strip(": "), each
        return len(found)
    return 0


@pytest.mark.parametrize("job", JOBS)
def test_no_field_is_answered_for_in_the_validators_words(job: str) -> None:
    assert not assert_told_in_our_words(job, {"job": job} | SPECS[job])
    paths = list(dict.fromkeys(fields_of(JOBS[job].spec)))
    told = [
        assert_told_in_our_words(job, with_value(job, path, value))
        for path in paths
        for value in WRONG
    ]
    assert sum(map(bool, told)) > 5 * len(paths)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_no_parameter_is_answered_for_in_the_validators_words(kind: str) -> None:
    job, slot = SLOTS[kind]
    told = 0
    for name in REGISTRY.names(kind):
        for path in fields_of(REGISTRY.component(kind, name).params):  # type: ignore[arg-type]
            for value in WRONG:
                inside: Any = value
                for key in reversed(path):
                    inside = {key: inside}
                given = {"name": name} | inside
                in_list = slot[-1] in ("gates", "splitters", "matchers", "answers")
                listed = [given] if in_list else given
                told += assert_told_in_our_words(job, with_value(job, slot, listed))
    assert told


@pytest.mark.parametrize(
    ("job", "path", "value", "what", "cure"),
    [
        ("bench", "sets", {}, "must have at least 1 item, not 0", "change it; sets: task set name"),
        (
            "distill",
            "training.betas",
            [0.5] * 3,
            "must have at most 2 items, not 3",
            "change it; betas: ",
        ),
        (
            "generate-data",
            "teacher.model",
            "",
            "must have at least 1 character, not 0",
            "change it; model: ",
        ),
        (
            "distill",
            "seed",
            1e308,
            "must be an integer, not 1e+308",
            "change it; seed: seed for the data order",
        ),
        (
            "distill",
            "teacher.dtype",
            "\ud800",
            "must be a string, not ",
            "change it; dtype: dtype of",
        ),
        (
            "distill",
            "teacher.model",
            True,
            "must be a string, not true",
            'put it in quotes: "true"',
        ),
        ("distill", "student.layers", True, "must be a list, not true", "write [true]"),
        (
            "train-drafter",
            "data.teacher_cache",
            "here",
            "unknown key",
            "use one of: heldout, hidden_",
        ),
        ("bench", "methods", {"My Drafter": {}}, "invalid name", "use lowercase letters"),
        ("compare", "arms", {"../x": {}}, "invalid name", "use lowercase letters"),
        ("compare", "arms", {}, "arms is empty", "write arms: {NAME: "),
        ("compare", "baseline", "b", "baseline 'b' does not name an arm", "use one of: a"),
        ("compare", "seeds", [1, 1], "seeds contains the same seed twice", "remove one of them"),
    ],
)
def test_a_mistake_says_what_to_write(
    job: str, path: str, value: Any, what: str, cure: str
) -> None:
    with pytest.raises(ValidationError) as wrong:
        JOBS[job].spec.model_validate(with_value(job, tuple(path.split(".")), value))
    (found,) = mistakes(wrong.value, JOBS[job].spec)
    assert found.what.startswith(what) and found.cure.startswith(cure)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('run: "a\\0b"', "spec.yaml:2: the character '\\x00' is not valid text"),
        ('teacher: {model: "a\\uD800"}', "spec.yaml:2: the character '\\ud800' is not valid text"),
        ('"a\\0b": 1', "spec.yaml:2: the character '\\x00' is not valid text"),
        ("seed: " + "9" * 5000, "spec.yaml:2: a number of 5000 digits is not supported"),
        ("seed: !!bool zork", "spec.yaml:2: the tag tag:yaml.org,2002:bool is not supported"),
        (r'seed: "\U0011FFFF"', r"spec.yaml:2: an escape (\U) is not the number of a character"),
        (r'seed: "\UFFFFFFFF"', r"spec.yaml:2: an escape (\U) is not the number of a character"),
    ],
)
def test_what_no_name_and_no_file_can_have_is_refused_where_it_stands(
    line: str, cause: str
) -> None:
    for text, sets in ((f"job: distill\n{line}\n", []), ("job: distill\n", [f"x={{{line}}}"])):
        with pytest.raises(UserError) as wrong:
            parse_spec(text, "spec.yaml", Path.cwd(), sets, registry=REGISTRY)
        said = cause.removeprefix("spec.yaml:2: ")
        assert wrong.value.cause == cause if not sets else wrong.value.cause.endswith(said)
        assert wrong.value.cure.startswith("write ")


def test_a_drafter_whose_name_is_no_text_is_told_too() -> None:
    with pytest.raises(ValidationError) as wrong:
        DraftingSpec.model_validate({"drafter": "\ud800"}, context={"registry": REGISTRY})
    (found,) = mistakes(wrong.value, DraftingSpec)
    assert found.what == "unknown drafter '\\ud800'"


CURES = {"choose", "export", "generate", "give", "merge", "name", "raise", "reduce", "remove"} | {
    *("replace", "save", "set", "use", "write")
}


def test_the_first_colon_of_a_validators_message_begins_its_cure() -> None:
    """What stands before it is the cause: no field with its value, as ``by: teacher``."""
    for path in (ROOT / "kdcore/specs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            if ast.unparse(node.exc.func) == "ValueError" and node.exc.args:
                text = re.sub(r"{[^}]*}", "", ast.unparse(node.exc.args[0]).strip("f'\""))
                cure = text.partition(": ")[2].partition(" ")[0]
                assert cure in {"", *CURES}, f"{path.name}:{node.lineno}: {text}"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"data": BOTH | {"responses": {"by": "teacher"}}},
            "data.responses.by=teacher needs a teacher on this machine, but teacher names a server",
        ),
        (
            {"data": BOTH | {"on_policy": {"policy": "mixed"}}},
            "data.on_policy.policy=mixed needs a teacher on this machine, but",
        ),
    ],
)
def test_the_value_of_a_field_belongs_to_the_cause(changes: dict[str, Any], told: str) -> None:
    served = {"teacher": {"endpoint": "http://a/v1", "model": "a"}, "student": {"model": "b"}}
    with pytest.raises(UserError) as caught:
        parse_spec(json.dumps({"job": "distill"} | served | {"data": BOTH} | changes), "s", Path())
    assert told in caught.value.cause and caught.value.cure.startswith("set teacher.model")
