"""Templates in the form of public families: each learned row is what was said."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kdcore.data.conversation import Conversation, Message
from kdcore.data.templates.mask import digest_of, encode, prompt_ids
from kdcore.data.templates.notes import (
    NO_END,
    NO_PROMPT,
    NOT_AS_GENERATED,
    NOT_READ,
    NOT_WHOLE,
    OPENING_AS_END,
    OTHER_START,
    OTHER_TOKENIZER,
    PADDING,
)
from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.runs.today import pinned
from tests.fixtures.chat_templates import (
    FAMILIES,
    GEMMA,
    GPT_OSS,
    LLAMA3,
    MISTRAL,
    OLMO,
    QWEN3,
    Family,
)

TOKENIZERS = {name: family.tokenizer() for name, family in FAMILIES.items()}
CALL = {"tool_calls": [{"function": {"name": "look", "arguments": {"city": "Rome"}}}]}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


def user(text: str) -> Message:
    return Message("user", text)


def said(text: str, **facts: Any) -> Message:
    return Message("assistant", text, **facts)


def called() -> Message:
    return said("", fields={"content": None, **CALL})


def learned(row: Row, tokenizer: Any) -> str:
    return str(tokenizer.decode(row.labels[row.mask]))


def encoded(family: str, *messages: Message, **facts: Any) -> tuple[str, tuple[str, ...]]:
    tokenizer = TOKENIZERS[family]
    row = encode(Conversation("x", messages, **facts), tokenizer, 4096)
    return learned(row, tokenizer), row.notes


NOTES = {"deepseek": (OTHER_START,), "glm": (OPENING_AS_END.format("<|user|>"),)}
TWO = (user("one"), said("first"), user("two"), said("second"))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("olmo", "first<|im_end|>second<|endoftext|>"),
        ("olmo, marked", "first<|im_end|>second<|endoftext|>"),
        (
            "gpt-oss",
            "<|channel|>final<|message|>first<|end|><|channel|>final<|message|>second<|return|>",
        ),
        ("qwen3", "first<|im_end|><think>\n\n</think>\n\nsecond<|im_end|>"),
        ("llama3", "first<|eot_id|>second<|eot_id|>"),
        ("deepseek", "first<|eos|>second<|eos|>"),
        ("gemma", "first<end_of_turn>second<end_of_turn>"),
        ("mistral", " first</s> second</s>"),
        ("glm", "first<|user|>second<|user|>"),
        ("command", "first<|end_response|><|end_turn|>second<|end_response|><|end_turn|>"),
        ("phi, marked", "first<|end|>second<|end|>\n<|endoftext|>"),
    ],
)
def test_assistant_turns_are_learned_and_nothing_else(family: str, expected: str) -> None:
    text, notes = encoded(family, *TWO)
    assert text == expected
    assert notes == NOTES.get(family, ())


def test_a_conversation_that_begins_with_a_response_says_so() -> None:
    """As many of ShareGPT do."""
    _, notes = encoded("qwen3", Message("system", "s"), said("hello"), *TWO)
    assert notes == (NO_PROMPT,)
    assert encoded("qwen3", Message("system", "s"), *TWO)[1] == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_that_are_context_or_cut(family: str) -> None:
    text, _ = encoded(family, user("one"), said("first", learned=False), *TWO[2:])
    assert "first" not in text and "second" in text and "two" not in text
    text, _ = encoded(family, user("one"), said("first", ended=False), user("two"), said("more"))
    whole, _ = encoded(family, user("one"), said("first"), user("two"), said("more"))
    assert whole.startswith(text.split("first")[0] + "first")
    assert len(text) < len(whole) and "two" not in text


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "gpt-oss",
            ' to=look<|channel|>commentary<|message|>{"city": "Rome"}<|call|>'
            "<|channel|>final<|message|>warm<|return|>",
        ),
        (
            "qwen3",
            '\n<tool_call>\n{"name": "look", "arguments": {"city": "Rome"}}\n</tool_call>'
            "<|im_end|><think>\n\n</think>\n\nwarm<|im_end|>",
        ),
        (
            "llama3",
            '{"name": "look", "parameters": {"city": "Rome"}}<|eom_id|>warm<|eot_id|>',
        ),
        (
            "deepseek",
            '<|calls|><|call|>look<|sep|>{"city": "Rome"}<|callend|><|callsend|><|eos|>warm<|eos|>',
        ),
        (
            "mistral",
            '[TOOL_CALLS][{"name": "look", "arguments": {"city": "Rome"}}]</s> warm</s>',
        ),
        ("glm", '<tool_call>look{"city": "Rome"}<|observation|>warm<|user|>'),
    ],
)
def test_tool_calls_are_learned_and_their_results_are_not(family: str, expected: str) -> None:
    messages = (user("one"), called(), Message("tool", "sunny"), said("warm"))
    text, notes = encoded(family, *messages, arguments={"tools": TOOLS})
    assert text == expected
    assert {*notes} - {NOT_READ.format("'tools'")} == {*NOTES.get(family, ())}


def test_a_call_that_the_template_does_not_print_is_not_learned_as_silence() -> None:
    messages = (user("one"), called(), Message("tool", "sunny"), said("warm"))
    text, notes = encoded("olmo", *messages)
    assert text == "warm<|endoftext|>"
    assert notes == (NOT_READ.format("'tool_calls'"),)


def test_tools_and_other_fields_reach_the_template() -> None:
    conversation = Conversation("x", TWO, arguments={"tools": TOOLS})
    tokenizer = TOKENIZERS["qwen3"]
    row = encode(conversation, tokenizer, 4096)
    assert '"name": "look"' in tokenizer.decode(row.inputs["input_ids"])
    assert '"name": "look"' in tokenizer.decode(prompt_ids(conversation, tokenizer))
    text, notes = encoded("olmo", user("one"), said("first", fields={"mood": "glad"}))
    assert text == "first<|endoftext|>" and notes == (NOT_READ.format("'mood'"),)


def test_marks_without_an_end_token_say_so() -> None:
    """As LLaVA's, which mark the words of a response alone, in a list of parts."""
    template = (
        "{% for m in messages %}{{ m.role.upper() + ': ' }}{% for part in m.content %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ part.text + ' ' }}{% endgeneration %}"
        "{% else %}{{ part.text + ' ' }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
    )
    tokenizer = Family(template, ("</s>",), "</s>").tokenizer()
    row = encode(Conversation("x", TWO), tokenizer, 4096)
    assert learned(row, tokenizer) == "first second " and row.notes == (NO_END,)
    tokenizer.chat_template = template.replace(
        "part.text + ' ' }}{% end", "part.text + '</s>' }}{% end", 1
    )
    row = encode(Conversation("x", TWO), tokenizer, 4096)
    assert learned(row, tokenizer) == "first</s>second</s>" and not row.notes


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_are_learned_where_the_template_prints_them(field: str) -> None:
    messages = (user("one"), said("first", fields={field: "so it is"}))
    text, notes = encoded("qwen3", *messages)
    assert text == "<think>\nso it is\n</think>\n\nfirst<|im_end|>" and not notes
    text, notes = encoded("gpt-oss", *messages)
    assert text == (
        "<|channel|>analysis<|message|>so it is<|end|>"
        "<|start|>assistant<|channel|>final<|message|>first<|return|>"
    )
    assert not notes
    assert encoded("llama3", *messages)[1] == (NOT_READ.format(f"'{field}'"),)
    _, notes = encoded("qwen3", *messages, user("two"), said("second"))
    assert notes == (NOT_WHOLE.format(field),)


