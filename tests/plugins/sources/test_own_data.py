"""`kdcore init --data`, chats as they are exported, and the parts of conversations."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest

from kdcore.components.registry import installed
from kdcore.data.conversation import Conversation
from kdcore.data.encoded.encode import encoded_rows
from kdcore.errors import UserError
from kdcore.jobs.starters.own_data import spec_of
from kdcore.models.assembly import Assembly
from kdcore.runs.progress import Silent
from kdcore.specs.parts.training import RowsSpec
from kdcore.specs.reading.file import parse_spec
from kdcore_baselines.sources.components import ChatParams
from kdcore_baselines.sources.conversations.recognition import fields_of
from kdcore_baselines.sources.files import ChatSource
from tests.fixtures.json_lines import write_lines
from tests.tiny.tiny_chat_models import tiny_tokenizer

NO_CONTEXT: Any = None
ASKED = ["My order {n} is late", "How do I reset password {n}?", "The app {n} crashes"]
CHAT = [("user", "hi\nMy order 0 is late"), ("assistant", "Sorry about order 0, it comes soon.")]
SAID = [
    {"who": "Customer", "says": "hi", "at": "09:00"},
    {"who": "Customer", "says": "My order 0 is late", "at": "09:01"},
    {"who": "Agent", "says": "Sorry about order 0, it comes soon.", "at": "09:02"},
    {"who": "Customer", "says": "thanks", "at": "09:03"},
]


def spec(text: str, folder: Path) -> Any:
    return parse_spec(text, "spec.yaml", folder)


def read(source: Any) -> list[Conversation]:
    found: list[Conversation] = Assembly(installed()).build(source).read()
    return found


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def made(file: str, folder: Path, job: str = "distill") -> tuple[Any, str]:
    """The spec that `init --data` writes for a file, and what it says."""
    registry = installed()
    found = spec_of(registry.job(job), folder / file, folder / "my chats.yaml", registry)
    return spec(found.text, folder), "\n".join(found.findings)


def test_exported_chats_with_fields_of_other_names(tmp_path: Path) -> None:
    """Turns in a list, as JSON text in a column, and one turn a row, give the same rows."""
    chats = [SAID, *([{**SAID[1], "says": f"order {n}"}, SAID[2]] for n in range(1, 20))]
    chats.append([{**SAID[1], "says": "nobody answered"}])
    lines = [json.dumps({"ticket": n, "thread": chat}) for n, chat in enumerate(chats)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    with (tmp_path / "json.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["ticket", "thread"], *([n, json.dumps(chat)] for n, chat in enumerate(chats))]
        )
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        rows = [[n, *turn.values()] for n, chat in enumerate(chats) for turn in chat]
        csv.writer(file).writerows([["ticket", "who", "says", "at"], *rows])
    for name in ("chats.jsonl", "json.csv", "rows.csv"):
        found, told = made(name, tmp_path)
        train, heldout = read(found.data.train), read(found.data.heldout)
        every = {tuple(turns(each)) for each in [*train, *heldout]}
        assert (len(train), len(heldout), len(every)) == (18, 2, 20), name
        assert tuple(CHAT) in every
        assert found.data.responses.by == "dataset"
        assert found.run == Path("runs/my-chats")
        for said in ("20 conversations", "role: the field 'who'", "Agent is assistant"):
            assert said in told, name
        assert "left out for want of a response: 1 conversation" in told


SPOKEN = [("Kunde", "Wann öffnen Sie? Größe; Länge"), ("Mitarbeiterin", "Um 9 Uhr, täglich.")]


def table(header: str, rows: list[tuple[str, ...]], delimiter: str) -> str:
    """Lines of a table as spreadsheets write them."""
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([header.split(), *rows])
    return text.getvalue()


@pytest.mark.parametrize(
    ("name", "encoding", "delimiter"),
    [("a.csv", "utf-8-sig", ";"), ("a.csv", "cp1252", ";"), ("a.csv", "utf-16", "\t"),
     ("a.tsv", "utf-8", "\t"), ("a.csv", "utf-8", ",")],
)  # fmt: skip
def test_tables_of_spreadsheets(name: str, encoding: str, delimiter: str, tmp_path: Path) -> None:
    """Any delimiter and encoding, roles of no known name, a constant column, cut rows."""
    rows = [(f"T-{n}", "Mail", who, f"{said} {n}") for n in range(20) for who, said in SPOKEN]
    text = table("Vorgang Kanal Absender Nachricht", rows, delimiter) + f"T-99{delimiter}Mail\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    found, told = made(name, tmp_path)
    every = [*read(found.data.train), *read(found.data.heldout)]
    pairs = {tuple(turns(each)) for each in every}
    expected = [("user", f"{SPOKEN[0][1]} 7"), ("assistant", f"{SPOKEN[1][1]} 7")]
    assert len(pairs) == 20 and tuple(expected) in pairs
    assert "group: the field 'Vorgang'" in told
    assert "Kunde is user, Mitarbeiterin is assistant" in told
    assert "user: Wann öffnen Sie? Größe; Länge 0" in told
    assert (f"encoding: {encoding}," in told) == (encoding in ("cp1252", "utf-16"))


def test_questions_and_answers_under_names_of_another_language(tmp_path: Path) -> None:
    """The first long column is the prompt; one without an answer is left out; `null` is a text."""
    rows = [(str(n), f"Was ist {n}?", f"Das ist die lange {n}. Zahl.") for n in range(20)]
    rows += [("20", "Warum nicht?", ""), ("21", "Wie heißt nichts?", "null")]
    (tmp_path / "faq.csv").write_text(table("id Kundenfrage Antwort", rows, ","))
    found, _ = made("faq.csv", tmp_path)
    every = [*read(found.data.train), *read(found.data.heldout)]
    assert len(every) == 21
    assert [("user", "Wie heißt nichts?"), ("assistant", "null")] in map(turns, every)


def test_a_null_in_a_table_of_turns_is_a_blank_turn(tmp_path: Path) -> None:
    said = [{"speaker": who, "text": text} for who, text in SPOKEN]
    chats = [[{**said[0], "text": f"order {n}"}, said[1]] for n in range(12)]
    chats.append([said[0], {**said[1], "text": None}])
    chats.append([*chats[0], {**said[0], "text": None}, said[0], said[1]])
    path = tmp_path / "chats.parquet"
    datasets.Dataset.from_dict({"dialogue": chats}).to_parquet(path)
    found, told = made("chats.parquet", tmp_path)
    assert len(read(found.data.train)) + len(read(found.data.heldout)) == 13
    assert "left out for want of a response: 1 conversation" in told


def test_tidy_says_so_when_it_leaves_out_all(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "answered": "a"}\n')
    source = ChatSource(ChatParams(path=tmp_path / "rows.jsonl", tidy=True), NO_CONTEXT)
    with pytest.raises(UserError, match="no conversation has a prompt and its response \\(1 are"):
        source.read()


@pytest.mark.parametrize(
    ("row", "params"),
    [
        ({"prompt": "a b?", "response": "c d"}, {}),
        ({"customer_message": "a b?", "agent_name": "Ann", "agentReply": "c d e"},
         {"prompt": "customer_message", "response": "agentReply"}),
        ({"topic": "x", "question": "a b?", "solution_text": "c d e"},
         {"prompt": "question", "response": "solution_text"}),
        ({"id": 1, "what_they_wrote": "a b c"}, {"prompt": "what_they_wrote"}),
        ({"question": "a b?"}, {}),
        ({"dialog": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
         {"messages": "dialog", "role": "role", "content": "content"}),
        ({"prompt": "a", "response": None}, {}),
    ],
)  # fmt: skip
def test_fields_are_recognised_by_names_and_contents(
    row: Mapping[str, Any], params: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{k: f"{v} {n}" if isinstance(v, str) else v for k, v in row.items()} for n in range(3)]
    write_lines(tmp_path / "rows.jsonl", rows)
    assert ChatSource.recognise(tmp_path / "rows.jsonl") == params


def test_a_column_of_two_values_is_not_taken_for_roles() -> None:
    """Whether a ticket is closed, beside a prompt and a response that many rows repeat."""
    rows = [
        {
            "customer_message": f"Hello, my router {n % 9} does not start.",
            "agent_reply": f"I am sorry. Please press its button {n % 7}.",
            "closed": closed,
        }
        for n, closed in enumerate(["yes", "no"] * 40)
    ]
    found = {"prompt": "customer_message", "response": "agent_reply"}
    assert fields_of(rows, "rows") == found
    assert fields_of([row | {"product": str(n % 5)} for n, row in enumerate(rows)], "rows") == found


def test_what_nobody_can_read_is_refused_with_its_fields(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1, "b": 2}\n')
    (tmp_path / "rows.txt").write_text("hello")
    registry = installed()
    with pytest.raises(UserError, match="its fields are a, b"):
        spec_of(registry.job("distill"), tmp_path / "rows.jsonl", tmp_path / "s.yaml", registry)
    with pytest.raises(UserError, match="no source recognises"):
        spec_of(registry.job("distill"), tmp_path / "rows.txt", tmp_path / "s.yaml", registry)
    with pytest.raises(UserError, match="does not have the section data"):
        spec_of(registry.job("bench"), tmp_path / "rows.jsonl", tmp_path / "s.yaml", registry)


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        # hh-rlhf: the rejected text is not a prompt of the chosen one
        (
            [{"chosen": f"Human: a {n} Assistant: b", "rejected": f"Human: a {n} Assistant: c, d"}
             for n in range(4)],
            "each text of the field 'chosen' is a whole conversation",
        ),
        # OASST: of two answers to one message the second is no turn after the first
        (
            [{"id": f"{n}{k}", "parent_id": n if k else None, "tree": n, "text": f"text {n} {k}",
              "role": "assistant" if k else "prompter"} for n in ("a", "b") for k in range(3)],
            "answers the same message as an earlier row ('parent_id')",
        ),
    ],
)  # fmt: skip
def test_rows_that_are_no_conversations_are_refused(
    rows: list[dict[str, Any]], cause: str, tmp_path: Path
) -> None:
    write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as raised:
        made("rows.jsonl", tmp_path)
    assert cause in raised.value.cause


def test_fields_that_are_not_read_are_named(tmp_path: Path) -> None:
    """One of them may be the response, and its name in the source mends that."""
    said = [{"input": ASKED[0].format(n=n), "content": f"so {n}", "repo": "x"} for n in range(30)]
    write_lines(tmp_path / "rows.jsonl", said)
    found, told = made("rows.jsonl", tmp_path)
    assert "  not read: the fields content, repo\n  if one of them is the response" in told
    assert found.data.responses.by == "teacher"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"input": "the question {n}", "content": "so {n}"}, True),
        ({"input": "the question {n}", "size": "{n}", "sizes": [1]}, True),
        ({"input": "the question {n}", "sizes": [1]}, False),
        ({"messages": [{"role": "user", "content": "the question {n}"}], "content": "so"}, False),
        ({"chat": [{"from": "human", "value": "the question {n}"}] * 2, "content": "so"}, False),
    ],
)
def test_a_field_is_offered_as_response_where_it_can_be_named(
    row: dict[str, Any], told: bool, tmp_path: Path
) -> None:
    """A source reads the field `response` of rows with a prompt alone."""
    text = json.dumps(row)
    write_lines(
        tmp_path / "rows.jsonl", [json.loads(text.replace("{n}", str(n))) for n in range(9)]
    )
    _, said = made("rows.jsonl", tmp_path)
    assert "not read: the fields" in said
    assert ("if one of them is the response" in said) == told


def test_prompts_without_responses_are_answered_by_the_model(tmp_path: Path) -> None:
    rows = [json.dumps({"ask": ASKED[n % 3].format(n=n)}) for n in range(30)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    found, told = made("prompts.jsonl", tmp_path)
    assert found.data.responses.by == "teacher" and "30 of 30 lack a response" in told
    assert "not read" not in told
    drafter, _ = made("prompts.jsonl", tmp_path, "train-drafter")
    assert drafter.data.responses.by == "target"
    assert len(read(drafter.data.heldout)) == 3


@pytest.mark.parametrize(("every", "told"), [(4, True), (1, False)])
def test_conversations_that_end_in_a_user_turn_are_counted(
    every: int, told: bool, tmp_path: Path
) -> None:
    """Where some do, the turn is left out; where all do, they are prompts with earlier answers."""
    turns = [["user", "assistant"] + ["user"] * (n % every == 0) for n in range(40)]
    rows = [
        {"messages": [{"role": role, "content": f"{role} {n} {place}"}
                      for place, role in enumerate(each)]}
        for n, each in enumerate(turns)
    ]  # fmt: skip
    write_lines(tmp_path / "rows.jsonl", rows)
    found, said = made("rows.jsonl", tmp_path)
    assert (
        "in 10 of 40 conversations, user turns after the last response are left out" in said
    ) == told
    assert ("40 of 40 end in a turn of the user, but have earlier answers" in said) != told
    assert found.data.responses.by == ("dataset" if told else "teacher")
    assert {len(each.messages) for each in read(found.data.train)} == {2 if told else 3}


def test_turns_that_all_begin_twice_are_joined_and_answers_stay(tmp_path: Path) -> None:
    """Each conversation has successive turns of the user, so that without `tidy` none is whole."""
    lines = ["ticket,author,body"]
    for n in range(30):
        said = ["customer,Hi", f"customer,My order {n} is late", f"agent,Sorry about order {n}"]
        lines += [f"T{n},{each}" for each in said + ["customer,thanks"] * (n % 3 == 0)]
    (tmp_path / "tickets.csv").write_text("\n".join(lines))
    found, said = made("tickets.csv", tmp_path)
    assert found.data.responses.by == "dataset"
    assert "in 10 of 30 conversations, user turns after the last response are left out" in said
    assert turns(read(found.data.train)[0]) == [
        ("user", "Hi\nMy order 0 is late"), ("assistant", "Sorry about order 0")
    ]  # fmt: skip


def test_parts_do_not_overlap_and_depend_on_what_is_asked(tmp_path: Path) -> None:
    """Neither the order of the rows nor a second answer to a question moves one across."""
    rows = [{"prompt": f"question {n}", "response": f"answer {n}"} for n in range(40)]
    rows += [{"prompt": f"question {n}", "response": "another"} for n in range(10)]

    def prompts(*part: float) -> set[str]:
        path = tmp_path / "rows.jsonl"
        write_lines(path, rows)
        found = ChatSource(ChatParams(path=path, part=part), NO_CONTEXT).read()
        kept = [row["prompt"] for row in rows if row["prompt"] in {turns(c)[0][1] for c in found}]
        assert [turns(each)[0][1] for each in found] == kept  # in the order of the file
        return set(kept)

    train, heldout = prompts(0, 0.9), prompts(0.9, 1)
    assert (len(train), len(heldout)) == (36, 4)
    random.Random(0).shuffle(rows)
    assert (prompts(0, 0.9), prompts(0.9, 1)) == (train, heldout)


def test_what_is_left_out_is_told_by_the_part_that_it_is_of(tmp_path: Path) -> None:
    """Each in one part: that of its prompt, if other conversations have it."""
    rows = [{"prompt": f"{n}", "response": "a"} for n in range(40)]
    asked = [*map(str, range(40, 60)), "3", "3"]
    users = [{"messages": [{"role": "user", "content": text}]} for text in asked]
    path = write_lines(tmp_path / "rows.jsonl", [*rows, *users])
    places = [f"rows.jsonl:{number}" for number in range(41, 63)]
    bounds = [0, 0.3, 0.9, 1]
    found = []
    for part in pairwise(bounds):
        source = ChatSource(ChatParams(path=path, part=part, tidy=True), NO_CONTEXT)
        kept = {each.messages[0].content for each in source.read()}
        assert ("3" in kept) == (places[-1] in source.left_out) == (places[-2] in source.left_out)
        assert source.left_out
        found += source.left_out
    assert sorted(found) == places
    whole = ChatSource(ChatParams(path=path, tidy=True), NO_CONTEXT)
    whole.read()
    assert whole.left_out == places


def test_a_share_of_the_training_rows_is_held_out(tmp_path: Path) -> None:
    source = "{name: chat, path: a.jsonl, part: [0.2, 1], limit: 100}"
    text = "job: train-drafter\ntarget: {model: x}\ndrafter: medusa\ntraining: {eval_every: 1}\n"
    text += f"data: {{train: {source}, heldout: 12.5%, validation: 25 %}}\n"
    parts = {
        name: (choice.params.part, choice.params.limit)
        for name, choice in spec(text, tmp_path).data.sources.items()
    }
    assert parts == {
        "train": ((0.2, 0.7), 62),
        "heldout": ((0.7, 0.8), 12),
        "validation": ((0.8, 1.0), 25),
    }
    fewer = parse_spec(text, "spec.yaml", tmp_path, ["data.heldout.limit=3"])
    assert fewer.data.heldout.params.part == (0.7, 0.8)  # type: ignore[attr-defined]
    assert fewer.data.heldout.params.limit == 3  # type: ignore[attr-defined]
    again = spec(text, tmp_path)  # what a run records is the same spec
    assert type(again).model_validate(again.model_dump(mode="json")) == again


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        ("{train: {name: chat, path: a}, heldout: 100 %}", "must leave rows for training"),
        ("{train: digits, heldout: 10 %}", "source 'digits' does not read a part"),
        ("{train: {name: chat, path: a, limit: -1}, heldout: 10 %}", "data.train.limit: must be"),
        ("{train: {name: chat, path: a, part: [1, 0]}, heldout: 10 %}", "increasing numbers"),
        ("{train: {name: dataset, path: a.csv, streaming: true, limit: 9}, heldout: 10 %}",
         "streaming does not read all rows"),
    ],
)  # fmt: skip
def test_a_share_that_cannot_be_held_out(data: str, cause: str, tmp_path: Path) -> None:
    text = f"job: distill\nteacher: {{model: x}}\nstudent: {{layers: [0]}}\ndata: {data}\n"
    with pytest.raises(UserError) as raised:
        spec(text, tmp_path)
    assert cause in raised.value.cause
    assert "heldout.limit" not in raised.value.cause  # a mistake of train is told once


@pytest.mark.parametrize(
    ("said", "kept", "notes"),
    [
        ("gpt: hi | human: q | gpt: a", "user: q | assistant: a", ["a response before the first"]),
        (
            "system: s | gpt: hi | human: q | gpt: a",
            "system: s | user: q | assistant: a",
            ["a response"],
        ),
        ("human: q | gpt: | human: r | gpt: b", "user: q\nr | assistant: b", ["blank turns"]),
        ("human: q | gpt: a | human: r", "user: q | assistant: a", ["user turns after the last"]),
        ("human: q | gpt: null | gpt: a", "user: q | assistant: a", ["blank turns"]),
        ("system: s | gpt: a", None, []),
        ("gpt: a", None, []),
        ("human: | gpt: a", None, []),
        ("", None, []),
    ],
)
def test_sharegpt_rows_are_tidied_and_what_is_left_out_is_told(
    said: str, kept: str | None, notes: list[str], tmp_path: Path
) -> None:
    pairs = [turn.strip().partition(":") for turn in said.split("|") if turn]
    values = {"null": None}
    turns_ = [{"from": f, "value": values.get(v.strip(), v.strip())} for f, _, v in pairs]
    fine = [{"from": "human", "value": "fine"}, {"from": "gpt", "value": "yes"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"conversations": each}) for each in (turns_, fine)))
    one = {"name": "chat", "path": path, "tidy": True}
    asked = {"name": "several", "sources": [one]}
    choice = RowsSpec.model_validate({"train": asked}, context={"registry": installed()}).train
    source = Assembly(installed()).build(choice)
    rows, summary = encoded_rows(source, tiny_tokenizer(), 500, Silent())
    if kept is None:
        assert len(rows) == 1 and summary.left_out.first == ["rows.jsonl:1"]
    else:
        first = source.read()[0]
        assert " | ".join(": ".join(turn) for turn in turns(first)) == kept
        assert [note for note, some in summary.notes.items() if some.first == ["rows.jsonl:1"]]
        assert all(any(n.startswith(note) for n in summary.notes) for note in notes)
        assert summary.left_out.number == 0


@pytest.mark.parametrize("different", [2, 3, 4, 7, 9, 10, 12, 40])
def test_few_prompts_have_both_parts(different: int, tmp_path: Path) -> None:
    rows = [{"prompt": f"ask {n % different}", "response": f"answer {n}"} for n in range(40)]
    write_lines(tmp_path / "rows.jsonl", rows)
    found, said = made("rows.jsonl", tmp_path)
    train, heldout = read(found.data.train), read(found.data.heldout)
    assert len(train) + len(heldout) == 40 and len(train) > len(heldout) - 1
    prompts = [{each.messages[0].content for each in part} for part in (train, heldout)]
    assert prompts[0].isdisjoint(prompts[1]) and all(prompts)
    told = f"ask: {different} different prompts"
    assert (told in said) == (different < 40)


def test_one_prompt_has_no_part_to_hold_out(tmp_path: Path) -> None:
    rows = [{"prompt": "ask", "response": f"answer {n}"} for n in range(40)]
    write_lines(tmp_path / "rows.jsonl", rows)
    found, said = made("rows.jsonl", tmp_path)
    assert found.data.heldout is None
    assert "nothing is held out: all conversations ask the same" in said
    rows += [{"prompt": "another", "response": "answer"}]
    write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as raised:
        ChatSource(ChatParams(path=tmp_path / "rows.jsonl", part=(0.9, 1)), NO_CONTEXT).read()
    assert "its 41 conversations have 2 different prompts" in raised.value.cause
    assert "heldout: 50 %" in raised.value.cure


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]},
        {"system": "system", "prompt": "user", "response": "assistant"},
    ],
)
def test_a_system_turn_opens_the_first_prompt(row: dict[str, Any], tmp_path: Path) -> None:
    """What the cure for templates without system turns says."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    asked = {"path": tmp_path / "rows.jsonl", "roles": {"system": "user"}, "tidy": True}
    for given in (asked, asked | {"system": "never, as the row has one"}):
        (found,) = ChatSource(ChatParams.model_validate(given), NO_CONTEXT).read()
        assert turns(found) == [("user", "system\nuser"), ("assistant", "assistant")]


