"""Commands ``export`` and ``import``: models and drafters in other formats, and back."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from kdcore.components import registry
from kdcore.components.registry import Registry
from kdcore.errors import UserError, nearest
from kdcore_cli.options import Quiet, Verbose
from kdcore_cli.terminal import console
from kdcore_cli.terminal.quiet_libraries import quieten

Output = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New folder to write.")]


def export(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="Run folder, folder of a trained drafter, or model (hub id, folder or .gguf "
            "file).",
        ),
    ],
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="Of a drafter: sglang or vllm. Of a model: transformers (weights in full), "
            "torchao-int8 or bitsandbytes-nf4.",
        ),
    ],
    output: Output,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Target of the drafter: hub id, folder or .gguf file (default: the one that the "
            "drafter was trained for).",
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Peft adapter to merge into the model first."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Dtype of the weights that are not quantised (default: float32)."),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export a drafter for another engine, or a copy of a model.

    For example:

    kdcore export runs/drafter/drafter --format vllm --out for-vllm

    kdcore export runs/first --format torchao-int8 --out runs/first-int8

    kdcore export some/model --adapter runs/lora/adapter --format transformers --out merged
    """
    found = registry.installed()
    console.warn_of_problems(found)
    quieten(quiet, verbose)
    from kdcore.models.publishing.formats import FORMATS
    from kdcore.runs.whole_files import refuse_existing

    refuse_existing(output)  # before anything is loaded
    folder = result_folder(what)
    if not _is_drafter(Path(folder)):
        if layout not in FORMATS:
            raise UserError(
                f"{folder} does not contain a drafter, and '{layout}' is not a format of models",
                nearest(layout, FORMATS),
            )
        refuse_options("a model", target=target)
        _export_model(folder, layout, output, adapter, dtype)
        again = ["kdcore", "evaluate", str(output), "--data", "FILE"]
        if folder != what:  # a run, which knows its held-out rows
            again = ["kdcore", "evaluate", what, "--set", f"model.model={output}"]
        console.tell(f"measure it again: {shlex.join([*again, '--teacher', folder])}")
    elif layout in FORMATS:
        raise UserError(
            f"{folder} contains a drafter, and '{layout}' is a format of models",
            "use --format vllm or --format sglang",
        )
    else:
        refuse_options("a drafter", adapter=adapter, dtype=dtype)
        _export_drafter(Path(folder), layout, output, target, found)


def refuse_options(exported: str, **options: str | None) -> None:
    """Raises UserError when an option is given that has no effect on what is exported."""
    for name, value in options.items():
        if value is not None:
            raise UserError(f"--{name} has no effect on the export of {exported}", "remove it")


def _is_drafter(folder: Path) -> bool:
    """Whether the config of a folder is that of a drafter, which may be damaged otherwise."""
    from kdcore.decoding.drafters.files import CONFIG

    try:
        return '"kdcore_drafter"' in (folder / CONFIG).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def result_folder(what: str) -> str:
    """The model or the drafter of a run folder; anything else as it is."""
    for name in ("model", "drafter"):
        if (Path(what) / "run.json").is_file() and (Path(what) / name).is_dir():
            return str(Path(what) / name)
    return what


def _export_model(
    model: str, layout: str, output: Path, adapter: str | None, dtype: str | None
) -> None:
    from kdcore.models.publishing.formats import export_model
    from kdcore.runs.costs import in_bytes
    from kdcore.specs.parts.fields import ModelSpec

    given = {"model": model, "adapter": adapter, "dtype": dtype}
    asked = {name: value for name, value in given.items() if value is not None}
    before, after = export_model(ModelSpec.model_validate(asked), layout, output)
    console.tell(f"{layout}: {output} ({in_bytes(after)} of weights, {in_bytes(before)} before)")


def _export_drafter(
    drafter: Path, layout: str, output: Path, target: str | None, found: Registry
) -> None:
    from kdcore.decoding.drafters import exchange as drafter_exchange
    from kdcore.decoding.drafters.files import read_config
    from kdcore.models.loading.load import load_model
    from kdcore.specs.parts.fields import ModelSpec

    trained_for = read_config(drafter)["target"]["name"]
    loaded = load_model(ModelSpec.model_validate({"model": target or trained_for}))
    command = drafter_exchange.export_drafter(drafter, layout, output, loaded, found)
    console.tell(f"drafter for {layout}: {output}")
    console.tell(f"serve it with: {command}")


def push(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="Run folder, or a folder with weights and a README.md, e.g. RUN/adapter.",
        ),
    ],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository; a new one is created.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public (default: private).")
    ] = False,
    message: Annotated[
        str, typer.Option("--message", "-m", metavar="TEXT", help="Message of the commit.")
    ] = "",
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Upload a student, an adapter or a drafter to the hub.

    For example:

    kdcore push runs/first me/my-student
    """
    quieten(quiet, verbose)
    from kdcore.models.publishing.upload import upload

    address = upload(Path(result_folder(what)), repo, public=public, message=message)
    console.tell(f"uploaded to {address}")


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
    from kdcore.models.loading.load import load_model
    from kdcore.runs.whole_files import refuse_existing
    from kdcore.specs.parts.fields import ModelSpec

    refuse_existing(output)  # before the target is loaded
    loaded = load_model(ModelSpec.model_validate({"model": target}))
    choice, notes = drafter_exchange.import_drafter(folder, output, loaded, found)
    console.tell(f"drafter {choice.name}: {output}")
    for note in notes:
        console.tell(f"note: {note}")