def test_thoughts_in_the_content_that_the_template_drops_are_told() -> None:
    thoughtful = said("<think>\nhm\n</think>\n\nfirst")
    text, notes = encoded("qwen3", user("one"), thoughtful, user("two"), said("second"))
    assert text.startswith("first<|im_end|>")
    assert notes == (NOT_WHOLE.format("the content"),)
    assert encoded("qwen3", user("one"), thoughtful)[1] == ()
    _, notes = encoded("deepseek", user("one"), thoughtful)
    assert NOT_WHOLE.format("the content") in notes


def test_arguments_of_the_template_reach_prompt_and_row() -> None:
    conversation = Conversation("x", TWO[:2], arguments={"enable_thinking": False})
    tokenizer = TOKENIZERS["qwen3"]
    row = encode(conversation, tokenizer, 4096)
    assert learned(row, tokenizer) == "first<|im_end|>"
    assert tokenizer.decode(prompt_ids(conversation, tokenizer)).endswith("</think>\n\n")
    # earlier turns lack the empty thought that generation would begin with
    row = encode(Conversation("x", TWO, arguments={"enable_thinking": False}), tokenizer, 4096)
    assert learned(row, tokenizer) == "first<|im_end|>second<|im_end|>"
    assert row.notes == (OTHER_START,)


