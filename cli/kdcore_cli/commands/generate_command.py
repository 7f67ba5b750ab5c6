"""Command ``generate``: chat with a model, or answer one prompt or a file of prompts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from kdcore.components import registry
from kdcore.errors import UserError
from kdcore.runs import interruption
from kdcore.runs.whole_files import beside, whole
from kdcore_cli.commands.decoding_options import (
    Adapter,
    Attention,
    BadWords,
    Drafter,
    Dtype,
    Engine,
    FrequencyPenalty,
    MaxNewTokens,
    MinNewTokens,
    MinP,
    NoRepeatNgramSize,
    PresencePenalty,
    Quantization,
    Raw,
    RepetitionPenalty,
    SequenceBias,
    Subfolder,
    TargetOptions,
    Temperature,
    Template,
    TemplateArguments,
    TopK,
    TopP,
    Tree,
    TypicalP,
    Verifier,
    biases,
    checked,
    drafting_spec,
    sampling_spec,
)
from kdcore_cli.interruption import Interrupted
from kdcore_cli.options import Device, Quiet, Verbose
from kdcore_cli.terminal import console
from kdcore_cli.terminal.control_characters import escaped, escaped_json
from kdcore_cli.terminal.quiet_libraries import quieten

if TYPE_CHECKING:
    from kdcore.components.registry import Registry
    from kdcore.data.conversation import Conversation
    from kdcore.data.responses.decoder import DecoderAnswers

_HALF = "\ufffd"
"""Replacement character that an incomplete character is decoded to."""
HINT = "press Ctrl-C to stop an answer, Ctrl-D to quit"


def generate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Model: hub id, folder or .gguf file, as in a spec."),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Prompt to answer; omit it to start a conversation."),
    ] = None,
    drafter: Drafter = "nothing",
    tree: Tree = None,
    verifier: Verifier = None,
    engine: Engine = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    typical_p: TypicalP = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    no_repeat_ngram_size: NoRepeatNgramSize = 0,
    bad_words: BadWords = None,
    sequence_bias: SequenceBias = None,
    min_new_tokens: MinNewTokens = 0,
    max_new_tokens: MaxNewTokens = 256,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Text that ends an answer. May be given several times."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Sampling seed.", min=0, max=2**32 - 1)] = 0,
    dtype: Dtype = "float32",
    attention: Attention = None,
    quantization: Quantization = None,
    adapter: Adapter = None,
    subfolder: Subfolder = None,
    device: Device = None,
    raw: Raw = False,
    template: Template = None,
    template_argument: TemplateArguments = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="JSONL", help="File of prompts to answer, in a format of the chat source."
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

    After each answer, a line on stderr shows its number of tokens, the tokens per second, and tau,
    the mean number of tokens per pass of the model (1 for plain decoding).

    For example:

    kdcore generate MODEL "What is a fjord?" --drafter ngram

    kdcore generate MODEL --drafter runs/fasteagle/drafter --temperature 0.7

    kdcore generate MODEL --file prompts.jsonl --out answers.jsonl
    """
    found = registry.installed()
    drafting = drafting_spec(drafter, tree, verifier, engine, found)
    sampling = sampling_spec(
        found,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        bad_words=bad_words or [],
        sequence_bias=biases(sequence_bias),
        min_new_tokens=min_new_tokens,
        max_new_tokens=max_new_tokens,
    )
    if prompt is not None and file is not None:
        raise UserError("PROMPT and --file exclude each other", "remove one of them")
    if "" in (stop or ()):
        raise UserError("--stop is empty", "write the text that ends an answer")
    if batch_size < 1:
        raise UserError(
            f"--batch-size must be at least 1, not {batch_size}", "write a larger number"
        )
    if out is not None:
        if file is None:
            raise UserError("--out requires --file", "add --file JSONL, or remove --out")
        _refuse_taken(out)
    if file is None and prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty", "write a prompt of at least one word")
    asked = _read(file, raw, found) if file else None
    console.warn_of_problems(found)
    quieten(quiet, verbose)
    from kdcore.data.responses.decoder import DecoderAnswers
    from kdcore.decoding.build import build_before_target, build_decoder

    build_before_target(drafting, sampling, found)
    options = TargetOptions(
        model=model,
        dtype=dtype,
        device=device,
        raw=raw,
        template=template,
        template_arguments=template_argument,
        attention=attention,
        quantization=quantization,
        adapter=adapter,
        subfolder=subfolder,
        quiet=quiet,
    )
    target = options.load(found)
    note = None if quiet else lambda line: console.err().print(line, style="dim", markup=False)
    decoder = build_decoder(target, drafting, sampling, found, note)
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
    """Read the prompts of a file, in any format of the chat source."""
    from kdcore.models.assembly import Assembly
    from kdcore.specs.distill import DataSpec

    template = "none" if raw else "chat"
    source = {"name": "chat", "path": str(file.absolute()), "template": template}
    spec = checked(DataSpec, {"train": source}, found)
    return [each.questions() for each in Assembly(found).build(spec.train).read()]


