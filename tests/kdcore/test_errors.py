"""A mistake keeps the field of the spec that it is about."""

from __future__ import annotations

import copy

import pytest

from kdcore.errors import UserError, in_field


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