@pytest.mark.parametrize("form", ["turns", "rows"])
def test_roles_that_occur_late_or_say_nothing(tmp_path: Path, form: str) -> None:
    """Roles after the first rows are in the spec; those of cut rows alone are not."""
    chats = [
        [("Kunde" if n < 250 else "VIP-Kunde", f"Frage {n} ist?"), ("Hilfe", f"Antwort {n} ist.")]
        for n in range(300)
    ]
    chats[40].append(("zwei", ""))
    if form == "turns":
        lines = [{"chat": n, "thread": [{"wer": who, "was": said} for who, said in chat]}
                 for n, chat in enumerate(chats)]  # fmt: skip
    else:
        lines = [
            {"chat": n, "wer": who, "was": said} for n, c in enumerate(chats) for who, said in c
        ]
        lines.append({"chat": None, "wer": None, "was": None})
    write_lines(tmp_path / "late.jsonl", lines)
    found, told = made("late.jsonl", tmp_path)
    assert found.data.train.params.roles == {
        "Kunde": "user", "Hilfe": "assistant", "VIP-Kunde": "user"
    }  # fmt: skip
    assert "300 conversations" in told
    assert len(read(found.data.train)) + len(read(found.data.heldout)) == 300


def test_a_late_role_beside_those_of_chat_templates(tmp_path: Path) -> None:
    """The first rows need no roles, as theirs are those of chat templates."""
    chats = [
        [{"who": "user", "says": f"number {n}?"}, {"who": who, "says": f"It is {n}."}]
        for n, who in enumerate(["assistant"] * 210 + ["Agent"] * 5)
    ]
    text = "".join(json.dumps({"thread": chat}) + "\n" for chat in chats)
    (tmp_path / "late.jsonl").write_text(text)
    found, _ = made("late.jsonl", tmp_path)
    assert found.data.train.params.roles == {"Agent": "assistant"}
    assert len(read(found.data.train)) + len(read(found.data.heldout)) == 215


