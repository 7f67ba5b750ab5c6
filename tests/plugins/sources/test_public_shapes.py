"""Rows in the shapes of public data sets: what `init --data` makes of them, and what is learned."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from kdcore.components.registry import installed
from kdcore.data.templates.mask import encode
from kdcore.errors import UserError
from kdcore.jobs.starters.own_data import spec_of
from kdcore.models.assembly import Assembly
from kdcore.specs.reading.file import parse_spec
from tests.fixtures.chat_templates import QWEN3

TOKENIZER = QWEN3.tokenizer()
THINK, END = "<think>\n\n</think>\n\n", "<|im_end|>"
USER, ASSISTANT = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}
SAID = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]
CALL = {"name": "look", "arguments": {"city": "Rome"}}
CALLED = '\n<tool_call>\n{"name": "look", "arguments": {"city": "Rome"}}\n</tool_call>'
TOOL = {"name": "look", "description": "Look.", "parameters": {"city": {"type": "str"}}}
ONE = f"{THINK}There.{END}"
FIRST = "only the first of several responses is learned"


def unread(*names: str) -> str:
    return f"the source does not read {', '.join(repr(name) for name in names)} of a row"


LEARNED: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "SQuAD": (
        {
            "title": "Rome",
            "context": "A long text.",
            "question": "Where?",
            "answers": {"text": ["There.", "Here."], "answer_start": [3, 9]},
        },
        ONE,
        {unread("title"), FIRST},
    ),
    "HotpotQA": (
        {"question": "Where?", "answer": "There.", "context": {"title": ["a"], "sentences": []}},
        ONE,
        {unread("context")},
    ),
    "TriviaQA": (
        {"question": "Where?", "answer": {"value": "There.", "aliases": ["There"]}},
        ONE,
        set(),
    ),
    "Firefly": ({"kind": "x", "input": "Where?", "target": "There."}, ONE, {unread("kind")}),
    "FLAN, Aya": ({"inputs": "Where?", "targets": "There.", "task": "x"}, ONE, {unread("task")}),
    "OpenThoughts": (
        {
            "system": "s",
            "conversations": [
                {"from": "user", "value": "Where?"},
                {"from": "assistant", "value": "There."},
            ],
        },
        ONE,
        set(),
    ),
    "OpenR1": (
        {
            "problem": "Where?",
            "solution": "As it is said.",
            "generations": ["<think>\nso\n</think>\n\nThere."],
            "messages": [USER, ASSISTANT | {"content": "<think>\nso\n</think>\n\nThere."}],
        },
        f"<think>\nso\n</think>\n\nThere.{END}",
        {unread("problem", "solution", "generations")},
    ),
    "Magpie": (
        {"instruction": "Where?", "response": "There.", "conversations": SAID},
        ONE,
        {unread("instruction", "response")},
    ),
    "LMSYS-Chat": (
        {"model": "m", "conversation": [USER, ASSISTANT], "turn": 1},
        ONE,
        {unread("model", "turn")},
    ),
    "WildChat": (
        {"conversation": [USER | {"toxic": False}, ASSISTANT | {"toxic": False}]},
        ONE,
        {"the chat template does not read 'toxic'"},
    ),
    "APIGen-MT": (
        {
            "tools": json.dumps([TOOL]),
            "conversations": [
                SAID[0],
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "sunny"},
                SAID[1],
            ],
        },
        f"{CALLED}{END}{ONE}",
        set(),
    ),
    "CNN/DailyMail, XSum": (
        {"article": "A long article.", "highlights": "There."},
        ONE,
        set(),
    ),
    "FineWeb": ({"text": "A long text.", "token_count": 3}, f" long text.{END}", set()),
    "UltraChat, no_robots": (
        {"prompt": "Where?", "prompt_id": "a", "messages": [USER, ASSISTANT]},
        ONE,
        {unread("prompt", "prompt_id")},
    ),
    "OpenHermes": (
        {"custom_instruction": None, "conversations": SAID, "source": "x"},
        ONE,
        {unread("source")},
    ),
    "SlimOrca": (
        {"conversations": [SAID[0] | {"weight": 0.0}, SAID[1] | {"weight": 1.0}]},
        ONE,
        set(),
    ),
    "OpenOrca": ({"system_prompt": "", "question": "Where?", "response": "There."}, ONE, set()),
    "Capybara": (
        {"conversation": [{"input": "Where?", "output": "There."}] * 2},
        f"There.{END}{ONE}",
        set(),
    ),
    "LIMA": ({"conversations": ["Where?", "There."]}, ONE, set()),
    "UltraChat's first form": ({"id": None, "data": ["Where?", "There."]}, ONE, set()),
    "Orca-AgentInstruct": ({"messages": json.dumps([USER, ASSISTANT])}, ONE, set()),
    "DPO": (
        {"prompt": "Where?", "chosen": [USER, ASSISTANT], "rejected": [USER, USER]},
        ONE,
        {unread("prompt", "rejected")},
    ),
    "DPO of turns": (
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]},
        ONE,
        {unread("rejected")},
    ),
    "Orca DPO pairs": (
        {"system": "s", "question": "Where is it?", "chosen": "Over there.", "rejected": "I see."},
        f"{THINK}Over there.{END}",
        {unread("rejected")},
    ),
    "Nemotron": ({"input": [USER], "output": "There.", "system_prompt": "s"}, ONE, set()),
    "OpenAI's weights": (
        {"messages": [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": 1}]},
        ONE,
        set(),
    ),
    "smoltalk2": (
        {"messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nThere."}],
         "chat_template_kwargs": {"enable_thinking": True, "xml_tools": None}},
        f"<think>\nhm\n</think>\n\nThere.{END}",
        {"the chat template does not read 'xml_tools'"},
    ),
    "R1's thoughts": (
        {"messages": [USER, ASSISTANT | {"reasoning_content": "hm"}]},
        f"<think>\nhm\n</think>\n\nThere.{END}",
        set(),
    ),
    "xLAM": (
        {"query": "Rome?", "answers": json.dumps([CALL]), "tools": json.dumps([TOOL])},
        f"{THINK}{CALLED}{END}",
        set(),
    ),
    "OpenAI's tool calls": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": CALL | {"arguments": '{"city": "Rome"}'}}]},
            {"role": "tool", "content": "20"}, ASSISTANT], "tools": [TOOL]},
        f"{CALLED}{END}{ONE}",
        set(),
    ),
    "OpenAI's old function calls": (
        {"messages": [USER, {"role": "assistant", "content": None, "function_call": CALL},
         {"role": "function", "content": "20"}, ASSISTANT], "functions": [TOOL]},
        f"{CALLED}{END}{ONE}",
        set(),
    ),
    "glaive in ShareGPT's form": (
        {"conversations": [SAID[0], {"from": "function_call", "value": json.dumps(CALL)},
         {"from": "observation", "value": "20"}, SAID[1]], "tools": json.dumps([TOOL])},
        f"{CALLED}{END}{ONE}",
        set(),
    ),
    "Hermes function calling": (
        {"conversations": [{"from": "system", "value": "s"}, SAID[0],
         {"from": "gpt", "value": "<tool_call>x</tool_call>"}, {"from": "tool", "value": "20"},
         SAID[1]], "tools": json.dumps([TOOL])},
        f"<tool_call>x</tool_call>{END}{ONE}",
        set(),
    ),
    "APPS": (
        {"question": "Where?", "solutions": json.dumps(["There.", "x"]), "input_output": "{}"},
        ONE,
        {FIRST, unread("input_output")},
    ),
    "NQ": ({"question": "Where?", "answer": ["There.", "Over there."]}, ONE, {FIRST}),
    "a list as text": (
        {"prompt": "Two words?", "response": '["a", "b"]'},
        f'{THINK}["a", "b"]{END}',
        set(),
    ),
    "Dolly": (
        {"instruction": "Where?", "context": "c", "response": "There.", "category": "q"},
        ONE,
        {unread("category")},
    ),
    "HelpSteer": (
        {"prompt": "Where?", "response": "There.", "helpfulness": 4},
        ONE,
        {unread("helpfulness")},
    ),
    "NuminaMath": (
        {"problem": "Where?", "solution": "There.", "messages": [USER, ASSISTANT]},
        ONE,
        {unread("problem", "solution")},
    ),
    "MBPP": (
        {"text": "Write f, please.", "code": "def f(): return 1", "test_list": []},
        f"{THINK}def f(): return 1{END}",
        {unread("test_list")},
    ),
}  # fmt: skip

LEARNED |= {
    "SciQ": (
        {
            "question": "Where is it?",
            "correct_answer": "Over there.",
            "support": "As is well known, it is over there.",
        },
        f"{THINK}Over there.{END}",
        {unread("support")},
    ),
    "choices that the prompt repeats": (
        {"prompt": "Where? There. Here.", "response": "There.", "choices": ["There.", "Here."]},
        ONE,
        {unread("choices")},
    ),
    "The Stack": ({"content": "A long text.", "size": 9}, f" long text.{END}", set()),
}

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "glaive": (
        {"system": "SYSTEM: You can call.", "chat": "USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>"},
        "each text of the field 'chat' is a whole conversation",
        "messages: [{role: user",
    ),
    "Guanaco": (
        {"text": "### Human: Where?### Assistant: There."},
        "each text of the field 'text' is a whole conversation",
        "messages: [{role: user",
    ),
    "Baize": (
        {"input": "A chat.\n[|Human|] Where?\n[|AI|] There.\n[|Human|] "},
        "each text of the field 'input' is a whole conversation",
        "messages: [{role: user",
    ),
    "LLaVA": (
        {"image": "1.jpg", "conversations": SAID},
        "rows.jsonl:1 has 'image'",
        "remove rows.jsonl:1 from the data, and rows like it",
    ),
    "several images": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]},
        "a message has a part of type 'image'",
        "remove rows.jsonl:1 from the data, and rows like it",
    ),
    "SNLI": (
        {"premise": "A man.", "hypothesis": "A person.", "label": 0},
        "the rows have a label ('label') of several texts",
        "join premise and hypothesis to one column, then write train: {name: labelled_dataset",
    ),
    "WMT": (
        {"translation": {"en": "Where?", "de": "Wo?"}},
        "no field of",
        "prompt: FIELD",
    ),
    "MMLU": (
        {"question": "Where?", "choices": ["There.", "Here."], "answer": 1},
        "the rows are questions with answers to choose from (choices)",
        '{"prompt": ..., "response": ...}',
    ),
    "ARC": (
        {
            "question": "Where?",
            "choices": {"text": ["There.", "Here."], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "the rows are questions with answers to choose from (choices)",
        '{"prompt": ..., "response": ...}',
    ),
    "HellaSwag": (
        {"ctx_a": "A man runs.", "ctx": "A man runs. He", "endings": ["sits.", "stops."]},
        "the rows are questions with answers to choose from (endings)",
        '{"prompt": ..., "response": ...}',
    ),
    "RACE": (
        {
            "article": "A long text.",
            "question": "Where?",
            "options": ["There.", "Here."],
            "answer": "A",
        },
        "the rows are questions with answers to choose from (options)",
        '{"prompt": ..., "response": ...}',
    ),
    "BoolQ": (
        {"question": "Is it there?", "answer": True, "passage": "It is there."},
        "rows.jsonl:1: the response must be a string, not True",
        "response: FIELD",
    ),
    "PKU-SafeRLHF": (
        {
            "prompt": "Where is it?",
            "response_0": "Over there.",
            "response_1": "I see.",
            "better_response_id": 1,
        },
        "several responses to a prompt: response_0, response_1",
        "prompt: prompt, response: response_0}",
    ),
    "WebGPT comparisons": (
        {"question": {"full_text": "Where?"}, "answer_0": "Over there.", "answer_1": "I see."},
        "several responses to a prompt: answer_0, answer_1",
        "prompt: FIELD, response: answer_0}",
    ),
    "SHP": (
        {
            "history": "Where is it?",
            "human_ref_A": "Over there.",
            "human_ref_B": "I see.",
            "labels": 1,
        },
        "several responses to a prompt: human_ref_A, human_ref_B",
        "response: human_ref_A}",
    ),
    "stack-exchange-paired": (
        {"question": "Where is it?", "response_j": "Over there.", "response_k": "I see."},
        "several responses to a prompt: response_j, response_k",
        "prompt: question, response: response_j}",
    ),
    "WinoGrande": (
        {"sentence": "It is _ now.", "option1": "there", "option2": "here", "answer": "1"},
        "the rows are questions with answers to choose from (option1 and option2)",
        '{"prompt": ..., "response": ...}',
    ),
    "Chatbot Arena": (
        {
            "conversation_a": [USER, ASSISTANT],
            "conversation_b": [USER, ASSISTANT],
            "winner": "model_b",
        },
        "the rows have several conversations: conversation_a, conversation_b",
        "messages: conversation_a}",
    ),
    "UltraFeedback": (
        {
            "instruction": "Where?",
            "completions": [{"model": m, "response": f"There, {m}."} for m in "ab"],
        },
        "several responses to a prompt, in 'completions'",
        '{"prompt": ..., "response": ...}',
    ),
    "QNLI": (
        {"question": "Where is it?", "sentence": "It is there.", "label": 0},
        "the rows have a label ('label') of several texts",
        "join question and sentence to one column",
    ),
    "QQP": (
        {"question1": "Where is it?", "question2": "Is it there?", "label": 0},
        "the rows have a label ('label') of several texts",
        "join question1 and question2 to one column",
    ),
    "STS-B": (
        {"sentence1": "It is there.", "sentence2": "It is here.", "label": 3.8},
        "the rows have a label ('label') of several texts",
        "join sentence1 and sentence2 to one column",
    ),
    "CLINC": (
        {"text": "Where is it?", "intent": "place"},
        "have a label ('intent')",
        "text: text, label: intent}",
    ),
    "an export of Zendesk": (
        {"ticket": {"id": 1, "comments": [{"author": {"role": "agent"}, "body": "Yes."}]}},
        "it has lists inside others: ticket.comments",
        '{"messages": [{"role": "user"',
    ),
    "an export of Intercom, in one mapping": (
        {"conversations": [{"id": 1, "parts": {"type": "list", "parts": [{"body": "Yes."}]}}]},
        "it has lists inside others: conversations[0].parts.parts",
        '{"messages": [{"role": "user"',
    ),
    "fields inside one another": (
        {"a": functools.reduce(lambda inner, _: {"a": inner}, range(300), {"a": []})},
        "no field of",
        "prompt: FIELD",
    ),
    "a call in a message without a text": (
        {"messages": [{"role": "user", "content": 5, "calls": [{"name": "it"}]}]},
        "a message must be {role, content} with two strings",
        'write {"role": "user"',
    ),
    "OpenAssistant's trees": (
        {"prompt": {"text": "Where?", "role": "prompter", "replies": []}},
        "no field of",
        'messages: [{"role": "user", "content": ...}, ...]',
    ),
    "AG News": (
        {"text": "A text on news.", "label": 2},
        "have a label ('label')",
        "train: {name: labelled_dataset, path: ..., text: text, label: label}",
    ),
    "GoEmotions": (
        {"text": "A text on news.", "labels": [2, 3], "id": None},
        "have a label ('labels')",
        "train: {name: labelled_dataset, path: ..., text: text, label: labels}",
    ),
    "CIFAR": (
        {"img": {"bytes": "", "path": "a.png"}, "fine_label": 3, "coarse_label": 1},
        "have a label ('fine_label')",
        "train: {name: image_dataset, path: ..., image: img, label: fine_label}",
    ),
}


def written(row: dict[str, Any], folder: Path) -> Path:
    """The row, and another one, whose texts differ."""
    other = {
        name: f"{value} Too." if isinstance(value, str) and value[:1] not in "[{" else value
        for name, value in row.items()
    }
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(other) + "\n")
    return path


def spec_for(path: Path) -> Any:
    """The spec that `init --data` writes."""
    registry = installed()
    found = spec_of(registry.job("distill"), path, path.with_suffix(".yaml"), registry)
    return parse_spec(found.text, "rows.yaml", path.parent)


def source(path: Path) -> Any:
    """The source of that spec."""
    return Assembly(installed()).build(spec_for(path).data.train)


@pytest.mark.parametrize("name", LEARNED)
def test_what_was_said_is_learned_and_what_is_not_read_is_told(name: str, tmp_path: Path) -> None:
    row, learned, notes = LEARNED[name]
    conversation, _ = source(written(row, tmp_path)).read()
    found = encode(conversation, TOKENIZER, 4096)
    assert TOKENIZER.decode(found.labels[found.mask]) == learned
    assert {*found.notes} == notes


def test_the_tools_of_rows_count_for_their_length(tmp_path: Path) -> None:
    row, _, _ = LEARNED["xLAM"]
    tools = json.dumps([TOOL | {"description": "Look. " * 200}])
    lengths = [
        spec_for(written(each, tmp_path)).data.max_length for each in (row, row | {"tools": tools})
    ]
    assert lengths == [256, 1024]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_is_refused_with_what_to_type(name: str, tmp_path: Path) -> None:
    row, cause, cure = REFUSED[name]
    with pytest.raises(UserError) as raised:
        source(written(row, tmp_path)).read()
    assert cause in raised.value.cause and cure in raised.value.cure


def test_prompts_of_several_turns_await_the_model(tmp_path: Path) -> None:
    """MT-Bench's second turn is the user's, and no answer to the first one."""
    path = written({"turns": ["Where?", "And when?"], "category": "a"}, tmp_path)
    assert spec_for(path).data.responses.by == "teacher"
    conversation, _ = source(path).read()
    assert {message.role for message in conversation.messages} == {"user"}
