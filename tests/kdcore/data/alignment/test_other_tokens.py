"""Responses that a student samples, in the tokens of a teacher with another tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdcore.data.alignment.paired_rows import PairedRows, PairedSource
from kdcore.data.alignment.token_bytes import TokenBytes
from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.on_policy import answered, last_response, prompt_of
from kdcore.data.rows import RowDataset, batch_of, collate, padding
from kdcore.method.records import Batch, Row
from kdcore_baselines.sources.components import ChatParams
from kdcore_baselines.sources.files import ChatSource
from tests.tiny.tiny_chat_models import OTHER_TEXT, tiny_tokenizer

OURS = tiny_tokenizer(text=OTHER_TEXT, size=276)
END = OURS.eos_token_id
BESIDE = (
    "{% for message in messages %}{{ message['content'] if message['role'] == 'user' else "
    "' ' + message['content'] + '<|im_end|>' }}{% endfor %}"
)
"""A template with a space before the response."""


def pieces(scheme: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters that writes a space before each text, as SentencePiece."""
    signs = ["<unk>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    signs += [*"abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(models.BPE({sign: n for n, sign in enumerate(signs)}, [], byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<unk>",
        chat_template=tiny_tokenizer().chat_template,
    )


def paired(
    theirs: Any, *turns: str, ours: Any = OURS, alignment: Any = "spans", **of: Any
) -> tuple[Row, PairedRows]:
    """The row of one conversation, and the teacher's."""
    source = PairedSource(ChatSource(ChatParams(path="unread"), None), ours, theirs, alignment)
    roles = ["user", "assistant"] * len(turns)
    messages = tuple(Message(*each) for each in zip(roles, turns, strict=False))
    row = source.encode(Conversation("0", messages), ours, of.pop("max_length", 400))
    return row, PairedRows(source, RowDataset([row]), padding(theirs), **of)


def batch(row: Row, response: list[int], ours: Any = OURS) -> Batch:
    """The student's batch of a row with a sampled response."""
    sampled = answered(row, prompt_of(row), response)
    return batch_of(collate([(0, sampled)], padding(ours)))


THEIRS = {
    "bytes": tiny_tokenizer(),
    "pieces": pieces("first"),
    "pieces, a space before each part": pieces("always"),
}


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize(
    "said", ["a cat on the hill", "日本 and — the", " two  spaces", "a\nb\n\n c"]
)
@pytest.mark.parametrize("alignment", ["positions", "spans", "spans_last"])
def test_a_sampled_response_is_read_as_one_of_the_data(
    kind: str, said: str, alignment: Any
) -> None:
    """The student samples what the data say elsewhere: the teacher's row is the data's there."""
    ours, known = paired(THEIRS[kind], "say it", said, alignment=alignment)
    _, other = paired(THEIRS[kind], "say it", "something else", alignment=alignment)
    (found,), theirs = other.sampled(batch(ours, last_response(ours)))
    (expected,) = known.aligned_rows
    assert found.row.labels.tolist() == expected.row.labels.tolist()
    assert found.row.mask.tolist() == expected.row.mask.tolist()
    for name in ("own_span", "span", "place", "compared"):
        assert getattr(found, name).equal(getattr(expected, name)), name
    assert theirs.labels[0].equal(expected.row.labels)
    assert theirs.index.tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, len(OURS) - 1), min_size=1, max_size=24),
    st.sampled_from([*THEIRS]),
)
def test_what_is_compared_follows_the_same_text(response: list[int], kind: str) -> None:
    """Whatever tokens the student samples, also such that no tokenizer would write."""
    row, rows = paired(THEIRS[kind], "say it", "so")
    (found,), theirs = rows.sampled(batch(row, response))
    ours_of, theirs_of = TokenBytes(OURS), TokenBytes(THEIRS[kind])
    written = theirs.labels[0][theirs.mask[0]].tolist()
    assert written
    for place in found.compared.nonzero()[:, 0].tolist():
        before, own_before = ours_of(response[:place]), theirs_of(written[: found.place[place]])
        assert None not in before + own_before
        text = b"".join(filter(None, own_before))
        if kind != "bytes":
            text = text.removeprefix(b" ") if not b"".join(before).startswith(b" ") else text
        assert b"".join(before) == text
    special = [piece is None for piece in ours_of(response)]
    assert (theirs_of(written)[-1] is None) == any(special)


