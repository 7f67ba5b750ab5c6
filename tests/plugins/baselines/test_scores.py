"""Scores of answers: the kit for each, the formulas by hand, limits of programs, both orders."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kdcore.data.responses.score import Answered
from kdcore.errors import UserError
from kdcore.testing import ScoreSuite
from kdcore_baselines.scores.judge import WinRate
from kdcore_baselines.scores.mathematics import Mathematics
from kdcore_baselines.scores.programs import PassAtOne, code_in
from kdcore_baselines.scores.sandbox import Limits, passes
from kdcore_baselines.scores.text import exact_match, final_number, rouge_l
from tests.fixtures.apps.endpoint_app import Endpoint, completion, error, served
from tests.tiny.tiny_chat_models import tiny_model

LIMITS = Limits(seconds=10, memory_mb=512)


class TestRougeL(ScoreSuite):
    name = "rouge_l"


class TestExactMatch(ScoreSuite):
    name = "exact_match"


class TestMath(ScoreSuite):
    name = "math"
    reference = r"Hence $x = 1/2$, so the answer is \boxed{\frac{1}{2}}."
    right = r"We get $x=\boxed{0.5}$"


class TestPassAtOne(ScoreSuite):
    name = "pass_at_1"
    reference = "assert twice(2) == 4"
    right = "def twice(n):\n    return n + n"


class TestWinRate(ScoreSuite):
    """Behind an endpoint that knows the better answer."""

    name = "win_rate"
    wrong = "none"

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def judge(cls) -> Iterator[None]:
        def verdict(text: str) -> Any:
            first, second = (
                "#### 18" in re.split("</?assistant .>", text)[place] for place in (1, 3)
            )
            # a tie of two right answers goes to both places in turn
            return completion(f"Because. [[{'A' if first else 'B' if second else 'C'}]]")

        with served(Endpoint(tiny_model(), instead=verdict)) as running:
            cls.params = {"judge": {"endpoint": running.url, "model": "tiny-chat"}}
            yield

    def test_a_right_answer_is_better_than_a_wrong_one(self) -> None:
        """The right one equals the reference: it wins one order and loses the other."""
        assert self.score([self.right, self.wrong]) == [0.5, 0.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 left.\n#### 7", "7"),
        ("#### $1,234.50", "1234.5"),
        ("#### 18.", "18"),
        ("#### 18.00 dollars, or 20 at most", "18"),
        ("#### 5 was wrong\n#### -6", "-6"),
        ("#### none", None),
        ("The answer is 1,000,000.", "1000000"),
        ("first 12, then 30 apples", "30"),
        ("1,2,3", "3"),
        ("it fell by -$5", "-5"),
        ("10-5", "5"),
        ("a12", "12"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_exact_match_compares_numbers() -> None:
    assert exact_match("so it is $18.00.", "9 * 2 = 18\n#### 18") == 1.0
    assert exact_match("so it is 18, not 19", "#### 18") == 0.0
    assert exact_match("#### 18, not 19", "#### 18") == 1.0
    assert exact_match("eighteen", "#### 18") == 0.0


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    assert rouge_l("The cat sat on the mat", "the CAT sat, on the mat!") == 1.0
    # cat, mat of 3 and of 4 words; "cats" has the stem of "cat"
    precision, recall = 2 / 3, 2 / 4
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l("cats or mat", "one cat one mat") == pytest.approx(expected)
    assert rouge_l("", "anything") == rouge_l("...", "anything") == 0.0


def answered(said: str, reference: str, question: str = "", /, **fields: Any) -> Answered:
    return Answered("row", ({"role": "user", "content": question},), said, reference, fields)


@pytest.mark.parametrize(
    ("reference", "answer", "value"),
    [
        (r"so \boxed{\frac{3}{4}}", "The answer is 0.75.", 1.0),
        (r"so \boxed{\frac{3}{4}}", r"first 0.75, but then $\boxed{\frac{4}{3}}$", 0.0),
        (r"\boxed{x^2+2x+1}", r"It is $(x+1)^2$.", 1.0),
        (r"\boxed{\{1, 2\}}", r"\boxed{\{2, 1\}}", 1.0),
        (r"\boxed{10\%}", "10%", 1.0),
        ("#### 1,234", "1234", 1.0),
    ],
)
def test_formulas_are_compared_by_value(reference: str, answer: str, value: float) -> None:
    assert Mathematics()([answered(answer, reference)]) == [value]


def test_the_final_answer_may_be_a_field_of_its_own() -> None:
    score = Mathematics(reference="answer")
    rows = [answered(said, "by symmetry", answer=r"\frac{1}{2}") for said in ("$0.5$", "$2$")]
    score.check(rows[0])
    assert score(rows) == [1.0, 0.0]
    with pytest.raises(UserError, match="reads the field 'answer', which row lacks"):
        score.check(answered("", "1"))
    with pytest.raises(UserError, match="finds none in the response of row"):
        Mathematics().check(answered("", "by symmetry"))


def test_a_program_passes_at_its_last_line() -> None:
    assert passes("print(1)", LIMITS)
    for wrong in (
        "assert 1 + 1 == 3",
        "this is no program",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "\ud800",
        "",
    ):
        assert passes(wrong, LIMITS) == (wrong == ""), wrong


@pytest.mark.parametrize(
    "program",
    [
        "from os import *",
        "def open(account): return account",
        "import os; os.chdir('/')",
        "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))",
        "import typing\nclass A:\n    next: 'A'\nassert typing.get_type_hints(A) == {'next': A}",
        "import sys; assert len(sys.argv) == 1 and sys.modules['__main__'].__file__ == __file__",
    ],
)
def test_a_program_runs_as_a_file_does(program: str) -> None:
    """What it names as ours does not count, and it is the module ``__main__``."""
    before = sorted(os.listdir("/"))
    assert passes(program, LIMITS)
    assert sorted(os.listdir("/")) == before


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "held = bytearray(10**9)",
        "open('big', 'wb').write(bytes(2**25))",
        "held = [open(f'file{n}', 'w') for n in range(100)]",
        "input()",
    ],
)
def test_a_program_has_limits(program: str) -> None:
    assert not passes(program, Limits(seconds=1, memory_mb=512))


def test_a_program_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is removed, what it starts ends with it, and it does not see the environment."""
    monkeypatch.setenv("KDCORE_SECRET", "secret")
    told = tmp_path / "told"
    program = f"""
import os, subprocess, sys
assert "KDCORE_SECRET" not in os.environ
try:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid
except OSError:  # a user who is not root may not start any
    child = 0
open({str(told)!r}, "w").write(f"{{os.getcwd()}} {{child}}")
"""
    assert passes(program, LIMITS)
    folder, child = told.read_text().split()
    assert not Path(folder).exists() and Path(folder) != Path.cwd()
    if int(child):
        for _ in range(100):
            status = Path(f"/proc/{child}/stat")
            if not status.exists() or status.read_text().split()[2] == "Z":
                break
            time.sleep(0.05)
        else:
            os.kill(int(child), 9)
            raise AssertionError("its process is still running")


