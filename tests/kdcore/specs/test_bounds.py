"""Every number of every spec has bounds, and no spec, however wild, is more than refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from kdcore.components.registry import installed
from kdcore.errors import UserError
from kdcore.specs.json_schema import json_schema
from kdcore.specs.reading.file import parse_spec, read_spec

REGISTRY = installed()
JOBS = [job for job, _ in REGISTRY.jobs() if job.spec.__module__.startswith("kdcore.")]
SCHEMAS = {job.name: json_schema(job.spec, REGISTRY) for job in JOBS}


def numbers(node: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The numeric schemas inside a schema."""
    if isinstance(node, list):
        for index, each in enumerate(node):
            yield from numbers(each, f"{place}.{index}")
    elif isinstance(node, dict):
        listed = {"const", "enum"} & node.keys()  # these values and no others
        if node.get("type") in ("integer", "number") and not listed:
            yield place, node
        for key, each in node.items():
            if key not in ("default", "examples"):
                yield from numbers(each, f"{place}.{key}")


@pytest.mark.parametrize("job", SCHEMAS)
def test_every_number_has_a_least_and_a_largest_value(job: str) -> None:
    found = dict(numbers(SCHEMAS[job]))
    assert len(found) > 5
    for place, schema in found.items():
        assert {"minimum", "exclusiveMinimum"} & schema.keys(), f"{place} has no least value"
        assert {"maximum", "exclusiveMaximum"} & schema.keys(), f"{place} has no largest value"


