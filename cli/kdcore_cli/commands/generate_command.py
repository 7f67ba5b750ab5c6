"""Command ``generate``: chat with a model, or answer one prompt or a file of prompts."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdcore.components import registry
from kdcore.errors import UserError, counted
from kdcore.runs import interruption
from kdcore.runs.whole_files import beside
from kdcore_cli.commands.answers_file import opened, refuse_taken
from kdcore_cli.commands.decoding_options import (
    Adapter,
    Attention,
    BadWords,
    Drafter,
    Dtype,
    Engine,
    First,
    FrequencyPenalty,
    MaxNewTokens,
    MinNewTokens,
    MinP,
    NoRepeatNgramSize,
    Pauses,
    PresencePenalty,
    Quantization,
    Raw,
    RepetitionPenalty,
    Samples,
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
from kdcore_cli.terminal.answer_text import AnswerText, print_samples
from kdcore_cli.terminal.control_characters import escaped_json
from kdcore_cli.terminal.quiet_libraries import quieten

if TYPE_CHECKING:
    from kdcore.components.registry import Registry
    from kdcore.data.conversation import Conversation
    from kdcore.data.responses.decoder import DecoderAnswers

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
    first: First = None,
    tree: Tree = None,
    pauses: Pauses = False,
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
    samples: Samples = 1,
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
    batch_size: Annotated[int, typer.Option(help="Number of prompts answered at once.", min=1)] = 1,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Generate text, with or without a drafter.

    After each answer, a line on stderr shows its number of tokens, the tokens per second, and tau,
    the mean number of tokens per pass of the model (1 for plain decoding); then, how many passes
    had no draft to verify.

    For example:

    kdcore generate MODEL "What is a fjord?" --drafter ngram

    kdcore generate MODEL --drafter runs/fasteagle/drafter --temperature 0.7

    kdcore generate MODEL "Name a river." --samples 4 --temperature 0.8

    kdcore generate MODEL --file prompts.jsonl --out answers.jsonl
    """
    found = registry.installed()
    drafting = drafting_spec(drafter, tree, verifier, engine, found, pauses, first)
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
    if out is not None:
        if file is None:
            raise UserError("--out requires --file", "add --file JSONL, or remove --out")
        refuse_taken(out)
    if file is None and prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty", "write a prompt of at least one word")
    if samples > 1:
        _refuse_samples(samples, temperature, conversation=prompt is None and file is None)
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
        _answer_file(answerer, asked, out, batch_size, samples, quiet)
    elif prompt is not None:
        _answer(answerer, _asking(prompt, raw), quiet, samples)
    else:
        _converse(answerer, raw, quiet)


def _refuse_samples(samples: int, temperature: float, *, conversation: bool) -> None:
    if not temperature:
        raise UserError(
            f"--samples {samples} at temperature 0 would give the same answer {samples} times",
            "set --temperature above 0, or remove --samples",
        )
    if conversation:
        raise UserError(
            "a conversation has one answer to each turn, not --samples",
            "add PROMPT or --file JSONL, or remove --samples",
        )


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
        asked = replace(conversation, messages=(*conversation.messages, Message("user", said)))
        try:
            conversation = _answer(answerer, asked, quiet)
        except UserError as wrong:  # drops this turn and keeps the earlier ones
            console.mistake(wrong.cause, wrong.cure)


def _answer(
    answerer: DecoderAnswers, asked: Conversation, quiet: bool, samples: int = 1
) -> Conversation:
    """Print an answer while it is generated, or several once all are complete.

    Ctrl-C keeps the parts generated so far. Returns the conversation with the first answer.
    """
    rows: list[list[int]] = [[] for _ in range(samples)]
    with _measured(answerer, quiet):
        rounds = answerer.stream(asked, samples)
        first, *others = (
            AnswerText(sys.stdout, answerer.target.tokenizer, answerer.until_stop) for _ in rows
        )
        try:
            for committed in rounds:
                for row, tokens in zip(rows, committed, strict=True):
                    row += tokens
                if not others:
                    first.put(committed[0])
        except KeyboardInterrupt as stop:
            if not sys.stdin.isatty():
                raise
            _go_on_after(stop)
        finally:
            if not others:
                first.end()
            elif any(rows):
                print_samples([first, *others], rows)
    return asked.answered(answerer.message(rows[0]))


def _go_on_after(stop: KeyboardInterrupt) -> None:
    """Answer a Ctrl-C by going on with the conversation; SIGTERM ends it."""
    if isinstance(stop, interruption.Terminated):
        raise stop
    interruption.answered()


def _answer_file(
    answerer: DecoderAnswers,
    asked: Sequence[Conversation],
    out: Path | None,
    size: int,
    samples: int,
    quiet: bool,
) -> None:
    """Answer batches of ``size`` prompts, each ``samples`` times, and write each when it is done.

    Raises Interrupted on Ctrl-C if a file with the first answers remains (see `opened`).
    """
    from kdcore.data.responses.file import json_lines
    from kdcore_cli.terminal.progress import progress_on

    for conversation in asked:  # finds mistakes before the first answer
        answerer.prompt(conversation)
    if samples > 1:
        asked = [
            replace(each, id=f"{each.id}#{number}")
            for each in asked
            for number in range(1, samples + 1)
        ]
        size *= samples
    with _measured(answerer, quiet), opened(out) as file:
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


@contextmanager
def _measured(answerer: DecoderAnswers, quiet: bool) -> Iterator[None]:
    """Print the number of tokens, the tokens per second and tau to stderr at the end."""
    from kdcore.decoding.loop import Counter

    counter = answerer.decoder.counter = Counter()
    began = time.perf_counter()
    yield
    speed = counter.emitted / (time.perf_counter() - began)
    if not quiet and counter.rounds:
        line = f"{counted(counter.emitted, 'token')}  {speed:.1f} tokens/s  tau {counter.tau:.2f}"
        if counter.undrafted and (answerer.decoder.account or counter.undrafted < counter.rounds):
            line += f"  no draft in {counter.undrafted} of {counted(counter.rounds, 'round')}"
        console.err().print(line, style="dim")
