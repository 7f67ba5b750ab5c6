"""The pairs of hidden states or layers that a matcher compares."""

from __future__ import annotations

from collections.abc import Sequence

from kdcore import UserError


def pairs_of(
    given: Sequence[tuple[int, int]] | None,
    student: int,
    teacher: int,
    matcher: str,
    *,
    first: int = 0,
    what: str = "hidden state",
) -> tuple[tuple[int, int], ...]:
    """The pairs that a spec names, or those at the same relative depth.

    Args:
        given: The pairs in the spec, where a negative number counts from the end; None for each of
            the student's with number m * teacher // student, rounded down, but at least ``first``.
        student: Number of layers of the student.
        teacher: Number of layers of the teacher.
        matcher: Name of the matcher in the message.
        first: The lowest number.
        what: What the message calls one of them.

    Returns:
        The numbers of the student and of the teacher.

    Raises:
        UserError: A model does not have what a pair names.
    """
    if given is None:
        every = range(first, student + 1)
        return tuple((m, max(first, m * teacher // student)) for m in every)

    def number(asked: int, layers: int, whose: str) -> int:
        found = asked + layers + 1 if asked < 0 else asked
        if not first <= found <= layers:
            raise UserError(
                f"matcher '{matcher}' names {what} {asked} of the {whose}, which has {first} to "
                f"{layers}",
                "change method.matchers: pairs",
            )
        return found

    return tuple(
        (number(ours, student, "student"), number(theirs, teacher, "teacher"))
        for ours, theirs in given
    )
