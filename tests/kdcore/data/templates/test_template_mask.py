"""The mask picks out exactly what an assistant wrote, with its end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore.data.conversation import Conversation, Message
from kdcore.data.templates.mask import encode, prompt_ids
from kdcore.errors import UserError
from kdcore.method.records import Row
from tests.tiny.tiny_chat_models import CHATML, MARKED, tiny_tokenizer

PLAIN = tiny_tokenizer()
END = "<|im_end|>"


def chat(*texts: str, system: str | None = None, ended: bool = True, **facts: Any) -> Conversation:
    """User and assistant in turns."""
    turns = [
        Message("user", text) if place % 2 == 0 else Message("assistant", text, ended)
        for place, text in enumerate(texts)
    ]
    first = [] if system is None else [Message("system", system)]
    return Conversation("row-1", (*first, *turns), **facts)


def ids_of(row: Row) -> list[int]:
    """The row's tokens before they were shifted apart."""
    return [*row.inputs["input_ids"].tolist(), int(row.labels[-1])]


def learned(row: Row, tokenizer: Any) -> str:
    return str(tokenizer.decode(row.labels[row.mask]))


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["rendered", "marked"])
@pytest.mark.parametrize(
    "response",
    [
        "the mat",
        "    for indented code\n        with more\n",
        "\n\nlines before",
        "trailing blank \n",
        "naïve 日本語 👩‍👩‍👧 \u2028 مرحبا",
        "<|im_start|>user\nquoting a turn",
        "",
    ],
)
def test_a_response_is_learned_whole_with_its_end(template: str, response: str) -> None:
    tokenizer = tiny_tokenizer(template)
    row = encode(chat("why?", response), tokenizer, 512)
    assert learned(row, tokenizer) == response + END


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["rendered", "marked"])
def test_every_assistant_turn_is_learned_and_nothing_else(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    row = encode(chat("one", "first", "two", "second", system="be brief"), tokenizer, 512)
    assert learned(row, tokenizer) == f"first{END}second{END}"
    hidden = str(tokenizer.decode(row.labels[~row.mask]))
    assert "first" not in hidden and "second" not in hidden
    assert "two" in hidden and "be brief" not in learned(row, tokenizer)


def test_labels_are_the_next_tokens() -> None:
    row = encode(chat("one", "first", "two", "second"), PLAIN, 512)
    assert torch.equal(row.labels[:-1], row.inputs["input_ids"][1:])
    assert row.mask.dtype == torch.bool and row.labels.dtype == torch.int64
    assert row.inputs["attention_mask"].tolist() == [1] * len(row.labels)
    # the last prompt token is what predicts the first response token
    first = int(row.mask.nonzero()[0])
    assert ids_of(row)[: first + 1] == prompt_ids(chat("one"), PLAIN)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=2, max_size=6
    ).filter(lambda texts: len(texts) % 2 == 0)
)
def test_any_text_is_masked_exactly_and_begins_where_generation_would(texts: list[str]) -> None:
    row = encode(chat(*texts), PLAIN, 10_000)
    assert learned(row, PLAIN) == "".join(text + END for text in texts[1::2])
    prompt = prompt_ids(chat(*texts[:1]), PLAIN)
    assert ids_of(row)[: len(prompt)] == prompt


def test_a_response_is_learned_up_to_its_first_end_token() -> None:
    row = encode(chat("why?", f"because{END} and more", "so?", "yes"), PLAIN, 512)
    assert learned(row, PLAIN) == f"because{END}yes{END}"


def test_the_end_of_a_response_that_was_cut_is_not_learned() -> None:
    row = encode(chat("why?", "because the", ended=False), PLAIN, 512)
    assert learned(row, PLAIN) == "because the"


def test_a_long_row_is_cut_and_its_end_is_not_learned() -> None:
    whole = encode(chat("why?", "the mat " * 20), PLAIN, 512)
    row = encode(chat("why?", "the mat " * 20), PLAIN, 60)
    assert len(row.labels) == 60
    assert ids_of(row) == ids_of(whole)[:61]
    assert END not in learned(row, PLAIN) and row.mask.any()


def test_a_row_whose_prompt_fills_it_learns_nothing() -> None:
    row = encode(chat("the mat " * 40, "yes"), PLAIN, 30)
    assert len(row.labels) == 30 and not row.mask.any()


def test_generation_goes_on_from_the_first_missing_response_or_the_last() -> None:
    asked = Conversation("a", (Message("user", "one"), Message("user", "two")))
    assert asked.needs_response
    assert prompt_ids(asked, PLAIN) == prompt_ids(chat("one"), PLAIN)
    half = asked.answered(Message("assistant", "first"))
    assert half.needs_response and half.messages[1].content == "first"
    assert prompt_ids(half, PLAIN) == prompt_ids(chat("one", "first", "two"), PLAIN)
    whole = half.answered(Message("assistant", "second"))
    assert not whole.needs_response and whole.questions() == asked
    assert prompt_ids(whole, PLAIN) == prompt_ids(half, PLAIN)


