"""A conversation, sampling, and text that is shown as it comes."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdcore.data.conversation import Conversation
from kdcore.data.responses.decoder import DecoderAnswers
from kdcore.models.loading.loaded import LoadedModel
from kdcore_cli.terminal.answer_text import AnswerText
from tests.cli.commands.generate.conftest import Generate
from tests.cli.commands.generate.reference_answers import LENGTH, reference
from tests.fixtures.json_lines import write_lines
from tests.tiny.tiny_chat_models import tiny_tokenizer


class Pieces(io.StringIO):
    """Keeps apart what was written apart."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return len(text)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_conversation_remembers_and_an_answer_can_be_stopped(
    generate: Generate, target: tuple[LoadedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    lines = iter(["the mat", "", KeyboardInterrupt(), "and then?", "stop this", "mat " * 600])

    def typed(_: str) -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    asked = []
    plain_stream = DecoderAnswers.stream

    def stream(self: DecoderAnswers, conversation: Conversation, *rest: int) -> Iterator[Any]:
        asked.append([message.content for message in conversation.messages])
        for tokens in plain_stream(self, conversation, *rest):
            yield tokens
            if conversation.messages[-1].content == "stop this":
                raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(DecoderAnswers, "stream", stream)
    said = generate("--max-new-tokens", str(LENGTH))
    assert said.code == 0
    turns = "the mat", "and then?"
    first, second = reference(target[0], *turns, marks=True)
    assert asked[:3] == [
        ["the mat"],
        ["the mat", first, "and then?"],
        ["the mat", first, "and then?", second, "stop this"],
    ]
    printed = reference(target[0], *turns)
    assert said.out.startswith("\n\n".join(printed) + "\n")
    assert "\n1 token  " in said.err
    assert "error: the conversation has" in said.err  # and the turn is taken back
    assert said.err.count("press Ctrl-C to stop an answer, Ctrl-D to quit") == 2


def test_what_is_sampled_follows_the_seed(generate: Generate) -> None:
    words = ["the mat", "--temperature", "1.5", "--drafter", "ngram", "--quiet", "--seed"]
    first, again, other = (generate(*words, seed).out for seed in ("1", "1", "2"))
    assert first == again != other


def test_samples_are_numbered_differ_and_follow_the_seed(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--max-new-tokens", str(LENGTH), "--samples", "3", "--temperature", "1.5"]
    words += ["--drafter", "ngram", "--seed"]
    said, again, other = (generate("the mat", *words, seed) for seed in ("1", "1", "2"))
    assert said.out == again.out != other.out
    sampled = re.split(r"--- sample (\d) of 3 ---\n", said.out)
    assert sampled[:2] == ["", "1"] and sampled[3] == "2" and sampled[5] == "3"
    assert len(set(sampled[2::2])) == 3 and "tau" in said.err

    rows = [{"id": "two turns", "turns": ["the mat", "and then?"]}, {"prompt": "the teacher"}]
    write_lines(Path("prompts.jsonl"), rows)
    said, again = (generate("--file", "prompts.jsonl", *words, "1") for _ in range(2))
    assert said.out == again.out
    found = [json.loads(line) for line in said.out.splitlines()]
    named = [f"{name}#{n}" for name in ("two turns", "prompts.jsonl:2") for n in (1, 2, 3)]
    assert [row["id"] for row in found] == named
    assert len({str(row["messages"]) for row in found}) == 6
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert "a conversation has one answer to each turn" in generate(*words, "1").err


def test_a_stop_string_ends_the_answer(
    generate: Generate, target: tuple[LoadedModel, Path]
) -> None:
    whole = reference(target[0], "the mat")[0]
    stop = next(c for c in whole if c.isascii() and c.isalpha() and whole.index(c) > 2)
    said = generate("the mat", "--stop", stop, "--max-new-tokens", str(LENGTH), "--quiet")
    end = said.out.rstrip("\n")
    assert whole.startswith(end) and stop in end and len(end) < len(whole)


def test_what_a_token_says_after_a_stop_string_is_no_part_of_the_answer(
    generate: Generate, target: tuple[LoadedModel, Path]
) -> None:
    """As it comes and in a file: the string spans two tokens, and the second is longer."""
    whole = reference(target[0], "and the", plain=True)[0]
    assert whole.startswith("uBeac")
    options = ["--raw", "--quiet", "--stop", "Be", "--max-new-tokens", str(LENGTH)]
    assert generate("and the", *options).out == "uBe\n"
    Path("prompts.jsonl").write_text('{"prompt": "and the"}\n')
    said = generate("--file", "prompts.jsonl", *options)
    assert json.loads(said.out)["messages"][-1]["content"] == "uBe"


def _spaces_that_begin_are_left_out() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: a space before each word, bytes for what it does not know."""
    signs = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\n", "▁", "d", "e", "f", "x"]
    core = Tokenizer(models.BPE({sign: n for n, sign in enumerate(signs)}, [], byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces, first = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    core.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), first])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), _spaces_that_begin_are_left_out()])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_is_shown_as_it_comes_is_the_text_of_the_whole_answer(
    tokenizer: PreTrainedTokenizerFast, size: int
) -> None:
    ids = tokenizer.encode("def\n  x 😀😀 fed\n\n x日\n f é", add_special_tokens=False)
    file = Pieces()
    text = AnswerText(file, tokenizer)
    for start in range(0, len(ids), size):
        text.put(ids[start : start + size])
    text.end()
    assert "".join(file.pieces) == tokenizer.decode(ids) + "\n"
    assert not any("\ufffd" in piece for piece in file.pieces)
    assert len(file.pieces) > len(ids) / size / 3
