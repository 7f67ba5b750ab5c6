"""``generate``: chat with a model, answer one prompt, or answer a file of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from kdcore.errors import UserError
from kdcore.method import registry
from kdcore.runs.whole_files import beside, whole
from kdcore_cli import console
from kdcore_cli.decoding_options import (
    Drafter,
    Dtype,
    Raw,
    Tree,
    Verifier,
    checked,
    drafting_spec,
    load_target,
    sampling_spec,
)
from kdcore_cli.interruption import Interrupted
from kdcore_cli.options import Device, Quiet, Verbose
from kdcore_cli.quiet_libraries import quieten

if TYPE_CHECKING:
    from kdcore.data.conversation import Conversation
    from kdcore.data.responses.decoder import DecoderAnswers
    from kdcore.method.registry import Registry

_HALF = "\ufffd"
"""What the first bytes of a character are decoded to, until the others come."""
HINT = "Ctrl-C stops an answer, Ctrl-D leaves"


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id, folder or .gguf file, as in a spec.")
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The prompt; leave it out to start a conversation."),
    ] = None,
    drafter: Drafter = "nothing",
    tree: Tree = None,
    verifier: Verifier = None,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 is greedy decoding.")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(help="Sample from the k most likely tokens; 0 means all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option(help="Nucleus sampling threshold; 1 means all tokens.")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Penalty for tokens that occurred before; 1 means none.")
    ] = 1.0,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum length of an answer in tokens.")
    ] = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Stop an answer at this text. May be given several times."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Sampling seed.", min=0, max=2**32 - 1)] = 0,
    dtype: Dtype = "float32",
    device: Device = None,
    raw: Raw = False,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="JSONL", help="Answer the prompts in a file, in a format of the chat source."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="JSONL", help="File for the answers (default: stdout).")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of prompts answered at once.")] = 1,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Generate text, with or without a drafter.

    After each answer a line on stderr says how many tokens it has, how many came in a second,
    and tau, the tokens for each pass of the model; plain decoding has 1.

    For example:

    kdcore generate MODEL "What is a fjord?" --drafter ngram

    kdcore generate MODEL --drafter runs/fasteagle/drafter --temperature 0.7

    kdcore generate MODEL --file prompts.jsonl --out answers.jsonl --batch-size 8
    """
    found = registry.installed()
    drafting = drafting_spec(drafter, tree, verifier, found)
    sampling = sampling_spec(
        found,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        max_new_tokens=max_new_tokens,
    )
    if prompt is not None and file is not None:
        raise UserError("both a prompt and a file of prompts", "give one of them")
    if "" in (stop or ()):
        raise UserError("--stop is empty", "give the text that ends an answer")
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}", "give 1 or more")
    if out is not None:
        if file is None:
            raise UserError("--out is for the answers to a file", "add --file, or leave --out out")
        _refuse_taken(out)
    if file is None and prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty", "write at least one word")
    asked = _read(file, raw, found) if file else None
    console.warn_of_problems(found)
    quieten(quiet, verbose)
    from kdcore.data.responses.decoder import DecoderAnswers
    from kdcore.decoding.build import build_before_target, build_decoder

    build_before_target(drafting, sampling, found)
    target = load_target(model, dtype, raw, device, found, quiet=quiet)
    decoder = build_decoder(target, drafting, sampling, found)
    answerer = DecoderAnswers(target, decoder, sampling.max_new_tokens, tuple(stop or ()), seed)
    if asked is not None:
        _answer_file(answerer, asked, out, batch_size, quiet)
    elif prompt is not None:
        _answer(answerer, _asking(prompt, raw), quiet)
    else:
        _converse(answerer, raw, quiet)


def _asking(prompt: str, raw: bool) -> Conversation:
    from kdcore.data.conversation import Conversation, Message

    return Conversation("the prompt", (Message("user", prompt),), plain=raw)


def _read(file: Path, raw: bool, found: Registry) -> Sequence[Conversation]:
    """The questions of a file, in any shape that the chat source reads."""
    from kdcore.models.assembly import Assembly
    from kdcore.specs.distill import DataSpec

    template = "none" if raw else "chat"
    source = {"name": "chat", "path": str(file.absolute()), "template": template}
    spec = checked(DataSpec, {"train": source}, found)
    return [each.questions() for each in Assembly(found).build(spec.train).read()]


def _converse(answerer: DecoderAnswers, raw: bool, quiet: bool) -> None:
    """One turn after the other, until the end of the input."""
    import dataclasses

    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  # input() then has a history and arrow keys

    from kdcore.data.conversation import Conversation, Message

    conversation = Conversation("the conversation", (), plain=raw)
    if not quiet:
        console.err().print(HINT, style="dim")
    while True:
        try:
            said = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            console.err().print(HINT, style="dim")
            continue
        if not said.strip():
            continue
        asked = dataclasses.replace(
            conversation, messages=(*conversation.messages, Message("user", said))
        )
        try:
            conversation = _answer(answerer, asked, quiet)
        except UserError as wrong:  # the turn is taken back, and the others stay
            console.mistake(wrong.cause, wrong.cure)


