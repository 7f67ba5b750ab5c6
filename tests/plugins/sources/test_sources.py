"""The chat and the labelled-text source: every shape of row, every mistake, real files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter

from kdcore.components.choice import Choice, OfKind
from kdcore.components.registry import installed
from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.file import json_lines
from kdcore.data.rows import collate, encode_rows, padding
from kdcore.errors import UserError
from kdcore.models.assembly import Assembly
from kdcore.runs.progress import Silent
from kdcore.testing.source import SourceSuite
from kdcore_baselines.sources import json_lines as reading
from kdcore_baselines.sources.components import ChatParams, LabelledTextParams
from kdcore_baselines.sources.files import ChatSource
from kdcore_baselines.sources.labelled import LabelledTextSource
from tests.fixtures.json_lines import write_lines
from tests.fixtures.pages import ROOT
from tests.tiny.tiny_chat_models import tiny_tokenizer

NO_CONTEXT: Any = None
DATA = Path("$KDCORE_DATA")
PROMPTS = ROOT / "examples" / "prompts"


@pytest.mark.needs("public data")
class TestChat(SourceSuite):
    name = "chat"
    params = MappingProxyType({"path": DATA / "bench" / "gsm8k.jsonl"})
    max_length = 2048


@pytest.mark.needs("public data")
class TestLabelledText(SourceSuite):
    name = "labelled_text"
    params = MappingProxyType({"path": DATA / "intent" / "banking77_test.csv"})


@pytest.mark.needs("public data")
class TestSeveral(SourceSuite):
    name = "several"
    params = MappingProxyType(
        {
            "sources": [
                {"name": "chat", "path": DATA / "bench" / "gsm8k.jsonl", "limit": 3},
                {"name": "chat", "path": DATA / "bench" / "alpaca.jsonl", "limit": 3},
            ]
        }
    )
    max_length = 2048


def several(*sources: dict[str, Any]) -> Any:
    adapter = TypeAdapter(Annotated[Choice, OfKind("source")])
    chosen = adapter.validate_python({"name": "several", "sources": list(sources)})
    return Assembly(installed()).build(chosen)


def test_several_sources_are_read_one_after_the_other_and_ids_stay_apart(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 3)):
        rows = [{"id": f"row-{n}", "prompt": f"{name}{n}"} for n in range(count)]
        write_lines(tmp_path / name, rows)
    source = several(*({"name": "chat", "path": tmp_path / name} for name in "ab"))
    found = {each.id: each.messages[0].content for each in source.read()}
    assert found == {
        "row-0": "a0", "row-1": "a1", "row-0#2": "b0", "row-1#2": "b1", "row-2": "b2",
    }  # fmt: skip


def test_a_file_is_searched_again_only_after_it_changed(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = '{"prompt": "a", "response": "b"}\n{"prompt": "c"}\n'
    rows.write_text(lines)
    params = {"name": "chat", "path": str(rows), "tidy": True}
    source = several(params, params)
    first = source.read()
    assert source.read() is first and len(first) == 2
    assert source.left_out == ["rows.jsonl:2"] * 2
    rows.write_text(lines * 2)
    assert len(source.read()) == 4
    assert source.left_out == ["rows.jsonl:2", "rows.jsonl:4"] * 2


def test_conversations_of_files_and_of_datasets_are_joined(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name, "response": "sat"}) + "\n")
    source = several(
        {"name": "chat", "path": tmp_path / "a.jsonl"},
        {"name": "dataset", "path": str(tmp_path / "b.jsonl")},
    )
    read = source.read()
    assert [example.messages[0].content for example in read] == ["a.jsonl", "b.jsonl"]
    encoded = [source.encode(example, tiny_tokenizer(), 64) for example in read]
    assert all(row.mask.any() for row in encoded)


def test_several_sources_of_different_rows_or_classes_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"text,label\nhello,{name}\nbye,c\n")
    (tmp_path / "chat").write_text('{"prompt": "q"}\n')
    texts = [{"name": "labelled_text", "path": tmp_path / name} for name in "ab"]
    with pytest.raises(UserError, match="different kinds"):
        several(texts[0], {"name": "chat", "path": tmp_path / "chat"})
    with pytest.raises(UserError, match="different classes"):
        several(*texts)
    alike = several(texts[0], texts[0])
    assert alike.classes == ["a", "c"]
    assert alike.model_class == LabelledTextSource.model_class


def read(path: Path, *rows: dict[str, Any], **params: Any) -> list[Conversation]:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return ChatSource(ChatParams(path=path, **params), NO_CONTEXT).read()


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q"}, [("user", "q")]),
        ({"prompt": "q", "response": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"prompt": "q", "response": ""}, [("user", "q")]),
        ({"prompt": "q", "response": None}, [("user", "q")]),
        ({"question": "q", "answer": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "do"}, [("user", "do")]),
        (
            {"instruction": "do", "input": "it", "output": "a"},
            [("user", "do\n\nit"), ("assistant", "a")],
        ),
        (
            {"instruction": "do", "input": "", "output": "a"},
            [("user", "do"), ("assistant", "a")],
        ),
        (
            {"instruction": "do", "instances": [{"input": "it", "output": "a"}, {"output": "b"}]},
            [("user", "do\n\nit"), ("assistant", "a")],
        ),
        ({"turns": ["q", "r"]}, [("user", "q"), ("user", "r")]),
        (
            {"turns": ["q", "r"], "reference": ["a", "b"]},
            [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")],
        ),
        (
            {"turns": ["q", "r"], "reference": ["a"]},
            [("user", "q"), ("assistant", "a"), ("user", "r")],
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": ""},
                ]
            },
            [("system", "s"), ("user", "q"), ("assistant", "")],
        ),
        ({"prompt": "q", "completion": "a"}, [("user", "q"), ("assistant", "a")]),
        ({"instruction": "do", "response": "a"}, [("user", "do"), ("assistant", "a")]),
        (
            {"instruction": "do", "context": "it", "response": "a"},
            [("user", "do\n\nit"), ("assistant", "a")],
        ),
        (
            {"system_prompt": "s", "question": "q", "response": "a"},
            [("system", "s"), ("user", "q"), ("assistant", "a")],
        ),
        ({"problem": "q", "solution": "a"}, [("user", "q"), ("assistant", "a")]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [("user", "q"), ("assistant", "a")],
        ),
        (
            {"conversation": [{"role": "user", "content": "q"}], "prompt": "q"},
            [("user", "q")],
        ),
        (
            {"prompt": ["q", "r"], "reference": ["a"]},
            [
                ("user", "q"),
                ("assistant", "a"),
                ("user", "r"),
            ],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
            [("user", "q")],
        ),
    ],
    ids=str,
)
def test_a_row_of_any_shape(
    row: dict[str, Any], expected: list[tuple[str, str]], tmp_path: Path
) -> None:
    (conversation,) = read(tmp_path / "rows.jsonl", row)
    assert turns(conversation) == expected
    assert conversation.id == "rows.jsonl:1" and not conversation.plain


def test_a_message_keeps_all_that_was_said(tmp_path: Path) -> None:
    call = {"function": {"name": "look", "arguments": '{"city": "Rome"}'}}
    row = {
        "messages": [
            {"role": "user", "content": "q", "name": "Ann", "weight": 0},
            {"role": "assistant", "content": None, "tool_calls": [call], "thinking": "hm"},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "warm", "train": False, "refusal": None},
        ],
        "tools": [{"name": "look"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "topic": "weather",
    }
    (found,) = read(tmp_path / "rows.jsonl", row)
    asked, called, _, last = found.messages
    arguments = {"city": "Rome"}
    assert asked.fields == {"name": "Ann"} and called.learned and not last.learned
    assert called.fields == {
        "content": None,
        "thinking": "hm",
        "tool_calls": [{"function": {"name": "look", "arguments": arguments}}],
    }
    tool = {"type": "function", "function": {"name": "look"}}
    assert found.arguments == {"tools": [tool], "enable_thinking": False}
    assert found.unread == ("topic",) and last.fields == {}


def test_only_the_completion_of_a_prompt_of_turns_is_learned(tmp_path: Path) -> None:
    prompt = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"},
    ]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "b"}]}
    (found,) = read(tmp_path / "rows.jsonl", row)
    assert [(m.content, m.learned) for m in found.messages if m.role == "assistant"] == [
        ("a", False), ("b", True),
    ]  # fmt: skip


def test_what_a_model_generated_is_read_as_it_was_written(tmp_path: Path) -> None:
    messages = (
        Message("user", "q"),
        Message("assistant", "a", False, tokens=(5, 6), fields={"thinking": "hm"}),
    )
    tool = {"type": "function", "function": {"name": "look"}}
    arguments = {"tools": [tool], "enable_thinking": False}
    kept = Conversation("x", messages, arguments=arguments, tokenizer="digest")
    (tmp_path / "rows.jsonl").write_text(json_lines([kept]))
    rows = ChatSource(ChatParams(path=tmp_path / "rows.jsonl"), NO_CONTEXT).read()
    assert list(rows) == [kept] and rows[0].unread == ()


def test_turns_of_other_names_are_mapped_or_the_line_to_write_is_shown(tmp_path: Path) -> None:
    turns_ = [{"from": "customer", "text": "q"}, {"from": "agent", "text": "a longer answer"}]
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError) as raised:
        read(path, {"n": 1, "thread": turns_})
    roles = {"customer": "user", "agent": "assistant"}
    assert raised.value.cure == (
        "write {name: chat, messages: thread, role: from, content: text, "
        "roles: {customer: user, agent: assistant}}"
    )
    named = {"messages": "thread", "role": "from", "content": "text"}
    (found,) = read(path, {"thread": turns_}, **named, roles=roles)
    assert turns(found) == [("user", "q"), ("assistant", "a longer answer")]
    with pytest.raises(UserError) as raised:
        read(path, {"thread": turns_}, **named, roles={"customer": "user"})
    assert raised.value.cause == "rows.jsonl:1: the role 'agent' is unknown"
    assert raised.value.cure == "name its role: roles: {agent: assistant}"


def test_fields_of_any_name(tmp_path: Path) -> None:
    row = {"prompt": "not this", "ask": "q", "say": "a", "messages": "nor these"}
    (one,) = read(tmp_path / "rows.jsonl", row, prompt="ask", response="say")
    assert turns(one) == [("user", "q"), ("assistant", "a")]
    row = {"prompt": "q", "completion": "a"}
    (two,) = read(tmp_path / "rows.jsonl", row, response="completion")
    assert turns(two) == [("user", "q"), ("assistant", "a")]


def test_ids_limit_system_and_template(tmp_path: Path) -> None:
    rows = [{"id": 7, "prompt": "q"}, {"prompt": "r"}, {"prompt": "s"}]
    params = {"limit": 2, "system": "be brief", "template": "none"}
    read_rows = read(tmp_path / "rows.jsonl", *rows, **params)
    assert [row.id for row in read_rows] == ["7", "rows.jsonl:2"]
    assert turns(read_rows[0]) == [("system", "be brief"), ("user", "q")]
    assert all(row.plain for row in read_rows)
    own = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "q"}]}
    (kept,) = read(tmp_path / "rows.jsonl", own, system="be brief")
    assert turns(kept)[0] == ("system", "own")


def test_a_response_that_was_cut_stays_so(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "ended": False},
    ]
    (conversation,) = read(tmp_path / "rows.jsonl", {"messages": messages})
    assert not conversation.messages[1].ended


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c"
    assert turns(*read(tmp_path / "rows.jsonl", {"prompt": text})) == [("user", text)]
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "q"}\r\n\r\n{"prompt": "r"}')
    rows = ChatSource(ChatParams(path=tmp_path / "rows.jsonl"), NO_CONTEXT).read()
    assert [row.id for row in rows] == ["rows.jsonl:1", "rows.jsonl:3"]


def test_a_file_without_line_ends_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LONGEST", 2**20)
    (tmp_path / "rows.jsonl").symlink_to("/dev/zero")
    source = ChatSource(ChatParams(path=tmp_path / "rows.jsonl"), NO_CONTEXT)
    with pytest.raises(UserError, match=r"rows\.jsonl:1 is longer than 1 MiB"):
        source.read()


def test_a_null_id_is_none(tmp_path: Path) -> None:
    line = '{"id": null, "prompt": "q"}\n'
    (tmp_path / "rows.jsonl").write_text(2 * line + '{"id": 0, "prompt": "q"}\n')
    rows = ChatSource(ChatParams(path=tmp_path / "rows.jsonl"), NO_CONTEXT).read()
    assert [row.id for row in rows] == ["rows.jsonl:1", "rows.jsonl:2", "0"]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (
            '{"prompt": "q"}\n{"prompt": ',
            "rows.jsonl:2 is not valid JSON: Expecting value at column 12",
        ),
        (
            '{"prompt": "q"}\n{"p\n\n{"prompt": "q"}\n' + 7 * "no\n",
            "rows.jsonl:2 is not valid JSON: Invalid control character at column 4 (and lines "
            "5, 6, 7, 8, 9 and 2 more)",
        ),
        ('["q"]', "rows.jsonl:1 must be a JSON object, not a list"),
        (
            '{"prompt": "q", "n": ' + 5000 * "1" + "}",
            "rows.jsonl:1 has a number with thousands of digits, or thousands of nested brackets",
        ),
        (
            100_000 * "[",
            "rows.jsonl:1 has a number with thousands of digits, or thousands of nested brackets",
        ),
        ('{"text": "q", "n": 1}', "rows.jsonl:1 has no prompt; its fields are text, n"),
        ("{}", "rows.jsonl:1 has no prompt; its fields are (none)"),
        ('{"prompt": 3}', "rows.jsonl:1: the prompt must be a string, not 3"),
        ('{"prompt": " "}', "rows.jsonl:1: the prompt is blank"),
        ('{"prompt": "q", "response": 3}', "rows.jsonl:1: the response must be a string, not 3"),
        ('{"turns": "q"}', "rows.jsonl:1: 'turns' must be a list"),
        ('{"turns": []}', "rows.jsonl:1 has no user turn"),
        ('{"messages": [{"role": "system", "content": "s"}]}', "rows.jsonl:1 has no user turn"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
            "rows.jsonl:1: a message must be {role, content} with two strings",
        ),
        (
            '{"messages": [{"role": "user", "content": "q", "weight": 1}]}',
            "rows.jsonl:1: a message of role user sets train or weight, "
            "but only responses are learned",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "q", "weight": 0.5}]}',
            "rows.jsonl:1: the weight of a message must be 0 or 1, not 0.5",
        ),
        (
            '{"prompt": "q", "tools": "{"}',
            "rows.jsonl:1: 'tools' is text that is not valid JSON: Expecting property name "
            "enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        (
            '{"prompt": "q", "tools": ["look"]}',
            "rows.jsonl:1: 'tools' must be a list of mappings, the tools that can be called",
        ),
        (
            '{"conversations": [{"from": "narrator", "value": "q"}]}',
            "rows.jsonl:1: the role 'narrator' is unknown",
        ),
        (
            '{"messages": ["q", 3]}',
            "rows.jsonl:1: a message must be {role, content} with two strings",
        ),
        (
            '{"prompt": "q", "response": "a", "images": ["a.png"]}',
            "rows.jsonl:1 has 'images', which language models do not read",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "rows.jsonl:1: a message has a part of type 'image', which language models do not read",
        ),
        (
            '{"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}',
            "rows.jsonl:1: a message has a part of type 'tool_use', which language models do not "
            "read",
        ),
        (
            '{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, '
            '{"type": "thinking", "thinking": "b"}]}]}',
            "rows.jsonl:1: a message has a thought after a text, but templates print thoughts "
            "first",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "b"}]}]}',
            "rows.jsonl:1: a message of role user has a thought among the parts of its content, "
            "but it is not a response, or it has a second thought",
        ),
        (
            '{"id": "a", "prompt": "q"}\n{"id": "a", "prompt": "r"}',
            "rows.jsonl:2: the id 'a' already exists",
        ),
    ],
)
def test_a_mistake_names_its_line(content: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError) as raised:
        ChatSource(ChatParams(path=tmp_path / "rows.jsonl"), NO_CONTEXT).read()
    assert raised.value.cause == cause


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    def cause() -> str:
        with pytest.raises(UserError) as raised:
            ChatSource(ChatParams(path=tmp_path / "rows.jsonl"), NO_CONTEXT).read()
        return raised.value.cause

    path = tmp_path / "rows.jsonl"
    assert cause() == f"{path} cannot be read: No such file or directory"
    path.write_bytes(b"")
    assert cause() == f"{path} has no rows"
    path.write_bytes(b'{"prompt": "\xff"}')
    assert cause() == f"{path} is not UTF-8: invalid start byte"
    path.write_bytes('{"prompt": "q"}\n'.encode("utf-16"))
    assert cause() == f"{path} is not UTF-8: it is in UTF-16"
    path.write_bytes('{"prompt": "q"}\n'.encode("utf-16-le"))
    assert cause() == "rows.jsonl:1 contains NUL bytes: the file is in UTF-16, or damaged"
    path.write_bytes(gzip.compress(b'{"prompt": "q"}\n'))
    assert cause() == f"{path} is compressed by gzip"
    path.write_bytes('{"prompt": "\xfc'.encode()[:-1])
    assert cause() == f"{path} ends inside a character"
    path.unlink()
    path.mkdir()
    assert cause() == f"{path} cannot be read: Is a directory"


def labelled(tmp_path: Path, content: str, **params: Any) -> LabelledTextSource:
    (tmp_path / "rows.csv").write_text(content)
    return LabelledTextSource(LabelledTextParams(path=tmp_path / "rows.csv", **params), NO_CONTEXT)


def test_labelled_texts_are_rows_of_one_position(tmp_path: Path) -> None:
    source = labelled(tmp_path, 'text,label\n"one, two",b\nthe,a\nlong text here,b\n')
    assert source.classes == ["a", "b"]
    tokenizer = tiny_tokenizer()
    rows, _ = encode_rows(source, tokenizer, 5, Silent())
    assert [row.labels.tolist() for row in rows] == [[1], [0], [1]]
    sizes = [len(row.inputs["input_ids"]) for row in rows]
    assert sizes[0] == 5 and sizes[1] < 5  # the longer ones are cut
    assert tokenizer.decode(rows[1].inputs["input_ids"]) == "the"
    batch = collate(list(enumerate(rows)), padding(tokenizer))
    assert batch["labels"].shape == batch["mask"].shape == (3, 1)
    assert batch["mask"].all() and batch["input_ids"].shape == (3, 5)
    assert batch["attention_mask"].sum(1).tolist() == sizes


def test_classes_may_come_from_another_file(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("say,intent\nx,c\nx,a\nx,b\n")
    params = {"text": "say", "label": "intent", "classes_from": tmp_path / "train.csv"}
    source = labelled(tmp_path, "say,intent\nq,b\nr,c\n", **params)
    assert [row.labels for row in source.read()] == [(1,), (2,)]
    with pytest.raises(UserError) as raised:
        labelled(tmp_path, "say,intent\nq,b\nr,d\n", **params).read()
    assert raised.value.cause == (
        f"rows.csv:3: unknown label 'd'; it does not occur in {tmp_path / 'train.csv'}"
    )


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("text,labels\nq,a\n", "{path} has no column 'label'"),
        ("", "{path} has no column 'text'"),
        ("text,label\nq,a\nr\n", "rows.csv:3 has no label"),
        ('text,label\n"' + 150_000 * "q", "rows.csv:2: field larger than field limit (131072)"),
        ("text,label\nq,a\nr, s,b\n", "rows.csv:3 has more fields than the header, which has 2"),
        (
            "text,label\nq,a\nr,b \n",
            "rows.csv:3: the label 'b ' begins or ends with a blank, which would make it another "
            "class",
        ),
        ("text,label,text\nq,a,r\n", "rows.csv:1: the column 'text' occurs twice"),
        ("text,label\n,a\n", "rows.csv:2 has no text"),
        ("text,label\n", "{path} has no rows"),
        (
            "text,label\nq,0\nr,-1\n",
            "rows.csv:3 has the label -1, which stands for no label in many data sets",
        ),
    ],
)
def test_a_mistake_in_labelled_texts(content: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        labelled(tmp_path, content).read()
    assert raised.value.cause == cause.format(path=tmp_path / "rows.csv")


def test_minus_one_beside_texts_is_a_class(tmp_path: Path) -> None:
    assert labelled(tmp_path, "text,label\nq,-1\nr,b\n").classes == ["-1", "b"]


@pytest.mark.needs("public data")
@pytest.mark.parametrize(
    ("file", "rows", "answered"),
    [
        ("bench/mt_bench.jsonl", 60, 23),
        ("bench/humaneval.jsonl", 60, 60),
        ("bench/gsm8k.jsonl", 60, 60),
        ("bench/alpaca.jsonl", 60, 60),
        ("bench/cnn_dm.jsonl", 60, 60),
        ("train/gsm8k_train.jsonl", 7473, 7473),
        ("train/gsm8k_validation.jsonl", 751, 751),
        ("train/self_instruct_seed_tasks.jsonl", 175, 175),
        ("eval/self_inst.jsonl", 189, 189),
    ],
)
def test_real_conversations_are_masked_exactly(file: str, rows: int, answered: int) -> None:
    source = ChatSource(ChatParams(path=DATA / file), NO_CONTEXT)
    conversations = source.read()
    assert len(conversations) == rows
    whole = [c for c in conversations if not c.needs_response]
    assert len(whole) == answered
    tokenizer = tiny_tokenizer()
    for conversation in whole[:25]:
        row = source.encode(conversation, tokenizer, 100_000)
        responses = [m.content for m in conversation.messages if m.role == "assistant"]
        expected = "".join(f"{response}<|im_end|>" for response in responses)
        assert tokenizer.decode(row.labels[row.mask]) == expected


def test_the_examples_prompts_await_the_teacher() -> None:
    for name, count in (("train", 320), ("heldout", 48)):
        source = ChatSource(ChatParams(path=PROMPTS / f"{name}.jsonl"), NO_CONTEXT)
        conversations = source.read()
        assert len(conversations) == count
        assert all(conversation.needs_response for conversation in conversations)


@pytest.mark.needs("public data")
@pytest.mark.parametrize(
    ("name", "rows", "classes"), [("clinc150", 3000, 150), ("banking77", 3080, 77)]
)
def test_real_labelled_texts(name: str, rows: int, classes: int) -> None:
    intents = DATA / "intent"
    params = LabelledTextParams(
        path=intents / f"{name}_test.csv", classes_from=intents / f"{name}_train.csv"
    )
    source = LabelledTextSource(params, NO_CONTEXT)
    assert len(source.classes) == classes
    examples = source.read()
    assert len(examples) == rows
    assert {example.labels for example in examples} == {(n,) for n in range(classes)}


@pytest.mark.parametrize(
    "thought",
    [
        {"type": "thinking", "thinking": "hm", "signature": "x", "text": None},
        {"type": "thinking", "thinking": [{"type": "text", "text": "h"}, {"text": "m"}]},
        {"type": "reasoning", "text": "hm"},
        {"type": "reasoning", "reasoning": "hm"},
    ],
)
def test_a_thought_among_the_parts_of_a_response_is_its_reasoning(
    thought: dict[str, Any], tmp_path: Path
) -> None:
    asked = {"role": "user", "content": [{"type": "input_text", "text": "q"}]}
    parts = [thought, {"type": "output_text", "text": "a"}, {"type": "text", "text": "b"}]
    rows = [{"messages": [asked, {"role": "assistant", "content": parts}]}]
    write_lines(tmp_path / "rows.jsonl", rows)
    (found,) = ChatSource(ChatParams(path=tmp_path / "rows.jsonl"), NO_CONTEXT).read()
    assert found.messages == (
        Message("user", "q"),
        Message("assistant", "ab", fields={"reasoning_content": "hm"}),
    )