@pytest.mark.parametrize(
    "cut",
    [{"ask": None, "reply": "x"}, {"ask": " ", "reply": "x"}, {"reply": "x"}, {"ask": "y"}, {}],
    ids=str,
)
def test_a_cut_row_after_the_first_ones_is_left_out(tmp_path: Path, cut: dict[str, Any]) -> None:
    lines = [{"ask": f"What is number {n}?", "reply": f"It is number {n}."} for n in range(230)]
    text = "".join(json.dumps(each) + "\n" for each in [*lines, cut])
    for name in ("ask", "question"):  # fields of other names, and the usual ones
        file = tmp_path / f"{name}.jsonl"
        file.write_text(
            text if name == "ask" else text.replace("ask", name).replace("reply", "answer")
        )
        found, told = made(file.name, tmp_path)
        assert found.data.train.params.tidy and "left out for want of a response: 1 " in told
        assert len(read(found.data.train)) + len(read(found.data.heldout)) == 230


def test_answers_in_html_are_told(tmp_path: Path) -> None:
    path, registry = tmp_path / "rows.jsonl", installed()
    row = {"prompt": "How do <p> and <br> differ?", "response": "Hello,<br/>it is so."}
    path.write_text("".join(json.dumps(row | {"prompt": f"{n}?"}) + "\n" for n in range(3)))
    found = spec_of(registry.job("distill"), path, tmp_path / "spec.yaml", registry).findings
    assert "  3 of 3 have HTML in a response, which the student would learn to" in found
    path.write_text(json.dumps(row | {"response": "One is a & b, the other x < y > z."}) + "\n")
    found = spec_of(registry.job("distill"), path, tmp_path / "spec.yaml", registry).findings
    assert not any("HTML" in line for line in found)