def test_programs_of_humaneval_and_mbpp() -> None:
    """An answer may complete the prompt, or be a whole program in a fenced block."""
    prompt = 'def twice(n):\n    """Return 2 n."""\n'
    tests = "def check(candidate):\n    assert candidate(2) == 4\n"
    score = PassAtOne(run_code=True, tests="test", entry_point="entry_point")
    rows = [
        answered(said, "", prompt, test=tests, entry_point="twice")
        for said in (
            "    return 2 * n",
            "    return n",
            "Here:\n```python\ndef twice(n):\n    return n + n\n```\nIt adds.",
            "def twice(n): return n",
        )
    ]
    score.check(rows[0])
    assert [*score(rows)] == [1.0, 0.0, 1.0, 0.0]
    listed = PassAtOne(run_code=True, tests="test_list")
    row = answered("def twice(n): return 2 * n", "", test_list=["assert twice(1) == 2"] * 2)
    listed.check(row)
    assert [*listed([row])] == [1.0]
    assert code_in("```\na\n```\nthen ```py\nb\n```") == "b\n" and code_in("a") == "a"


def test_an_example_of_a_call_behind_a_program_is_not_its_code() -> None:
    said = "So:\n1. Write\n   ```python\n   def twice(n):\n       return n + n\n   ```\n"
    said += "2. Try\n   ```python\n   print(twice(input()))\n   ```\n"
    tests = "def check(candidate):\n    assert candidate(2) == 4\n"
    for row in (
        answered(said, "", "Write it.", test=tests, entry_point="twice"),
        answered(said + "```\ndef other(): pass\n```", "", "", test=tests, entry_point="twice"),
    ):
        score = PassAtOne(run_code=True, tests="test", entry_point="entry_point")
        assert [*score([row])] == [1.0]
    row = answered(said, "assert twice(1) == 2")
    assert [*PassAtOne(run_code=True)([row])] == [1.0]
    assert code_in("```\n    return 2 * n\n```") == "    return 2 * n\n", "completes a prompt"