def test_a_text_that_spells_a_special_token_does_not_become_it() -> None:
    row, rows = paired(THEIRS["bytes"], "say it", "so")
    spelt = OURS("<|im_end|> so", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    (found,), theirs = rows.sampled(batch(row, [*spelt, END]))
    written = theirs.labels[0][theirs.mask[0]].tolist()
    assert THEIRS["bytes"].decode(written) == "<|im_end|> so<|im_end|>"
    assert written.count(THEIRS["bytes"].eos_token_id) == 1
    assert int(found.compared.sum()) > 2


def test_a_student_whose_template_writes_a_space_before_the_response() -> None:
    """The teacher's template writes none, and the other way round."""
    spaced = tiny_tokenizer(BESIDE, text=OTHER_TEXT, size=276)
    row, rows = paired(THEIRS["bytes"], "say it", "so", ours=spaced)
    tokens = spaced(" a cat", add_special_tokens=False)["input_ids"]
    _, theirs = rows.sampled(batch(row, [*tokens, END], spaced))
    assert THEIRS["bytes"].decode(theirs.labels[0][theirs.mask[0]]) == "a cat<|im_end|>"
    spaced = tiny_tokenizer(BESIDE)
    row, rows = paired(spaced, "say it", "so")
    tokens = OURS("a cat", add_special_tokens=False)["input_ids"]
    _, theirs = rows.sampled(batch(row, tokens))
    assert spaced.decode(theirs.labels[0][theirs.mask[0]]) == " a cat"


def test_the_earlier_responses_of_a_conversation_are_the_data_s() -> None:
    row, rows = paired(THEIRS["bytes"], "say it", "the cat", "and again", "the dog")
    _, theirs = rows.sampled(batch(row, [*OURS("a house")["input_ids"], END]))
    text = THEIRS["bytes"].decode(torch.cat([theirs.inputs["input_ids"][0, :1], theirs.labels[0]]))
    known = THEIRS["bytes"].decode(rows.rows[0].inputs["input_ids"])
    assert text == known[: known.index("the dog")] + "a house<|im_end|>"


def test_a_response_ends_where_the_context_of_the_teacher_does() -> None:
    context = 60
    row, rows = paired(THEIRS["bytes"], "say", "so", context=context)
    room = context + 1 - len(prompt_of(rows.rows[0]))
    response = OURS("on the hill " * 9)["input_ids"]
    (found,), theirs = rows.sampled(batch(row, response))
    assert theirs.labels.shape[1] == context
    assert int(theirs.mask.sum()) == room
    assert 0 < int(found.compared.sum()) < len(response)


@pytest.mark.parametrize("turns", [("the cat " * 9, "so"), ("say", "so", "the cat " * 9, "yes")])
def test_a_row_that_the_teacher_reads_without_its_last_response(turns: tuple[str, ...]) -> None:
    """Its text is longer in the teacher's tokens: the row says so, and its end is not compared."""
    theirs = tiny_tokenizer(size=262)
    ours = tiny_tokenizer(text="the cat say so yes", size=400)
    whole, _ = paired(theirs, *turns, ours=ours)
    row, rows = paired(theirs, *turns, ours=ours, max_length=len(whole.labels))
    assert row.labels.equal(whole.labels)
    assert any("cut off and not compared" in note for note in row.notes)
    (aligned,) = rows.aligned_rows
    assert aligned.lacks_last
    assert not aligned.compared[-len(last_response(row)) :].any()
    assert aligned.compared.any() == (len(turns) > 2)
    assert int(aligned.row.mask.sum()) >= 1
    (found,), made = rows.sampled(batch(row, last_response(row), ours))
    assert not found.compared.any()
    assert int(made.mask.sum()) == 1
