"""A mistake keeps the field of the spec that it is about."""

from __future__ import annotations

import copy

import pytest

from kdcore.errors import UserError, counted, first_line, in_field


@pytest.mark.parametrize(("own", "found"), [("", "data.train"), ("data.train.path", None)])
def test_a_mistake_gets_the_field_that_is_read_unless_it_names_one(
    own: str, found: str | None
) -> None:
    with pytest.raises(UserError) as caught, in_field("data"), in_field("data.train"):
        raise UserError("rows.jsonl is empty", "choose another file", own)
    assert caught.value.field == (found or own)


def test_it_keeps_the_field_on_its_way_out_of_a_process() -> None:
    sent = copy.copy(UserError("cause", "cure", "seed"))  # by what pickling would use
    assert (sent.cause, sent.cure, sent.field) == ("cause", "cure", "seed")


def test_an_exception_without_a_text_is_named() -> None:
    """Libraries raise some, and a message that quotes them must not fail itself."""
    found = [first_line(each) for each in (OSError(), ValueError("\n"), ValueError("a\nb"))]
    assert found == ["OSError", "ValueError", "a"]
    assert first_line(ValueError("long"), 3) == "lon"


def test_a_number_agrees_with_its_noun() -> None:
    assert [counted(n, "step") for n in (0, 1, 1200)] == ["0 steps", "1 step", "1,200 steps"]
    assert [counted(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]
