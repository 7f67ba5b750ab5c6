"""What counts as the final number, ROUGE-L by hand, and which examples cannot be judged."""

from __future__ import annotations

from decimal import Decimal

import pytest

from kdcore.data.conversation import Conversation, Message
from kdcore.errors import UserError
from kdcore.evaluation.answers import answers, judged, references
from kdcore.evaluation.scores import exact_match, final_number, rouge_l
from kdcore.runs.progress import Silent
from kdcore.specs.training import EvaluationSpec
from tests.tiny.tiny_chat_models import tiny_model


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


def conversation(*turns: str, id: str = "row") -> Conversation:
    roles = ["user", "assistant"] * len(turns)
    return Conversation(id, tuple(map(Message, roles, turns)))


def test_answers_do_not_depend_on_their_batch_and_come_in_order() -> None:
    model = tiny_model()
    asked = [conversation("the mat" * n, "right", id=str(n)) for n in (3, 1, 9, 2)]

    def said(size: int) -> list[str]:
        return answers(asked, model, Silent(), "any", batch_size=size, max_new_tokens=6)

    alone = [
        answers([one], model, Silent(), "any", batch_size=1, max_new_tokens=6)[0] for one in asked
    ]
    assert said(1) == said(3) == alone
    assert any(alone)


def test_a_prompt_without_room_is_answered_with_nothing_and_told() -> None:
    class Heard(Silent):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def note(self, line: str) -> None:
            self.lines.append(line)

    heard = Heard()
    asked = [conversation("x" * 600, "right"), conversation("the mat", "right")]
    found = answers(asked, tiny_model("gpt2"), heard, "any", batch_size=2, max_new_tokens=6)
    assert found[0] == "" and len(found) == 2
    assert heard.lines == [
        "1 of 2 prompts get an empty answer: with 6 new tokens they exceed the context of tiny-gpt2"
    ]


def test_scores_are_of_each_example() -> None:
    model = tiny_model()
    spec = EvaluationSpec(answers=["rouge_l", "exact_match"], answer_tokens=6, batch_size=2)
    asked = [conversation("the mat", "#### 1"), conversation("the teacher sat", "no 2")]
    said = answers(asked, model, Silent(), "any", batch_size=2, max_new_tokens=6)
    assert judged(asked, model, spec, Silent()) == {
        "rouge_l": [rouge_l(said[0], "#### 1"), rouge_l(said[1], "no 2")],
        "exact_match": [exact_match(said[0], "#### 1"), exact_match(said[1], "no 2")],
    }
    assert judged(asked, model, EvaluationSpec(), Silent()) == {}


def test_what_cannot_be_judged_is_refused() -> None:
    both = EvaluationSpec(answers=["rouge_l", "exact_match"])
    with pytest.raises(UserError, match="needs a reference answer, and row lacks a response"):
        references([conversation("a", "1", "b")], both)
    with pytest.raises(UserError, match="the response of row does not contain a number"):
        references([conversation("a", "one")], both)
    assert references([conversation("a", "one")], EvaluationSpec(answers=["rouge_l"])) == ["one"]