def _converse(answerer: DecoderAnswers, raw: bool, quiet: bool) -> None:
    """Answer one turn after the other, until the input ends."""
    import dataclasses

    with suppress(ImportError):  # Windows does not have it
        import readline  # noqa: F401  # gives input() a history and arrow keys

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
        except KeyboardInterrupt as stop:
            _go_on_after(stop)
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
        except UserError as wrong:  # drops this turn and keeps the earlier ones
            console.mistake(wrong.cause, wrong.cure)


def _answer(answerer: DecoderAnswers, asked: Conversation, quiet: bool) -> Conversation:
    """Print an answer while it is generated; Ctrl-C keeps the part generated so far."""
    tokens: list[int] = []
    with _measured(answerer, quiet):
        rounds = answerer.stream(asked)
        text = _Text(sys.stdout, answerer.target.tokenizer, answerer.until_stop)
        try:
            for committed in rounds:
                tokens += committed
                text.put(committed)
        except KeyboardInterrupt as stop:
            if not sys.stdin.isatty():
                raise
            _go_on_after(stop)
        finally:
            text.end()
    return asked.answered(answerer.message(tokens))


def _go_on_after(stop: KeyboardInterrupt) -> None:
    """Answer a Ctrl-C by going on with the conversation; SIGTERM ends it."""
    if isinstance(stop, interruption.Terminated):
        raise stop
    interruption.answered()


class _Text:
    """Decodes tokens and prints their text, once its characters are complete.

    The text of a token depends on the one before it: a tokenizer may omit the space of the first
    token. So new tokens are decoded together with those printed last. ``answered`` cuts a text at
    the end of the answer. A terminal gets control characters as escapes, a file or pipe the text
    as it is.
    """

    def __init__(self, file: TextIO, tokenizer: Any, answered: Callable[[str], str] = str) -> None:
        self.file, self.tokenizer, self.answered = file, tokenizer, answered
        self.shown = escaped if file.isatty() else str
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
        """Print the remaining text and end the line."""
        self._write(self._new())
        print(flush=True, file=self.file)

    def _new(self) -> str:
        before, whole = map(self._decoded, (self.written, self.written + self.waiting))
        return whole[len(before) :]

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _write(self, text: str) -> None:
        shown, self.text = len(self.text), self.answered(self.text + text)
        print(self.shown(self.text[shown:]), end="", flush=True, file=self.file)


def _answer_file(
    answerer: DecoderAnswers,
    asked: Sequence[Conversation],
    out: Path | None,
    size: int,
    quiet: bool,
) -> None:
    """Answer the prompts in batches, and write each batch when it is done.

    Raises Interrupted on Ctrl-C if a file with the first answers remains (see `_opened`).
    """
    from kdcore.data.responses.file import json_lines
    from kdcore_cli.terminal.progress import progress_on

    for conversation in asked:  # finds mistakes before the first answer
        answerer.prompt(conversation)
    with _measured(answerer, quiet), _opened(out) as file:
        progress = progress_on(console.err(), quiet)
        start = 0
        try:
            with progress.stage("answers", len(asked)) as stage:
                for start in range(0, len(asked), size):
                    batch = asked[start : start + size]
                    done = answerer.answer(batch, answerer.seed + start)
                    lines = json_lines(done)
                    file.write(escaped_json(lines) if file.isatty() else lines)
                    file.flush()
                    stage.advance(len(batch), tau=answerer.decoder.counter.tau)
        except KeyboardInterrupt:
            if out is None or not start:
                raise
            raise Interrupted(
                f"{beside(out)} holds {start} of {len(asked)} answers; to generate all of them, "
                "delete that file or name another with --out, then rerun the command"
            ) from None


def _refuse_taken(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} already exists", "name another file with --out")
    if beside(out).exists():
        raise UserError(
            f"{beside(out)} holds the answers of a command that is running or was interrupted",
            "wait for that command, delete the file, or name another file with --out",
        )


@contextmanager
def _opened(out: Path | None) -> Iterator[TextIO]:
    """Open a temporary file next to ``out``, which is renamed to ``out`` at the end.

    After an error the temporary file remains, unless it is empty.
    """
    if out is None:
        yield sys.stdout
        return
    with whole(out) as place:
        try:
            file = place.open("x", encoding="utf-8")
        except FileExistsError:
            _refuse_taken(out)  # it was created since the first look
            raise
        except OSError as fault:
            cure = "name a file in a writable folder"
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
    """Print the number of tokens, the tokens per second and tau to stderr at the end."""
    from kdcore.decoding.loop import Counter

    counter = answerer.decoder.counter = Counter()
    began = time.perf_counter()
    yield
    speed = counter.emitted / (time.perf_counter() - began)
    if not quiet and counter.rounds:
        line = f"{counter.emitted} tokens  {speed:.1f} tokens/s  tau {counter.tau:.2f}"
        console.err().print(line, style="dim")