def generated(tokenizer: Any, text: str, **facts: Any) -> Message:
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return said(tokenizer.decode(ids), tokens=ids, **facts)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (QWEN3, "<think>\nfirst one and then"),  # a thought that the limit cut
        (GPT_OSS, "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final"),
        (LLAMA3, "  a blank before and after  "),
    ],
)
def test_a_generated_response_is_learned_as_its_tokens(family: Any, text: str) -> None:
    tokenizer = family.tokenizer()
    response = generated(tokenizer, text, ended=False)
    conversation = Conversation("x", (user("one"), response), tokenizer=digest_of(tokenizer))
    row = encode(conversation, tokenizer, 4096)
    ids = [*row.inputs["input_ids"].tolist(), int(row.labels[-1])]
    assert ids == [*prompt_ids(conversation, tokenizer), *response.tokens]
    assert row.labels[row.mask].tolist() == list(response.tokens) and not row.notes


def test_an_earlier_generated_response_is_learned_where_it_stays_what_it_was() -> None:
    tokenizer = QWEN3.tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    letters = tuple(tokenizer(list("first"), add_special_tokens=False)["input_ids"])
    plain = said("first", tokens=(*(each[0] for each in letters), end))
    last = generated(tokenizer, "<think>\nso\n</think>\n\nsecond")
    both = (user("one"), plain, user("two"), last)
    row = encode(Conversation("x", both, tokenizer=digest_of(tokenizer)), tokenizer, 4096)
    assert row.labels[row.mask].tolist() == [*plain.tokens, *last.tokens] and not row.notes
    thoughtful = generated(tokenizer, "<think>\nhm\n</think>\n\nfirst")
    both = (user("one"), thoughtful, user("two"), last)
    row = encode(Conversation("x", both, tokenizer=digest_of(tokenizer)), tokenizer, 4096)
    assert row.labels[row.mask].tolist() == list(last.tokens)
    assert row.notes == (NOT_AS_GENERATED,)


@pytest.mark.parametrize("family", [QWEN3, LLAMA3], ids=lambda family: family.eos)
def test_what_spells_a_special_token_is_one_in_a_message_and_none_in_a_generated_response(
    family: Any,
) -> None:
    """In a message it is one for training and decoding alike, as for a server."""
    tokenizer = family.tokenizer()
    end = tokenizer.convert_tokens_to_ids(family.eos)
    asked = Conversation("x", (user(f"write {family.eos} twice"),), tokenizer=digest_of(tokenizer))
    prompt = prompt_ids(asked, tokenizer)
    spelt = tokenizer(f"a{family.eos}b", add_special_tokens=False, split_special_tokens=True)
    answer = said(f"a{family.eos}b", tokens=(*spelt["input_ids"], end))
    last = generated(tokenizer, "done")
    both = replace(asked, messages=(*asked.messages, answer, user("more"), last))
    row = encode(both, tokenizer, 4096)
    ids = [*row.inputs["input_ids"].tolist(), int(row.labels[-1])]
    assert end in prompt and ids[: len(prompt)] == prompt
    assert row.labels[row.mask].tolist() == [*answer.tokens, *last.tokens] and not row.notes
    assert tokenizer.decode(ids).count(f"a{family.eos}b") == 1, "no part of it comes again"


def test_tokens_of_another_tokenizer_are_not_learned() -> None:
    conversation = Conversation("x", (user("one"), said("first", tokens=(1, 2))), tokenizer="other")
    tokenizer = OLMO.tokenizer()
    row = encode(conversation, tokenizer, 4096)
    assert learned(row, tokenizer) == "first<|endoftext|>" and row.notes == (OTHER_TOKENIZER,)


