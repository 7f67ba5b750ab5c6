"""Plain YAML: scalars, lines, and that what is dumped is parsed back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore.specs.reading import plain_yaml

text = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]) | st.just("\n"))
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner) | st.dictionaries(text, inner),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None)
@given(plain)
def test_what_is_dumped_is_parsed_back(data: object) -> None:
    again, _ = plain_yaml.parse(plain_yaml.dump(data), str)
    assert again == data
    assert json.dumps(again) == json.dumps(data)  # 1 is not 1.0, nor true


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        ("010", 10),
        ("1_000", 1000),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("0x1f", "0x1f"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("on", "on"),
        ("True", True),
        ("~", None),
        ("", None),
        ("1e", "1e"),
        ("1_", "1_"),
        ("+", "+"),
        ("null", None),
        (r'"\ud83d\ude00"', "😀"),  # as JSON writes it
    ],
)
def test_scalars_are_what_they_seem(text: str, value: object) -> None:
    parsed, _ = plain_yaml.parse(f"key: {text}", str)
    assert parsed == {"key": value}
    assert type(parsed["key"]) is type(value)


def test_lines_are_those_of_keys_and_items() -> None:
    _, lines = plain_yaml.parse("a:\n  b: 1\n  c:\n    - 1\n    - d: 2\n", str)
    assert lines == {
        (): 1,
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 3,
        ("a", "c", 0): 4,
        ("a", "c", 1): 5,
        ("a", "c", 1, "d"): 5,
    }
