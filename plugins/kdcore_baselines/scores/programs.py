"""Score of programs: whether the code in an answer passes the tests of its row."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from kdcore import Answered, BuildContext, UserError, by_keywords
from kdcore_baselines.scores.components import PassParams
from kdcore_baselines.scores.mathematics import kept_field
from kdcore_baselines.scores.sandbox import Limits, passes

_BLOCK = re.compile(
    r"([ \t]*)```[^\n]*\n(.*?)(?:^(?:\1)? {0,3}```|(?<=\S)```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)
"""A closing fence is indented as its block is, or ends a line of code: deeper ones are text of the
program, e.g. in the documentation of a function."""


class PassAtOne:
    """pass@1 of greedy answers: 1 if the program and its tests run without an error."""

    title, format = "pass@1 of the answers", ".1%"

    @by_keywords(PassParams)
    def __init__(self, params: PassParams, context: BuildContext) -> None:
        self._tests, self._entry_point = params.tests, params.entry_point
        self._limits = Limits(params.seconds, params.memory_mb)
        if not _runs(self._limits):
            raise UserError(
                "pass_at_1 cannot run even an empty program within its limits on this machine",
                "raise seconds or memory_mb; the limits need Linux",
            )

    def check(self, example: Answered) -> None:
        """Refuse an example without tests in Python."""
        tests = self._code_of_tests(example)
        try:
            compile(tests, example.id, "exec")
        except (SyntaxError, ValueError) as fault:
            where = self._tests or "response"
            raise UserError(
                f"pass_at_1 runs tests, and the {where} of {example.id} is not Python code: "
                f"{fault}",
                "name the field with the tests (keep of the source, tests of pass_at_1), or remove "
                "pass_at_1 from evaluation.answers",
            ) from fault

    def __call__(self, answers: Sequence[Answered]) -> Iterator[float]:
        return (float(passes(self._program(each), self._limits)) for each in answers)

    def _program(self, answered: Answered) -> str:
        name = self._name(answered)
        code = code_in(answered.answer, name)
        if name is not None and not _defines(code, name):
            # the answer continues the prompt, whose function it completes
            code = f"{code_in(answered.question)}\n{code}"
        return f"{code}\n\n{self._code_of_tests(answered)}\n"

    def _code_of_tests(self, example: Answered) -> str:
        tests: Any = example.reference
        if self._tests is not None:
            tests = kept_field(example, self._tests, "pass_at_1")
        code = "\n".join(map(str, tests)) if isinstance(tests, list) else code_in(str(tests))
        name = self._name(example)
        return code if name is None else f"{code}\n\ncheck({name})"

    def _name(self, example: Answered) -> str | None:
        if self._entry_point is None:
            return None
        name = str(kept_field(example, self._entry_point, "pass_at_1"))
        if not name.isidentifier():
            raise UserError(
                f"pass_at_1: the field '{self._entry_point}' of {example.id} is not the name of a "
                "function",
                "name the field with the function's name",
            )
        return name


@functools.cache
def _runs(limits: Limits) -> bool:
    return passes("assert 1 + 1 == 2", limits)


def code_in(text: str, name: str | None = None) -> str:
    """Return the code of a text.

    An answer often ends with an example of a call, in a block of its own. So the code is the last
    fenced block with a definition, else the last block, else the whole text.

    Args:
        text: The text.
        name: Function or class that the code defines (default: any).

    Returns:
        The code, without the indentation of its fence.
    """
    blocks = [_outdented(code, indent) for indent, code in _BLOCK.findall(text)]
    return ([code for code in blocks if _defines(code, name)] or blocks or [text])[-1]


def _defines(code: str, name: str | None) -> bool:
    wanted = r"\w+" if name is None else re.escape(name)
    return re.search(rf"^(async +)?(def|class) +{wanted}\b", code, re.MULTILINE) is not None


def _outdented(code: str, indent: str) -> str:
    """Code of a fenced block in an item of a list."""
    return re.sub(rf"^{re.escape(indent)}", "", code, flags=re.MULTILINE)