def test_a_help_desk_s_tables_in_another_language(tmp_path: Path) -> None:
    """Times of few values are no roles; prose is no conversation's number; who answers no side."""
    turns = [
        {"Ticket Nr": f"{n}", "Erstellt am": day, "Absender": who, "Nachricht": said}
        for n in range(9)
        for day, who, said in (
            ("2025-01-02 10:00", "Kunde", f"Wo ist Paket {n}?"),
            ("2025-01-02 10:01", "System", ""),
            ("2025-01-03 09:00", "Mitarbeiter", f"Paket {n} ist da."),
        )
    ]
    assert fields_of(turns, "tickets.csv") == {
        "group": "Ticket Nr",
        "role": "Absender",
        "content": "Nachricht",
        "roles": {"Kunde": "user", "Mitarbeiter": "assistant"},
        "tidy": True,
    }
    who = ("Anna", "Bert")
    pairs = [
        {
            "Nr": f"{n}",
            "Kundenanfrage": f"Wo bleibt denn mein Paket Nummer {n}, bitte?",
            "Antwort Agent": f"Es liegt für Sie im Laden bereit, Fach {n % 3}." if n % 9 else "",
            "Bearbeiter": who[n % 2],
        }
        for n in range(30)
    ]
    found = fields_of(pairs, "faq.csv")
    assert found == {"prompt": "Kundenanfrage", "response": "Antwort Agent", "tidy": True}
