"""Command ``doctor``: find out why a target rejects a drafter's proposals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from kdcore.components import registry
from kdcore.errors import UserError, counted
from kdcore_cli.commands.decoding_options import (
    Adapter,
    Attention,
    Dtype,
    Engine,
    Quantization,
    Raw,
    Subfolder,
    TargetOptions,
    Template,
    TemplateArguments,
    engine_choice,
)
from kdcore_cli.options import AsJson, Device, Quiet, Verbose
from kdcore_cli.terminal import console
from kdcore_cli.terminal.quiet_libraries import quieten

PROMPTS = ("Explain why the sky is blue.", "Write a short story about a lighthouse.")
STYLE = {"fine": "green", "weak": "yellow", "wrong": "red"}


def doctor(
    drafter: Annotated[
        Path, typer.Argument(metavar="DRAFTER", help="Folder of a trained drafter.")
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET", help="Target model: hub id, folder or .gguf file, as in a spec."
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Prompt for the checks. May be given several times."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Maximum length of an answer in tokens.", min=1)
    ] = 64,
    dtype: Dtype = "float32",
    attention: Attention = None,
    quantization: Quantization = None,
    adapter: Adapter = None,
    subfolder: Subfolder = None,
    device: Device = None,
    engine: Engine = None,
    raw: Raw = False,
    template: Template = None,
    template_argument: TemplateArguments = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Find out why a target rejects a drafter's proposals.

    The command compares training with serving: the drafter reads the answers to the prompts in one
    pass, as in training, and token by token, as in serving. It compares layers, norms, shift,
    template and vocabulary. The exit code is 1 if a check finds an error.

    For example:

    kdcore doctor runs/drafter/drafter MODEL

    kdcore doctor runs/drafter/drafter MODEL --prompt "What is 3 times 12?"

    kdcore doctor runs/drafter/drafter MODEL --raw --prompt "Once upon a time"
    """
    found = registry.installed()
    console.warn_of_problems(found)
    quieten(quiet, verbose)
    from kdcore.data.conversation import Conversation, Message
    from kdcore.data.templates.mask import prompt_ids
    from kdcore.decoding.drafters.files import read_config
    from kdcore.evaluation.doctor import examine
    from kdcore_cli.terminal.tables import table

    chosen = engine_choice(engine, found)
    read_config(drafter)  # refuses a folder without a drafter before the target is loaded
    options = TargetOptions(
        model=target,
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
    loaded = options.load(found)
    asked = [
        prompt_ids(Conversation(f"prompt {n}", (Message("user", text),), raw), loaded.tokenizer)
        for n, text in enumerate(prompt or PROMPTS, start=1)
    ]
    for n, ids in enumerate(asked, start=1):
        if len(ids) < 2:  # a drafter reads each token with the features before it
            raise UserError(
                f"prompt {n} has {counted(len(ids), 'token')}; a drafter requires at least 2",
                "write a longer prompt (--prompt)",
            )
    note = None if quiet else lambda line: console.err().print(line, style="dim", markup=False)
    findings = examine(drafter, loaded, asked, found, max_new_tokens, chosen, note)
    if as_json:
        console.print_json([dataclasses.asdict(each) for each in findings])
    else:
        shown = table("check", "result", "finding")
        for each in findings:
            verdict = Text(each.verdict, STYLE[each.verdict])
            shown.add_row(each.check, verdict, Text(each.found, "bold"))
            shown.add_row("", "", each.words)
        console.out().print(shown)
    if any(each.verdict == "wrong" for each in findings):
        raise typer.Exit(1)