def fields_of(annotation: Any, seen: set[Any]) -> Iterator[tuple[str, Any]]:
    """All fields of the models that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation in seen:
            return
        seen.add(annotation)
        for name, field in annotation.model_fields.items():
            yield f"{annotation.__name__}.{name}", field
            yield from fields_of(field.annotation, seen)
    for inside in get_args(annotation):
        yield from fields_of(inside, seen)


def test_a_narrower_bound_is_not_overridden_by_that_of_its_type() -> None:
    """Of two bounds of one kind pydantic applies the last: that of ``Count = Field(le=3)``."""
    models = [job.spec for job in JOBS] + [c.params for c, _ in REGISTRY.components() if c.params]
    seen: set[Any] = set()
    bounded = 0
    for place, field in (each for model in models for each in fields_of(model, seen)):
        for kind, narrow in (("gt", max), ("ge", max), ("lt", min), ("le", min)):
            bounds = [getattr(m, kind) for m in field.metadata if hasattr(m, kind)]
            bounded += bool(bounds)
            assert not bounds or bounds[-1] == narrow(bounds), f"{place}: {kind} {bounds}"
    assert bounded > 50


@pytest.mark.parametrize(
    "assignment",
    [
        "student.lora.r=9000000000000000000",
        "data.train.limit=18446744073709551616",
        f"evaluation.batch_size={10**60}",
        "training.learning_rate=1e300",
        "method.tau=1e300",
        "method.terms.kd=-1e300",
        "training.epochs=.inf",
        f"training.steps={'9' * 5000}",
        "training.steps=" + "9" * 300_000,
        "student.layers=[1000000000000]",
        ".".join(["a"] * 3000) + "=1",
        "training." + "9" * 5000 + "=1",
        f"method.gates.{'9' * 5000}.k=1",
    ],
    ids=lambda assignment: assignment[:40],
)
def test_a_number_or_path_beyond_all_bounds_is_refused(assignment: str) -> None:
    text = json.dumps(EXAMPLES["distill"])
    with pytest.raises(UserError) as refused:
        parse_spec(text, "the spec", Path(), [assignment], registry=REGISTRY)
    assert len(refused.value.cause) < 1000


def test_of_many_mistakes_the_first_ones_are_told(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text("job: distill\n" + "".join(f"k{n}: 1\n" for n in range(3000)))
    with pytest.raises(UserError, match=r"(?m)more mistakes$") as wrong:
        read_spec(spec)
    cause = str(wrong.value.cause).splitlines()
    assert len(cause) == 25 and cause[0].endswith("spec.yaml:1: data: missing field")
    assert len(wrong.value.cure.splitlines()) == 24


def test_a_file_of_megabytes_is_no_spec(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("job: distill\n" + "# data\n" * 1_000_000)
    with pytest.raises(UserError, match="longer than"):
        read_spec(tmp_path / "spec.yaml")
    with pytest.raises(UserError, match="longer than"):
        read_spec(Path("/dev/zero"))


EXAMPLES: dict[str, Any] = {
    "distill": {
        "job": "distill", "teacher": {"model": "a/b"},
        "student": {"layers": [0], "lora": {"r": 4}},
        "data": {"train": {"name": "chat", "path": "a.jsonl", "limit": 3},
                 "responses": {"by": "teacher", "seed": 1}, "on_policy": {"top_k": 5}},
        "method": {"gates": [{"name": "speckd", "k": 3}], "splitters": [{"name": "dkd"}],
                   "momentum": {"name": "deepkd", "d": 0.05}, "tau": [[0, 1], [1, 2]],
                   "terms": {"task": 0.5}},
        "training": {"steps": 3, "betas": [0.9, 0.99]}, "evaluation": {"samples": 1},
    },
    "train-drafter": {
        "job": "train-drafter", "target": {"model": "a/b"},
        "drafter": {"name": "fasteagle", "depth": 3, "vocabulary": 9},
        "data": {"train": {"name": "chat", "path": "a.jsonl"}, "hidden_states": {"limit_gb": 1}},
        "method": {"gates": [{"name": "discount", "gamma": 0.5}]},
    },
    "bench": {
        "job": "bench", "target": {"model": "a/b"}, "temperatures": [0, 0.5], "batch_sizes": [1],
        "methods": {"a": {"drafter": {"name": "ngram", "longest": 3}}},
        "sets": {"s": {"name": "chat", "path": "a.jsonl"}},
    },
    "compare": {
        "job": "compare", "seeds": [0, 1], "draws": 10, "trials": 1,
        "validation": {"name": "chat", "path": "c.jsonl"},
        "base": {"teacher": {"model": "a/b"}, "student": {"layers": [0]},
                 "data": {"train": {"name": "chat", "path": "a.jsonl"},
                          "heldout": {"name": "chat", "path": "b.jsonl"}}},
        "arms": {"a": {"method": {"tau": 2}}, "b": {}},
        "grid": {"training.learning_rate": [1e-3, 1e-4]},
    },
    "evaluate": {
        "job": "evaluate", "model": {"model": "a/b"}, "max_length": 9,
        "heldout": {"name": "labelled_text", "path": "a.csv", "part": [0, 0.5]},
    },
    "generate-data": {
        "job": "generate-data", "source": {"name": "chat", "path": "a.jsonl"},
        "teacher": {"endpoint": "http://localhost:1/v1", "model": "m", "timeout": 5},
        "responses": {"max_new_tokens": 5, "temperature": 0.5},
    },
}  # fmt: skip
NUMBER = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31 - 1, 2**31, 2**63, 10**60, 1e9, 1e308, 5e-324, -0.0]),
)
VALUE = st.recursive(
    st.one_of(NUMBER, st.none(), st.booleans(), st.text(max_size=8), st.just({"name": "speckd"})),
    lambda inside: (
        st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=6), inside, max_size=3)
    ),
    max_leaves=5,
)


def places(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, each in items:
        yield (*place, key)
        if isinstance(each, dict | list):
            yield from places(each, (*place, key))


def put(node: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copied = dict(node) if isinstance(node, dict) else list(node)
    copied[place[0]] = put(node[place[0]], place[1:], value)
    return copied


@pytest.mark.parametrize("job", EXAMPLES)
@given(data=st.data())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_spec_with_any_value_anywhere_is_read_or_refused(job: str, data: Any) -> None:
    spec = EXAMPLES[job]
    for _ in range(data.draw(st.integers(1, 2))):
        spec = put(spec, data.draw(st.sampled_from(list(places(spec)))), data.draw(VALUE))
        if not isinstance(spec, dict) or not list(places(spec)):
            break
    text = json.dumps(spec).replace("NaN", ".nan").replace("Infinity", ".inf")
    try:
        read = parse_spec(text, "the spec", Path(), registry=REGISTRY)
    except UserError as refused:
        assert refused.cause and refused.cure
        return
    for place, number in values(read.model_dump(mode="json")):
        assert math.isfinite(number) and abs(number) < 2**32, place


def values(node: Any, place: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, each in items:
            if key not in ("config", "trainer", "arms", "grid"):  # of transformers; of a job
                yield from values(each, f"{place}.{key}")
    elif isinstance(node, int | float):
        yield place, node


@pytest.mark.parametrize("job", EXAMPLES)
def test_the_examples_are_valid_and_each_job_has_one(job: str) -> None:
    parse_spec(json.dumps(EXAMPLES[job]), "the spec", Path(), registry=REGISTRY)
    assert EXAMPLES.keys() == SCHEMAS.keys()
