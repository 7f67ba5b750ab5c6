"""Generated responses are the teacher's, survive a kill, and refuse to mix."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses import file as generation
from kdcore.data.responses.file import Answerer
from kdcore.data.responses.model import ModelAnswers, generate
from kdcore.data.templates.mask import digest_of, encode, prompt_ids
from kdcore.errors import UserError
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.progress import Progress, Silent
from kdcore.specs.distill import ResponsesSpec
from tests.tiny.models import FAMILIES
from tests.tiny.tiny_chat_models import tiny_model

SPEC = ResponsesSpec(by="teacher", max_new_tokens=12, batch_size=3)
WORDS = ["the mat", "why", "the student and the teacher sat", "so", "for the mat", "and", "ok?"]


def ask(*texts: str, **facts: Any) -> Conversation:
    return Conversation("/".join(texts), tuple(Message("user", text) for text in texts), **facts)


ASKED = [ask(word) for word in WORDS]


def respond(
    asked: list[Conversation], teacher: LoadedModel, spec: ResponsesSpec, path: Path,
    progress: Progress, seed: int,
) -> list[Conversation]:  # fmt: skip
    answerer: Answerer = ModelAnswers(teacher, spec.model_copy(update={"seed": seed}))
    return list(generation.respond(asked, answerer, path, progress).conversations)


def likely_to_end(teacher: LoadedModel, by: float) -> LoadedModel:
    """A bias of the end token, so that some responses end and some do not."""
    head = teacher.model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[teacher.tokenizer.eos_token_id] = by
    head.register_forward_hook(lambda module, args, out: out + bias)
    return teacher


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return likely_to_end(tiny_model(seed=1), 2.0)


def alone(conversation: Conversation, teacher: LoadedModel) -> list[int]:
    """Greedy decoding without a batch, padding or a cache."""
    ids = prompt_ids(conversation, teacher.tokenizer)
    new: list[int] = []
    while len(new) < SPEC.max_new_tokens and teacher.tokenizer.eos_token_id not in new:
        with torch.inference_mode():
            new.append(int(teacher.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_generates_what_each_prompt_would_alone(family: str) -> None:
    teacher = likely_to_end(tiny_model(family, seed=1), 2.0)
    prompts = [prompt_ids(c, teacher.tokenizer) for c in ASKED]
    assert generate(prompts, teacher, SPEC) == [alone(c, teacher) for c in ASKED]


def test_a_long_prompt_does_not_widen_the_batch_of_the_short_ones(teacher: LoadedModel) -> None:
    long, short = [ask("the mat " * n) for n in (150, 140)], ASKED[:5]
    plan = ModelAnswers(teacher, SPEC).plan([*short, *long])
    assert [len(batch) for batch in plan] == [2, 3, 2]  # of at most three
    assert plan[0] == long and sorted(c.id for c in plan[1] + plan[2]) == sorted(
        c.id for c in short
    )


def test_a_batch_asks_as_often_in_each_of_its_conversations(teacher: LoadedModel) -> None:
    once, twice = ASKED[:2], [ask("the mat", "why"), ask("so", "ok?")]
    plan = ModelAnswers(teacher, SPEC).plan([once[0], twice[0], once[1], twice[1]])
    by_turns = [sorted(sum(m.role == "user" for m in c.messages) for c in batch) for batch in plan]
    assert by_turns == [[2, 2], [1, 1]]


def test_responses_come_in_the_order_of_their_prompts(teacher: LoadedModel, tmp_path: Path) -> None:
    answers = respond(ASKED, teacher, SPEC, tmp_path / "data" / "r.jsonl", Silent(), 0)
    assert [answer.questions() for answer in answers] == ASKED
    ended = set()
    for conversation, answer in zip(ASKED, answers, strict=True):
        ids = alone(conversation, teacher)
        response = answer.messages[-1]
        assert response.content == teacher.tokenizer.decode(ids, skip_special_tokens=True)
        assert response.ended == (ids[-1] == teacher.tokenizer.eos_token_id)
        ended.add(response.ended)
    assert ended == {True, False}  # the test sees both


def test_a_response_that_was_cut_has_no_learned_end(teacher: LoadedModel, tmp_path: Path) -> None:
    answers = respond(ASKED, teacher, SPEC, tmp_path / "r.jsonl", Silent(), 0)
    end = teacher.tokenizer.eos_token_id
    for answer in answers:
        row = encode(answer, teacher.tokenizer, 512)
        assert (end in row.labels[row.mask].tolist()) == answer.messages[-1].ended


def test_responses_that_were_there_are_replaced(teacher: LoadedModel, tmp_path: Path) -> None:
    given = [c.answered(Message("assistant", "mine")) for c in ASKED]
    answers = respond(given, teacher, SPEC, tmp_path / "r.jsonl", Silent(), 0)
    assert all(answer.messages[-1].content != "mine" for answer in answers)


def test_every_turn_is_answered_in_turn(teacher: LoadedModel, tmp_path: Path) -> None:
    asked = [ask("why", "so"), ask("the mat"), ask("and", "ok?", "for")]
    answers = respond(asked, teacher, SPEC, tmp_path / "r.jsonl", Silent(), 0)
    for conversation, answer in zip(asked, answers, strict=True):
        assert answer.questions() == conversation
        expected = conversation
        while expected.needs_response:
            ids = alone(expected, teacher)
            text = teacher.tokenizer.decode(ids, skip_special_tokens=True)
            response = Message("assistant", text, ids[-1] == 2, tokens=tuple(ids))
            expected = expected.answered(response, digest_of(teacher.tokenizer))
        assert answer == expected


def test_base_models_go_on_with_plain_text(tmp_path: Path) -> None:
    base = tiny_model(template=None)
    (answer,) = respond([ask("why", plain=True)], base, SPEC, tmp_path / "r.jsonl", Silent(), 0)
    assert answer.plain and not answer.needs_response


class Killed(BaseException):
    pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("torn", ["", '{"id": "the m', "batch"])
def test_a_killed_run_goes_on_as_if_unbroken(
    teacher: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    temperature: float, torn: str,
) -> None:  # fmt: skip
    spec = SPEC.model_copy(update={"temperature": temperature})
    unbroken = respond(ASKED, teacher, spec, tmp_path / "whole.jsonl", Silent(), 5)
    path = tmp_path / "r.jsonl"
    made: list[int] = []

    def answer(*args: Any) -> Any:
        if len(made) == 2:
            raise Killed
        made.append(0)
        return real(*args)

    real = ModelAnswers._answer
    monkeypatch.setattr(ModelAnswers, "_answer", answer)
    with pytest.raises(Killed):
        respond(ASKED, teacher, spec, path, Silent(), 5)
    assert len(path.read_text().splitlines()) == 6
    if torn == "batch":  # a write of which the disk got one line and a half
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:4]) + lines[4][:20])
    else:
        path.write_text(path.read_text() + torn)
    made.clear()
    again = respond(ASKED, teacher, spec, path, Silent(), 5)
    assert again == unbroken
    assert len(made) == (2 if torn == "batch" else 1)
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    made += [0, 0]  # nothing is left to generate
    assert respond(ASKED, teacher, spec, path, Silent(), 5) == unbroken
    written = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert written == [each.id for each in ASKED]  # not in the order of their batches


def test_a_file_of_another_teacher_or_setting_is_refused(
    teacher: LoadedModel, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    respond(ASKED[:2], teacher, SPEC, path, Silent(), 0)
    before = path.read_bytes()

    def complaint(other: LoadedModel, **changed: Any) -> str:
        with pytest.raises(UserError) as raised:
            respond(ASKED[:2], other, SPEC.model_copy(update=changed), path, Silent(), 0)
        return raised.value.cause.rpartition(" contains ")[2]

    assert complaint(tiny_model(seed=2)) == "responses generated with a different teacher"
    assert complaint(teacher, max_new_tokens=5) == (
        "responses generated with a different max_new_tokens"
    )
    assert complaint(teacher, temperature=0.5) == (
        "responses generated with a different temperature and seed"
    )
    assert path.read_bytes() == before
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.jsonl already exists, but kdcore did not"):
        respond(ASKED[:2], teacher, SPEC, tmp_path / "mine.jsonl", Silent(), 0)
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    # prompts that changed are answered anew, and the batch size is no setting of the answers
    smaller = SPEC.model_copy(update={"batch_size": 1})
    answers = respond([ask("new"), ASKED[0]], teacher, smaller, path, Silent(), 0)
    assert [answer.id for answer in answers] == ["new", "the mat"]


def test_what_others_asked_stays_in_a_shared_file(teacher: LoadedModel, tmp_path: Path) -> None:
    """Also where a batch of fewer prompts, or of others by the same names, is another batch."""
    path, spec = tmp_path / "r.jsonl", SPEC.model_copy(update={"temperature": 1.0})
    first = respond(ASKED, teacher, spec, path, Silent(), 0)
    written = path.read_text()
    assert respond(ASKED[:2], teacher, spec, path, Silent(), 0) == first[:2]
    assert path.read_text() == written
    renamed = Conversation(ASKED[0].id, (Message("user", "another prompt"),))
    others = respond([renamed, ask("new"), ASKED[3]], teacher, spec, path, Silent(), 0)
    assert [answer.questions() for answer in others[:2]] == [renamed, ask("new")]
    assert others[2] == first[3]
    assert set(written.splitlines()) < set(path.read_text().splitlines())
    assert respond(ASKED, teacher, spec, path, Silent(), 0) == first


def test_a_second_run_waits_for_the_file(teacher: LoadedModel, tmp_path: Path) -> None:
    path, lock = tmp_path / "r.jsonl", FileLock(tmp_path / "r.lock", thread_local=False)

    class Waits(Silent):
        def note(self, line: str) -> None:
            assert "waiting for another process that is writing to" in line
            lock.release()  # which it does in the end

    with lock:
        answers = respond(ASKED[:1], teacher, SPEC, path, Waits(), 0)
    assert [answer.questions() for answer in answers] == ASKED[:1]


def test_what_is_drawn_follows_the_seed_and_leaves_others_draws_alone(
    teacher: LoadedModel, tmp_path: Path
) -> None:
    spec = SPEC.model_copy(update={"temperature": 1.0})
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    answers = [
        respond(ASKED, teacher, spec, tmp_path / f"{i}.jsonl", Silent(), seed)
        for i, seed in enumerate([1, 1, 2])
    ]
    assert torch.equal(torch.rand(3), expected)
    assert answers[0] == answers[1] != answers[2]


def test_drawing_follows_the_softmax_uncut_by_the_models_own_settings() -> None:
    """Whatever top-k, top-p or penalty its generation_config recommends."""
    teacher = tiny_model(seed=3)
    config: Any = teacher.model.generation_config
    config.update(do_sample=True, top_k=1, top_p=0.1, repetition_penalty=5.0, temperature=9.0)
    prompt = prompt_ids(ASKED[0], teacher.tokenizer)
    one = ResponsesSpec(by="teacher", max_new_tokens=1, temperature=2.0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor(generate([prompt] * 4000, teacher, one, generator)).flatten()
    with torch.inference_mode():
        logits = teacher.model(torch.tensor([prompt])).logits[0, -1]
    expected = torch.softmax(logits / 2.0, -1)
    seen = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    assert float((seen - expected).abs().sum()) < 4 * (len(expected) / len(drawn)) ** 0.5
    greedy = one.model_copy(update={"temperature": 0.0})
    assert generate([prompt], teacher, greedy) == [[int(logits.argmax())]]


def test_a_prompt_that_leaves_no_room_is_left_out_with_a_note(
    teacher: LoadedModel, tmp_path: Path
) -> None:
    notes: list[str] = []

    class Notes(Silent):
        def note(self, line: str) -> None:
            notes.append(line)

    asked = [ask("why"), ask("word " * 600), ask("so", "word " * 600)]
    answers = respond(asked, teacher, SPEC, tmp_path / "r.jsonl", Notes(), 0)
    assert [answer.id for answer in answers] == ["why"]
    reason = "they are too long for the context of tiny-llama"
    assert notes == [f"left out 2 of 3 conversations: {reason}"]


def test_the_file_survives_any_text(
    teacher: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some characters end a line for Python and not for JSON."""
    strange = "a\u2028b\u0085c\x0bd\r\ne"
    answer = Message("assistant", strange)
    made = "kdcore.data.responses.model.generated_message"
    monkeypatch.setattr(made, lambda tokens, model: answer)
    path = tmp_path / "r.jsonl"
    first = respond([ask(strange)], teacher, SPEC, path, Silent(), 0)
    monkeypatch.setattr(ModelAnswers, "_answer", None)
    assert respond([ask(strange)], teacher, SPEC, path, Silent(), 0) == first
    assert json.loads(path.read_text())["messages"][1]["content"] == strange


def test_answers_are_read_from_the_file_as_it_was(teacher: LoadedModel, tmp_path: Path) -> None:
    """Another run may put its own in order, or add some."""
    path, kept = tmp_path / "r.jsonl", {"test": "assert f()"}
    asked = [replace(each, kept=kept, teacher="big") for each in ASKED[:2]] + ASKED[2:]
    found = generation.respond(asked, ModelAnswers(teacher, SPEC), path, Silent()).conversations
    assert not isinstance(found, list)
    before = list(found)
    assert [(each.kept, each.teacher) for each in before[:3]] == [(kept, "big")] * 2 + [({}, "")]
    respond([*reversed(ASKED), ask("another")], teacher, SPEC, path, Silent(), 0)
    assert list(found) == before and [each.id for each in found[1:3]] == [a.id for a in ASKED[1:3]]