def test_plain_text_needs_no_template() -> None:
    tokenizer = tiny_tokenizer(None)
    row = encode(chat("the cat sat on", " the mat", plain=True), tokenizer, 512)
    assert tokenizer.decode(ids_of(row)) == f"the cat sat on the mat{END}"
    assert learned(row, tokenizer) == f" the mat{END}"
    cut = encode(chat("the cat sat on", " the mat", plain=True, ended=False), tokenizer, 512)
    assert learned(cut, tokenizer) == " the mat"
    prompt = prompt_ids(chat("the cat sat on", plain=True), tokenizer)
    assert tokenizer.decode(prompt) == "the cat sat on"


def test_plain_text_without_an_end_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="its responses end with the end token, which the token"):
        encode(chat("a", "b", plain=True), tokenizer, 512)


def test_plain_text_begins_as_the_tokenizer_begins_any() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    row = encode(chat("a", "b", plain=True), tokenizer, 512)
    assert ids_of(row)[0] == 1 and learned(row, tokenizer) == f"b{END}"
    assert prompt_ids(chat("a", plain=True), tokenizer)[0] == 1


def test_a_tokenizer_that_only_appends_begins_no_text() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(None)
    expected = prompt_ids(chat("a", plain=True), tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.eos_token_id)]
    )
    assert prompt_ids(chat("a", plain=True), tokenizer) == expected