def _answer(answerer: DecoderAnswers, asked: Conversation, quiet: bool) -> Conversation:
    """Show an answer as it comes; one that is stopped by Ctrl-C counts as far as it came."""
    tokens: list[int] = []
    with _measured(answerer, quiet):
        rounds = answerer.stream(asked)
        text = _Text(sys.stdout, answerer.target.tokenizer, answerer.until_stop)
        try:
            for committed in rounds:
                tokens += committed
                text.put(committed)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        finally:
            text.end()
    return asked.answered(answerer.message(tokens))


class _Text:
    """Takes tokens, and writes their text as far as it is whole characters and part of the answer.

    What a token reads as depends on the one before it: a tokenizer may leave out the first one's
    space. So the newest are decoded behind those that were written last.

    answered: gives of a text what is part of the answer, its beginning.
    """

    def __init__(self, file: TextIO, tokenizer: Any, answered: Callable[[str], str] = str) -> None:
        self.file, self.tokenizer, self.answered = file, tokenizer, answered
        self.text = ""
        self.written: list[int] = []
        self.waiting: list[int] = []

    def put(self, tokens: Sequence[int]) -> None:
        self.waiting += tokens
        new = self._new()
        if new and not new.endswith(_HALF):
            self._write(new)
            self.written, self.waiting = self.waiting, []

    def end(self) -> None:
        """Write what is left, and end the line."""
        self._write(self._new())
        print(flush=True, file=self.file)

    def _new(self) -> str:
        before, whole = map(self._decoded, (self.written, self.written + self.waiting))
        return whole[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _write(self, text: str) -> None:
        shown, self.text = len(self.text), self.answered(self.text + text)
        print(self.text[shown:], end="", flush=True, file=self.file)


def _answer_file(
    answerer: DecoderAnswers,
    asked: Sequence[Conversation],
    out: Path | None,
    size: int,
    quiet: bool,
) -> None:
    """Batches in the order of the file, each written as soon as it is answered (`_opened`).

    Raises Interrupted at Ctrl-C when a file is left with the first answers.
    """
    from kdcore.data.responses.file import json_lines
    from kdcore_cli.progress import progress_on

    for conversation in asked:  # before the first is answered
        answerer.prompt(conversation)
    with _measured(answerer, quiet), _opened(out) as file:
        progress = progress_on(console.err(), quiet)
        start = 0
        try:
            with progress.stage("answers", len(asked)) as stage:
                for start in range(0, len(asked), size):
                    batch = asked[start : start + size]
                    done = answerer.answer(batch, answerer.seed + start)
                    file.write(json_lines(done))
                    file.flush()
                    stage.advance(len(batch), tau=answerer.decoder.counter.tau)
        except KeyboardInterrupt:
            if out is None or not start:
                raise
            raise Interrupted(
                f"{beside(out)} holds {start} of {len(asked)} answers; for all, remove it or "
                "name another"
            ) from None


def _refuse_taken(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} already exists", "name another file")
    if beside(out).exists():
        raise UserError(
            f"{beside(out)} holds answers of a command that was stopped, or is at work",
            "wait for it, remove that file, or name another (--out)",
        )


@contextmanager
def _opened(out: Path | None) -> Iterator[TextIO]:
    """A new file beside ``out``, which takes its name when all is written.

    It stays when what is inside fails, unless nothing was written.
    """
    if out is None:
        yield sys.stdout
        return
    with whole(out) as place:
        try:
            file = place.open("x", encoding="utf-8")
        except FileExistsError:
            _refuse_taken(out)  # since it was looked at
            raise
        except OSError as fault:
            cure = "name a file in a folder you may write to"
            raise UserError(f"{out} cannot be written: {fault.strerror}", cure) from None
        with file:
            try:
                yield file
            except BaseException:
                if not place.stat().st_size:
                    place.unlink()
                raise


@contextmanager
def _measured(answerer: DecoderAnswers, quiet: bool) -> Iterator[None]:
    """A dim line on stderr: what came, how fast, and for how many passes of the target."""
    from kdcore.decoding.loop import Counter

    counter = answerer.decoder.counter = Counter()
    began = time.perf_counter()
    yield
    speed = counter.emitted / (time.perf_counter() - began)
    if not quiet and counter.rounds:
        line = f"{counter.emitted} tokens  {speed:.1f} tokens/s  tau {counter.tau:.2f}"
        console.err().print(line, style="dim")