def test_ids_from_the_padding_of_a_teachers_vocabulary_are_not_learned() -> None:
    """A student of the same tokenizer may have no such class; earlier responses keep their ids."""
    tokenizer = OLMO.tokenizer()
    before, last = said("first", tokens=(*b"xy",)), said("last", tokens=(5, len(tokenizer), 6))
    turns = (user("one"), before, user("two"), last)
    row = encode(Conversation("x", turns, tokenizer=digest_of(tokenizer)), tokenizer, 4096)
    assert row.notes == (PADDING,) and int(row.labels.max()) < len(tokenizer)
    assert learned(row, tokenizer).endswith("last<|endoftext|>")
    assert row.labels[row.mask].tolist()[:2] == [*b"xy"]


def test_the_date_of_a_template_is_the_pinned_one() -> None:
    tokenizer = LLAMA3.tokenizer()
    conversation = Conversation("x", TWO)
    with pinned("2024-02-29"):
        first = prompt_ids(conversation, tokenizer)
    assert "Today is 29 Feb 2024" in tokenizer.decode(first)
    with pinned("2024-03-01"):
        assert "01 Mar 2024" in tokenizer.decode(prompt_ids(conversation, tokenizer))
        with pinned(""):
            assert "01 Mar 2024" in tokenizer.decode(prompt_ids(conversation, tokenizer))
    assert "29 Feb 2024" not in tokenizer.decode(prompt_ids(conversation, tokenizer))


def test_a_template_that_rejects_a_conversation_says_why() -> None:
    for family, messages, reason in (
        (GEMMA, (Message("system", "s"), *TWO), "no system turns"),
        (GPT_OSS, (user("one"), said("<|channel|>first")), "marks in the content"),
        (
            MISTRAL,
            (user("one"), Message("assistant", "", fields={"tool_calls": [3]})),
            "not JSON serializable",
        ),
    ):
        with pytest.raises(UserError) as raised:
            encode(Conversation("x", messages), family.tokenizer(), 4096)
        assert raised.value.cause.startswith("x: the chat template ")
        assert reason in raised.value.cause


BY_TURNS = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
NEVER = "{{ raise_exception('never') }}"


@pytest.mark.parametrize(
    ("template", "turns", "cure"),
    [
        (BY_TURNS, "user assistant assistant", "set tidy: true in the source: "),
        (BY_TURNS, "assistant user assistant", "set tidy: true in the source: "),
        (BY_TURNS, "system user assistant", "set roles: {system: user}, tidy: true in the source"),
        (BY_TURNS, "developer user assistant", "set roles: {developer: user}, tidy: true in the"),
        (
            "{% if messages[0].role == 'developer' %}{{ raise_exception('who?') }}{% endif %}"
            + OLMO.template,
            "developer user assistant",
            "set roles: {developer: system} in the source: which",
        ),
        (NEVER, "user assistant", "name another template (template: FILE beside the model), or"),
    ],
)
def test_what_a_template_refuses_has_the_line_that_it_accepts(
    template: str, turns: str, cure: str
) -> None:
    tokenizer = OLMO.tokenizer()
    tokenizer.chat_template = template
    messages = tuple(Message(role, f"{n}") for n, role in enumerate(turns.split()))
    with pytest.raises(UserError, match="rejects the conversation") as raised:
        encode(Conversation("x", messages), tokenizer, 4096)
    assert raised.value.cure.startswith(cure)