# how families differ: trimmed, no generation prompt, an end of text after all, old thoughts dropped
SHAPES = {
    "trimmed": CHATML.replace("message['content']", "message['content'] | trim"),
    "no generation prompt": (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '<|im_start|>[ASK] ' + message['content'] + ' [/ASK]' }}{% else %}"
        "{{ ' ' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    ),
    "end of text": CHATML + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}",
    "a generation prompt after all": CHATML.replace("if add_generation_prompt", "if true"),
    "thoughts": CHATML.replace(
        "message['content']",
        "(message['content'] if loop.last else message['content'].split('</think>')[-1])",
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_templates_of_every_shape(shape: str) -> None:
    tokenizer = tiny_tokenizer(SHAPES[shape])
    row = encode(chat("one", "hm</think>first", "two", "so</think> second "), tokenizer, 512)
    assert (
        learned(row, tokenizer)
        == {
            "trimmed": f"hm</think>first{END}so</think> second{END}",
            "no generation prompt": f" hm</think>first{END} so</think> second {END}",
            "end of text": f"hm</think>first{END}so</think> second {END}",
            "a generation prompt after all": f"hm</think>first{END}so</think> second {END}",
            "thoughts": f"first{END}so</think> second {END}",
        }[shape]
    )


def test_a_tokenizer_that_begins_every_text_with_a_blank() -> None:
    """SentencePiece's dummy prefix must not appear where a response begins inside the text."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "</s>", *"▁abcdefghijklmnopqrstuvwxyz|<>:\n"]
    core = Tokenizer(models.BPE({token: place for place, token in enumerate(letters)}, []))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Replace("▁", " ")
    template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token="<unk>", chat_template=template
    )
    row = encode(chat("why", "so it is"), tokenizer, 512)
    whole = tokenizer("<|user|>\nwhy</s>\n<|assistant|>\nso it is</s>")["input_ids"]
    assert ids_of(row) == whole
    assert tokenizer.convert_ids_to_tokens(row.labels[row.mask].tolist()) == [
        *"so▁it▁is", "</s>",
    ]  # fmt: skip


def complaint(conversation: Conversation, template: str | None) -> UserError:
    with pytest.raises(UserError) as raised:
        encode(conversation, tiny_tokenizer(template), 512)
    return raised.value


def test_what_cannot_be_learned_says_why() -> None:
    missing = complaint(chat("why?"), CHATML)
    assert missing.cause == "row-1 lacks a response to train on"
    assert "data.responses.by: teacher" in missing.cure
    untemplated = complaint(chat("why?", "so"), None)
    assert "does not have a chat template" in untemplated.cause
    assert "template: none" in untemplated.cure
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}"
    refused = complaint(chat("why?", "so", system="be brief"), refuses + "{% endif %}")
    assert refused.cause == "row-1: the chat template rejects the conversation: no system turns"
    assert refused.cure.startswith("set roles: {system: user}, tidy: true in the source: ")
    endless = complaint(
        chat("why?", "so"),
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )
    assert "does not put a special token after a response" in endless.cause
    end = "{% endgeneration %}"
    doubled = MARKED.replace(end, end + "and{% generation %}" + end)
    twice = complaint(chat("why?", "so"), doubled)
    assert twice.cause == "row-1: the chat template marks 2 of 1 responses"


TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
DISORDERED = {
    "reversed": "{% for m in messages | reverse %}" + TURN + "{% endfor %}",
    "by role": "{% for m in messages | sort(attribute='role') %}" + TURN + "{% endfor %}",
    "a summary first": "{{ messages | map(attribute='content') | join(' ') }}\n" + CHATML,
    "a length first": "{{ messages[-1].content | length }}\n" + CHATML,
}


@pytest.mark.parametrize("template", DISORDERED.values(), ids=DISORDERED)
@pytest.mark.parametrize("texts", [("why ever?", "so"), ("why?", "so", "when ever?", "then now")])
def test_a_template_with_another_order_is_refused(template: str, texts: tuple[str, ...]) -> None:
    wrong = complaint(chat(*texts), template)
    assert (
        wrong.cause
        == "row-1: the chat template does not print the messages once and in their order"
    )


def test_marks_around_another_text_are_refused() -> None:
    wrong = complaint(chat("why?", "so"), MARKED.replace("'assistant'", "'user'", 1))
    assert wrong.cause == "row-1: the chat template marks a text other than a response"
    assert wrong.cure == "fix its {% generation %} marks, or remove them all"


IN_PARTS = {
    "loops": CHATML.replace(
        "message['content'] + '<|im_end|>' + '\n'}}",
        "}}{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}"
        "{% endfor %}{{ '<|im_end|>\n' }}",
    ).replace("+ }}", "}}"),
    "first": CHATML.replace("message['content'] +", "message['content'][0]['text'] +"),
    "user's only": CHATML.replace(
        "message['content'] +",
        "(message['content'] | map(attribute='text') | join if message['role'] == 'user' "
        "else message['content']) +",
    ),
}
"""Templates that read a content, of the user or of all, as a list of parts."""


@pytest.mark.parametrize("shape", IN_PARTS)
def test_a_template_gets_parts_if_it_reads_nothing_else(shape: str) -> None:
    tokenizer = tiny_tokenizer(IN_PARTS[shape])
    texts = chat("why?", "so", "when?", "then", system="be brief")
    row = encode(texts, tokenizer, 512)
    whole = encode(texts, PLAIN, 512)
    assert ids_of(row) == ids_of(whole) and torch.equal(row.mask, whole.mask) and not row.notes
    assert prompt_ids(texts, tokenizer) == prompt_ids(texts, PLAIN)
    parted = [
        {"role": turn.role, "content": [{"type": "text", "text": turn.content}]}
        if "only" not in shape or turn.role == "user"
        else turn.said
        for turn in texts.messages
    ]
    assert tokenizer.apply_chat_template(parted, tokenize=False).startswith(
        tokenizer.decode(ids_of(row))
    )


def test_a_thought_is_a_part_where_a_template_reads_it_there() -> None:
    """As Mistral's does, which reads a response without a thought as a text."""
    parts = (
        "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else "
        "'[THINK]' + part['thinking'] + '[/THINK]' }}{% endfor %}"
    )
    template = CHATML.replace(
        "message['content'] + '<|im_end|>' + '\n'}}",
        "}}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        f"{parts}{{% endif %}}{{{{ '<|im_end|>\n' }}}}",
    ).replace("+ }}", "}}")
    tokenizer = tiny_tokenizer(template)
    turns = chat("why?", "so", "when?", "then")
    thought = replace(turns.messages[1], fields={"reasoning_content": "hm"})
    row = encode(
        replace(turns, messages=(turns.messages[0], thought, *turns.messages[2:])), tokenizer, 512
    )
    assert learned(row, tokenizer) == f"[THINK]hm[/THINK]so{END}then{END}" and not row.notes


def test_a_prompt_that_a_template_does_not_print_is_told() -> None:
    deaf = CHATML.replace(
        "message['content'] +", "(message['content'] if message['role'] != 'tool' else '') +"
    )
    turns = chat("why?", "so", "when?", "then").messages
    told = Conversation("row", (*turns[:2], Message("tool", "3"), *turns[2:]))
    note = "the chat template does not render a turn of role 'tool' as written"
    assert encode(told, tiny_tokenizer(deaf), 512).notes == (note,)
    assert encode(told, PLAIN, 512).notes == ()


def test_a_template_that_prints_no_text_is_refused() -> None:
    wrong = complaint(chat("why?", "so"), CHATML + "\ud83d")
    assert wrong.cause == "row-1: the chat template prints half of a surrogate pair"


def test_an_end_token_that_the_tokenizer_does_not_know_as_its_own_is_found() -> None:
    """Some families end a turn with another token than the tokenizer's eos."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    assert learned(encode(chat("why?", "so"), tokenizer, 512), tokenizer) == f"so{END}"