@pytest.mark.parametrize(
    "code",
    [
        'def f():\n    """Call it so:\n\n    ```python\n    f()\n    ```\n    """\n    return 1\n',
        "def f(text):\n    return text.split('```')[1]\n",
    ],
)
@pytest.mark.parametrize("indent", ["", "   "])
def test_a_fence_in_a_program_does_not_end_its_block(code: str, indent: str) -> None:
    block = "".join(indent + line for line in f"```python\n{code}```\n".splitlines(keepends=True))
    assert code_in(f"So:\n{block}\nIt adds.") == code
    assert code_in(f"```python\n{code.rstrip()}```\nIt adds.") == code.rstrip()


def test_what_is_not_a_test_or_not_consented_to_is_refused() -> None:
    with pytest.raises(UserError, match="run_code"):
        PassAtOne()
    with pytest.raises(UserError, match="set run_code: true if that is safe"):
        PassAtOne(run_code=False)
    with pytest.raises(UserError, match="the response of row is not Python code"):
        PassAtOne(run_code=True).check(answered("", "It returns twice n."))
    with pytest.raises(UserError, match="is not the name of a function"):
        score = PassAtOne(run_code=True, entry_point="entry")
        score.check(answered("", "pass", entry="a b"))


@pytest.mark.parametrize(
    ("say", "value"),
    [
        (lambda text: "[[A]]", 0.5),
        (lambda text: "[[C]]", 0.5),
        (lambda text: "not [[A]], no: [[B]]" if "B>\nmine" in text else "[[A]]", 1.0),
        (lambda text: "[[C]]" if "B>\nmine" in text else "[[A]]", 0.75),
        (lambda text: "hm" if "B>\nmine" in text else "[[B]]", 0.25),
    ],
)
def test_a_judge_is_asked_in_both_orders(say: Any, value: float) -> None:
    with served(Endpoint(tiny_model(), instead=lambda text: completion(say(text)))) as running:
        judge: ClassVar[Any] = {"endpoint": running.url, "model": "tiny-chat"}
        assert [*WinRate(judge=judge)([answered("mine", "yours", "why?")])] == [value]
    asked = [body["messages"][-1]["content"] for body in running.asked]
    assert len(asked) == 2 and all("[user]\nwhy?" in text for text in asked)
    assert {text.index("mine") < text.index("yours") for text in asked} == {True, False}


def test_a_pair_without_a_verdict_is_a_tie() -> None:
    """The response is cut before its end, or thinks of both, or the pair is too long."""
    cut = completion("[[A]] or [[B]]?", "length")
    thought = completion("<think>[[A]]?</think> I cannot say.")
    for said in (cut, thought, error(400, "context_length_exceeded", "context length 9")):
        judges = iter([said, completion("<think>[[A]] or [[B]]</think>\n**[[C]]**")] * 2)
        with served(Endpoint(tiny_model(), instead=lambda text, j=judges: next(j))) as running:
            judge: Any = {"endpoint": running.url, "model": "tiny-chat"}
            assert [*WinRate(judge=judge)([answered("mine", "yours")] * 2)] == [0.5, 0.5]


def test_a_judge_that_limits_its_rate_is_asked_when_it_says() -> None:
    """More often than the client library would."""
    busy = error(429, "rate_limit", "slow down")
    busy.headers["retry-after"] = "0.01"
    answers = iter([busy] * 7)
    instead = lambda text: next(answers, completion("[[C]]"))  # noqa: E731
    with served(Endpoint(tiny_model(), instead=instead)) as running:
        judge: Any = {"endpoint": running.url, "model": "tiny-chat"}
        assert [*WinRate(judge=judge)([answered("mine", "yours")])] == [0.5]
        answers = iter([busy] * 10**6)
        with pytest.raises(UserError, match="received too many requests at once"):
            [*WinRate(judge=judge | {"timeout": 1.0})([answered("mine", "yours")])]


def test_a_judge_without_a_verdict_is_refused() -> None:
    said = iter(["[[A]]", *["hm"] * 3])
    with served(Endpoint(tiny_model(), instead=lambda text: completion(next(said)))) as running:
        judge: Any = {"endpoint": running.url, "model": "tiny-chat"}
        with pytest.raises(UserError, match="gives a verdict in 1 of 4 responses"):
            [*WinRate(judge=judge)([answered("mine", "yours")] * 2)]
