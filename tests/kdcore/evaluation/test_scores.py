"""Answers of a model, their scores, and which examples cannot be scored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from kdcore.components.construction import ChoiceBuilder
from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.score import Answered
from kdcore.errors import UserError
from kdcore.evaluation.answers import answers, judged
from kdcore.evaluation.scores import Scores
from kdcore.runs.progress import Silent
from kdcore.specs.parts.training import EvaluationSpec
from kdcore_baselines.scores.text import exact_match, rouge_l
from tests.tiny.tiny_chat_models import tiny_model


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


def test_the_indentation_of_an_answer_is_kept() -> None:
    """A program that continues its prompt is indented from its first line on."""
    model = tiny_model()
    said = {"\n    x = 1\n    return x\n": "    x = 1\n    return x", " \n\n a ": " a", "\n": ""}
    decoded = iter(said)
    model.tokenizer.decode = lambda *_, **__: next(decoded)
    asked = [conversation("the mat", "right", id=str(n)) for n in range(3)]
    found = answers(asked, model, Silent(), "any", batch_size=3, max_new_tokens=1)
    assert found == list(said.values())


def test_a_prompt_without_room_is_answered_with_nothing_and_told() -> None:
    heard = Watched()
    asked = [conversation("x" * 600, "right"), conversation("the mat", "right")]
    found = answers(asked, tiny_model("gpt2"), heard, "any", batch_size=2, max_new_tokens=6)
    assert found[0] == "" and len(found) == 2
    assert heard.lines == [
        "1 of 2 prompts get an empty answer: with 6 new tokens they exceed the context of tiny-gpt2"
    ]


def scores(asked: list[Conversation], *names: str) -> Scores:
    spec = EvaluationSpec(answers=list(names))
    return Scores.build(spec.answers, ChoiceBuilder().build, asked)


def test_scores_are_of_each_example() -> None:
    model = tiny_model()
    spec = EvaluationSpec(answer_tokens=6, batch_size=2)
    asked = [conversation("the mat", "#### 1"), conversation("the teacher sat", "no 2")]
    said = answers(asked, model, Silent(), "any", batch_size=2, max_new_tokens=6)
    assert judged(scores(asked, "rouge_l", "exact_match"), model, spec, Silent()) == {
        "rouge_l": [rouge_l(said[0], "#### 1"), rouge_l(said[1], "no 2")],
        "exact_match": [exact_match(said[0], "#### 1"), exact_match(said[1], "no 2")],
    }
    assert judged(scores(asked), model, spec, Silent()) == {}


class Watched(Silent):
    """Keeps the notes, and the stages with their steps."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stages: dict[str, int] = {}

    def note(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Any]:
        self.stages[name] = 0

        def advance(steps: int = 1, **_: float) -> None:
            self.stages[name] += steps

        yield SimpleNamespace(advance=advance)


def test_scores_read_what_follows_a_thought(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that ends within its thought is empty, and references have no thought either."""
    model = tiny_model()
    said = ["<think>18</think>\n\n#### 17", "<think>#### 17", "#### 17"]
    ids = [model.tokenizer(text)["input_ids"] for text in said]
    monkeypatch.setattr("kdcore.evaluation.answers.generate", lambda *_, **__: ids)
    asked = [
        conversation("the mat", "<think>16</think>#### 17", id=str(n)) for n in range(len(said))
    ]
    spec = EvaluationSpec(answer_tokens=6, batch_size=3)
    watched = Watched()
    found = judged(scores(asked, "exact_match", "rouge_l"), model, spec, watched)
    assert found["exact_match"] == [1.0, 0.0, 1.0] == found["rouge_l"]
    assert watched.lines == [
        "2 of 3 answers have a thought, and the scores read what follows it; 1 end within it and "
        "count as empty"
    ]
    assert answers(asked, model, Silent(), "any", batch_size=3, max_new_tokens=6) == said


def test_references_are_read_as_answers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the marks of the template, without the blank lines around what is left."""
    opens = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
    )
    model = tiny_model(template=opens)
    end = model.tokenizer.eos_token_id
    said = ["16\n</think>\n\n17", "17", "17"]
    ids = [model.tokenizer(text)["input_ids"] for text in said]
    ids[0].append(end)
    ids[1].append(end)  # ended by itself; the third one is cut within its thought
    monkeypatch.setattr("kdcore.evaluation.answers.generate", lambda *_, **__: ids)
    contents = ["16\n</think>\n\n17", "</think>\n\n17\n", "\n17"]
    asked = [conversation("a", each, id=str(n)) for n, each in enumerate(contents)]

    class Reads:
        def check(self, example: Answered) -> None: ...

        def __call__(self, answered: list[Answered]) -> list[float]:
            assert {each.reference for each in answered} == {"17"}
            return [float(each.answer == each.reference) for each in answered]

    watched, spec = Watched(), EvaluationSpec(answer_tokens=6, batch_size=3)
    found = Scores({"reads": Reads()}, asked).read_by(model.tokenizer)
    assert judged(found, model, spec, watched) == {"reads": [1.0, 1.0, 0.0]}
    assert "2 of 3 answers have a thought" in watched.lines[0]
    assert "1 end within it" in watched.lines[0]


def test_a_reference_that_is_a_thought_by_the_template_is_refused() -> None:
    opens = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}" + (
        "{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    asked = scores([conversation("a", "17</think>")], "rouge_l")
    with pytest.raises(UserError, match="the last response of row has none") as raised:
        asked.read_by(tiny_model(template=opens).tokenizer)
    assert raised.value.field == "evaluation.answers"
    asked = scores([conversation("a", "#### 17 </think> it is")], "exact_match")
    with pytest.raises(UserError, match="the response of row does not contain a number"):
        asked.read_by(tiny_model(template=opens).tokenizer)


def test_a_slow_score_shows_its_progress() -> None:
    class Slow:
        def check(self, example: Answered) -> None: ...

        def __call__(self, answered: list[Answered]) -> Iterator[float]:
            return (1.0 for _ in answered)

    watched = Watched()
    asked = [conversation("a", "one")] * 2
    assert Scores({"slow": Slow()}, asked)(["b", "c"], watched) == {"slow": [1.0, 1.0]}
    assert watched.stages == {"slow of the answers": 2}


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(UserError, match="the last response of row has none"):
        scores([conversation("a", "<think>one")], "rouge_l")
    with pytest.raises(UserError, match="needs a reference answer, and row lacks a response"):
        scores([conversation("a", "1", "b")], "rouge_l", "exact_match")
    with pytest.raises(UserError, match="the response of row does not contain a number"):
        scores([conversation("a", "one")], "rouge_l", "exact_match")
    assert scores([conversation("a", "one")], "rouge_l").of
    with pytest.raises(UserError, match="the last response of row has none"):
        scores([conversation("a", " ")], "rouge_l")
    with pytest.raises(ValidationError, match="names the score rouge_l twice"):
        scores([], "rouge_l", "rouge_l")


@pytest.mark.parametrize("values", [[], [1.0, 2.0], [float("nan")]])
def test_a_score_gives_a_finite_value_for_each_answer(values: list[float]) -> None:
    class Wrong:
        def check(self, example: Answered) -> None: ...

        def __call__(self, answered: list[Answered]) -> list[float]:
            return values

    with pytest.raises(UserError, match="score 'wrong' gave"):
        Scores({"wrong": Wrong()}, [conversation("a", "one")])(["b"])
