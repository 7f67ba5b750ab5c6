"""Commands ``export`` and ``import``: convert drafters to and from other engines' formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdcore.components import registry
from kdcore_cli.options import Quiet, Verbose
from kdcore_cli.terminal import console
from kdcore_cli.terminal.quiet_libraries import quieten

Output = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New folder to write.")]


def export_drafter(
    drafter: Annotated[
        Path, typer.Argument(metavar="DRAFTER", help="Folder of a trained drafter.")
    ],
    layout: Annotated[
        str, typer.Option("--format", metavar="NAME", help="Format to write: sglang or vllm.")
    ],
    output: Output,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Target model: hub id, folder or .gguf file (default: the one that the drafter "
            "was trained for).",
        ),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export a trained drafter to the format of another engine.

    For example:

    kdcore export runs/drafter/drafter --format vllm --out for-vllm
    """
    found = registry.installed()
    console.warn_of_problems(found)
    quieten(quiet, verbose)
    from kdcore.decoding.drafters import exchange as drafter_exchange
    from kdcore.decoding.drafters.files import read_config
    from kdcore.models.loading import load_model
    from kdcore.specs.fields import ModelSpec

    trained_for = read_config(drafter)["target"]["name"]
    drafter_exchange.refuse_existing(output)  # before the target is loaded
    loaded = load_model(ModelSpec.model_validate({"model": target or trained_for}))
    command = drafter_exchange.export_drafter(drafter, layout, output, loaded, found)
    console.tell(f"drafter for {layout}: {output}")
    console.tell(f"serve it with: {command}")


def import_drafter(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="Folder of a published drafter: config and safetensors."
        ),
    ],
    target: Annotated[
        str, typer.Option(metavar="MODEL", help="Target model: hub id, folder or .gguf file.")
    ],
    output: Output,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Import a drafter that was published for another engine.

    For example:

    kdcore import eagle3-folder --target MODEL --out drafters/eagle3
    """
    found = registry.installed()
    console.warn_of_problems(found)
    quieten(quiet, verbose)
    from kdcore.decoding.drafters import exchange as drafter_exchange
    from kdcore.models.loading import load_model
    from kdcore.specs.fields import ModelSpec

    drafter_exchange.refuse_existing(output)  # before the target is loaded
    loaded = load_model(ModelSpec.model_validate({"model": target}))
    choice, notes = drafter_exchange.import_drafter(folder, output, loaded, found)
    console.tell(f"drafter {choice.name}: {output}")
    for note in notes:
        console.tell(f"note: {note}")