THOUGHT = "<think>\nso it"
MARKED = Family(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{% if m.thinking %}{{ '<think>' + m.thinking + '</think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    QWEN3.special,
    QWEN3.eos,
)


@pytest.mark.parametrize(
    ("family", "response", "expected"),
    [
        (QWEN3, said(THOUGHT, ended=False), THOUGHT),
        (QWEN3, said("", ended=False, fields={"reasoning_content": "so it"}), THOUGHT),
        (QWEN3, said("", ended=False, fields={"content": None, "thinking": "so it"}), THOUGHT),
        (QWEN3, said(THOUGHT), f"<think>\n\n</think>\n\n{THOUGHT}<|im_end|>"),
        (MARKED, said(THOUGHT, ended=False), "<think>so it"),
        (LLAMA3, said(THOUGHT, ended=False), THOUGHT),
        (
            GPT_OSS,
            said("", ended=False, fields={"reasoning_content": "so it"}),
            "<|channel|>analysis<|message|>so it",
        ),
        (QWEN3, said("an", ended=False, fields={"thinking": "so"}), "<think>\nso\n</think>\n\nan"),
    ],
)
def test_a_thought_that_was_cut_is_not_closed(
    family: Family, response: Message, expected: str
) -> None:
    """As an endpoint gives it, whose tokens are not known: as text, or apart from the answer."""
    tokenizer = family.tokenizer()
    row = encode(Conversation("x", (user("one"), response)), tokenizer, 4096)
    assert learned(row, tokenizer) == expected and not row.notes


def test_a_response_starts_where_generation_does_after_a_thought_that_was_dropped() -> None:
    """gpt-oss prints the thought before a call until the final answer follows."""
    family = GPT_OSS
    dropped = "{%- if m.thinking and not messages[-1].content -%}"
    tokenizer = family.tokenizer()
    tokenizer.chat_template = family.template.replace("{%- if m.thinking -%}", dropped, 1)
    call = said("", fields={"content": None, "reasoning_content": "hm", **CALL})
    answer = said("warm", fields={"reasoning_content": "so it is"})
    messages = (user("one"), call, Message("tool", "sunny"), answer)
    row = encode(Conversation("x", messages), tokenizer, 4096)
    assert learned(row, tokenizer).endswith(
        "<|call|><|channel|>analysis<|message|>so it is<|end|>"
        "<|start|>assistant<|channel|>final<|message|>warm<|return|>"
    )
    assert row.notes == (NOT_WHOLE.format("reasoning_content"),)


def test_a_template_that_looks_into_a_missing_content_gets_an_empty_one() -> None:
    tokenizer = OLMO.tokenizer()
    tokenizer.chat_template = "{% if false and m.content is none %}{% endif %}" + (
        OLMO.template.replace("{{ m.content }}", "{{ m.content.lstrip('\n') }}")
    )
    row = encode(Conversation("x", (user("one"), called(), said("warm"))), tokenizer, 4096)
    assert learned(row, tokenizer) == "warm<|endoftext|>"


def test_a_response_does_not_start_within_a_special_token() -> None:
    """Gemma 4: the generation prompt has an empty thought, in whose place the data has another."""
    family = Family(
        "{% for m in messages %}<|turn>{{ m.role }}\n"
        "{% if m.thinking %}<|channel>{{ m.thinking }}<channel|>{% endif %}"
        "{% if m.tool_calls %}<|call>{{ m.tool_calls[0] | tojson }}<call|>{% endif %}"
        "{{ m.content or '' }}<turn|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn>assistant\n<|channel><channel|>{% endif %}",
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|call>", "<call|>"),
        "<turn|>",
    )
    tokenizer = family.tokenizer()
    call = said("", fields={"content": None, "thinking": "hm", **CALL})
    row = encode(Conversation("x", (user("one"), call)), tokenizer, 4096)
    text = learned(row, tokenizer)
    assert text.startswith("<|channel>hm<channel|><|call>{") and text.endswith("}<call|><turn|>")
    assert tokenizer.convert_tokens_to_ids("<|channel>") in row.labels[row.mask].tolist()


def test_a_call_starts_at_itself_where_the_turn_goes_on_after_its_result() -> None:
    """Gemma 4: results stand in the turn of the call, and its content comes after them."""
    family = Family(
        "{% for m in messages %}"
        "{% set goes_on = loop.index0 and messages[loop.index0 - 1].role == 'tool' %}"
        "{% if m.role != 'tool' %}{% if not goes_on %}<|turn>{{ m.role }}\n{% endif %}"
        "{% set result = loop.nextitem %}"
        "{% for call in m.tool_calls or [] %}<|call>{{ call | tojson }}<call|><|result>"
        "{% if result %}{{ result.content }}<result|>{% endif %}{% endfor %}"
        "{% if m.content or not m.tool_calls %}{{ m.content }}<turn|>\n{% endif %}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|turn>assistant\n<|thought>{% endif %}",
        ("<|turn>", "<turn|>", "<|call>", "<call|>", "<|result>", "<result|>", "<|thought>"),
        "<turn|>",
    )
    tokenizer = family.tokenizer()
    messages = (user("one"), called(), Message("tool", "sunny"), said("warm"))
    row = encode(Conversation("x", messages), tokenizer, 4096)
    text = learned(row, tokenizer)
    assert text.startswith("<|call>{") and text.endswith("}<call|><|result>warm<turn|>")
    assert "sunny" not in text
