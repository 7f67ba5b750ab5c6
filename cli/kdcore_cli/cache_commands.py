"""``cache build``, ``cache inspect`` and ``cache validate``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcore.errors import UserError
from kdcore.method import registry
from kdcore_cli import console
from kdcore_cli.options import AsJson, Quiet, Sets, SpecFile, Verbose
from kdcore_cli.quiet_libraries import quieten

if TYPE_CHECKING:
    from kdcore.data.teacher_cache import TeacherCache
    from kdcore.specs.distill import DistillSpec
    from kdcore.specs.generate_data import EndpointSpec

app = typer.Typer(
    help="The teacher's logits on disk, in place of the teacher.", no_args_is_help=True
)

Cache = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the cache.")]

CACHE = "data.teacher_cache"
"""The field of a distill spec."""


@app.command()
def build(
    spec: SpecFile,
    sets: Sets = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="The cache's folder; by default data.teacher_cache."
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", help="Classes kept at each position.")] = 32,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint",
            metavar="URL",
            help="Ask an OpenAI-compatible endpoint, which echoes the log-probs of given tokens.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="The teacher's name there.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="VARIABLE", help="Environment variable with its key."),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Run the teacher over the rows of a spec, and keep what it says.

    Of each position the best classes are kept. The teacher is the spec's, or one behind an
    endpoint if the spec names none. Of a comparison its base is the spec. A build that was killed
    goes on at the next shard; one of a longer data set adds what is new.

    For example:

    kdcore cache build spec.yaml --out cache
    """
    from kdcore.jobs.build_cache import build_cache
    from kdcore_cli.progress import progress_on

    asked, is_base = _with_rows(spec, sets)
    field = f"base.{CACHE}" if is_base else CACHE
    folder = out or asked.data.teacher_cache
    if folder is None:
        raise UserError("nothing says where the cache shall be", f"add --out DIR, or set {field}")
    quieten(quiet, verbose)
    cache = build_cache(
        asked,
        folder,
        endpoint=_endpoint(endpoint, model, key),
        k=k,
        progress=progress_on(console.err(), quiet),
    )
    _show(cache, as_json)
    if not as_json and asked.data.teacher_cache is None:
        console.tell(f"use it: --set {field}={folder.resolve()}")


@app.command()
def inspect(folder: Cache, as_json: AsJson = False) -> None:
    """Say what a cache holds and what it was made from.

    For example:

    kdcore cache inspect cache --json
    """
    from kdcore.data.teacher_cache import TeacherCache

    _show(TeacherCache(folder), as_json)


@app.command()
def validate(
    folder: Cache,
    spec: SpecFile,
    sets: Sets = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check that a cache is whole and fits a spec.

    For example:

    kdcore cache validate cache spec.yaml
    """
    from kdcore.jobs.build_cache import validate_cache
    from kdcore_cli.progress import progress_on

    asked, is_base = _with_rows(spec, sets)
    if is_base:
        raise UserError(
            f"{spec} is a comparison, whose arms ask different things of a cache",
            "give the spec of an arm: cells/ARM/seed-N/spec.yaml in the comparison's run folder",
        )
    quieten(quiet, verbose)
    validate_cache(folder, asked, progress=progress_on(console.err(), quiet))
    console.tell(f"{folder} fits {spec}")


def _endpoint(url: str | None, model: str | None, key: str | None) -> EndpointSpec | None:
    from kdcore.specs.generate_data import EndpointSpec
    from kdcore_cli.decoding_options import checked

    if url is None and model is None and key is None:
        return None
    if url is None or model is None:
        raise UserError(
            "an endpoint has a URL and a model's name there", "give both: --endpoint and --model"
        )
    said = {"endpoint": url, "model": model, "key": key}
    return checked(EndpointSpec, said, registry.installed())


def _with_rows(file: Path, sets: list[str] | None) -> tuple[DistillSpec, bool]:
    """A distill spec, and whether it is the base of a comparison."""
    from kdcore.specs.compare import CompareSpec
    from kdcore.specs.distill import DistillSpec
    from kdcore.specs.reading.file import read_spec

    found = registry.installed()
    read = read_spec(file, sets or [], registry=found)
    asked, is_base = (read.base, True) if isinstance(read, CompareSpec) else (read, False)
    if not isinstance(asked, DistillSpec):
        raise UserError(f"{file} is no distill spec", "write job: distill in it")
    console.warn_of_problems(found)
    return asked, is_base


def _facts(cache: TeacherCache) -> dict[str, Any]:
    return dataclasses.asdict(cache.manifest) | {
        "rows": cache.rows,
        "positions": cache.positions,
        "bytes": cache.size,
        "bytes_per_position": cache.size / max(1, cache.positions),
    }


def _show(cache: TeacherCache, as_json: bool) -> None:
    from kdcore_cli.tables import table

    if as_json:
        console.print_json(_facts(cache))
        return
    shown = table("", "", show_header=False)
    for name, value in _facts(cache).items():
        shown.add_row(name, f"{value:.1f}" if isinstance(value, float) else str(value))
    console.out().print(shown)
