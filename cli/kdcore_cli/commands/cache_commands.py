"""Commands about teacher caches, and about what kdcore keeps on this machine."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcore.components import registry
from kdcore.errors import UserError, counted, inside
from kdcore_cli.options import AsJson, On, Quiet, Sets, SpecFile, Verbose, share_of
from kdcore_cli.terminal import console
from kdcore_cli.terminal.quiet_libraries import quieten

if TYPE_CHECKING:
    from kdcore.data.caches.teacher_cache import TeacherCache
    from kdcore.specs.distill import DistillSpec
    from kdcore.specs.parts.endpoint import EndpointSpec

app = typer.Typer(
    help="Store the teacher's logits; clear what is kept on disk.",
    no_args_is_help=True,
)

Cache = Annotated[str, typer.Argument(metavar="DIR", help="Cache folder, or its URL.")]

CACHE = "data.teacher_cache"
"""Field of a distill spec that names the cache."""


@app.command()
def build(
    spec: SpecFile,
    sets: Sets = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Cache folder, or its URL (default: data.teacher_cache of the spec).",
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", help="Number of classes stored for each position.")] = 32,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint",
            metavar="URL",
            help="OpenAI-compatible endpoint that returns the log-probs of prompt tokens; it "
            "replaces the spec's teacher.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="Name of the teacher at the endpoint."),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", metavar="VARIABLE", help="Environment variable that holds the endpoint's key."
        ),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            "--share",
            metavar="N/M",
            help="Add share N of M of the rows; `kdcore cache merge` joins the shares.",
        ),
    ] = None,
    on: On = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Run the teacher over the rows of a spec and store its logits.

    The cache stores the teacher's k most likely classes at each position. The teacher is the
    spec's, or the model behind --endpoint if the spec has none. For a comparison, the command
    reads the base spec. Rerun an interrupted build to continue it at the next shard; rerun a
    finished build after the data set has grown to add the new rows.

    For example:

    kdcore cache build spec.yaml --out cache

    kdcore cache build spec.yaml --out cache --on ray
    """
    from kdcore.jobs.caches.build import build_cache
    from kdcore.specs.parts.fields import folder_or_url
    from kdcore.specs.reading.file import placing
    from kdcore_cli.terminal.progress import progress_on

    asked, is_base = _with_rows(spec, sets)
    field = f"base.{CACHE}" if is_base else CACHE
    folder = folder_or_url(out) if out else asked.data.teacher_cache
    if folder is None:
        raise UserError("the cache folder is not set", f"add --out DIR, or set {field}")
    quieten(quiet, verbose)
    with placing(spec, sets or []), inside("base") if is_base else nullcontext():
        cache = build_cache(
            asked,
            folder,
            endpoint=_endpoint(endpoint, model, key),
            k=k,
            share=share_of(share) or (1, 1),
            progress=progress_on(console.err(), quiet),
            on=on,
        )
    _show(cache, as_json)
    if not as_json and asked.data.teacher_cache is None:
        place = folder if isinstance(folder, str) else folder.resolve()
        console.tell(f"to use the cache: --set {field}={place}")


@app.command()
def merge(
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder of the merged cache, or its URL.")
    ],
    caches: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Cache folders, or their URLs.")
    ],
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Add the rows of caches to the cache OUT.

    Several machines build a share each (kdcore cache build --share): to one URL, which then has
    all rows, or each in a folder of its own, to be merged. The caches must have one origin; they
    stay as they are. Rerun an interrupted merge to continue it.

    For example:

    kdcore cache merge cache part-1 part-2
    """
    from kdcore.jobs.caches.merge import merge_caches
    from kdcore.specs.parts.fields import folder_or_url
    from kdcore_cli.terminal.progress import progress_on

    sources = [folder_or_url(each) for each in caches]
    cache = merge_caches(folder_or_url(out), sources, progress=progress_on(console.err(), quiet))
    _show(cache, as_json)


@app.command()
def inspect(folder: Cache, as_json: AsJson = False) -> None:
    """Show the contents of a cache and the inputs of its build.

    For example:

    kdcore cache inspect cache --json
    """
    from kdcore.data.caches.teacher_cache import TeacherCache
    from kdcore.specs.parts.fields import folder_or_url

    _show(TeacherCache(folder_or_url(folder)), as_json)


@app.command()
def validate(
    folder: Cache,
    spec: SpecFile,
    sets: Sets = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check that a cache is complete and matches a spec.

    For example:

    kdcore cache validate cache spec.yaml
    """
    from kdcore.jobs.caches.build import validate_cache
    from kdcore.specs.parts.fields import folder_or_url
    from kdcore.specs.reading.file import placing
    from kdcore_cli.terminal.progress import progress_on

    asked, is_base = _with_rows(spec, sets)
    if is_base:
        raise UserError(
            f"{spec} is a comparison, and its arms require different caches",
            "name the spec of one arm: cells/ARM/seed-N/spec.yaml in the comparison's run folder",
        )
    quieten(quiet, verbose)
    with placing(spec, sets or []):
        validate_cache(folder_or_url(folder), asked, progress=progress_on(console.err(), quiet))
    console.tell(f"{folder} matches {spec}")


@app.command()
def local(
    folder: Annotated[
        str | None, typer.Argument(metavar="FOLDER", help="One of the folders (default: all).")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove what no process uses.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what kdcore keeps on this machine, or remove it.

    kdcore computes or fetches it once, and again after it is removed: encoded rows (rows), copies
    of remote caches (shards), converted models (gguf, openvino), digests of files (sha256). It is
    in KDCORE_CACHE (default: ~/.cache/kdcore).

    For example:

    kdcore cache local

    kdcore cache local shards --clear
    """
    from kdcore.models.folder.kept_files import KINDS, cache_folder, entries
    from kdcore.runs.costs import in_bytes
    from kdcore_cli.terminal.tables import table

    if folder is not None and folder not in KINDS:
        raise UserError(
            f"kdcore does not keep a folder {folder} in {cache_folder()}",
            f"name one of these: {', '.join(KINDS)}",
        )
    kinds = [folder] if folder else [each for each in KINDS if (cache_folder() / each).is_dir()]
    found = {kind: entries(kind) for kind in kinds}
    every = [(kind, entry) for kind, of_kind in found.items() for entry in of_kind]
    if clear:
        removed = [entry for _, entry in every if entry.remove()]
        freed, left = sum(each.bytes for each in removed), len(every) - len(removed)
        used = f"; {left} in use" if left else ""
        told = counted(len(removed), "entry", "entries")
        console.tell(f"removed {told}, {in_bytes(freed)}{used}")
        return
    if as_json:
        console.print_json(
            [
                {"folder": kind, "name": e.path.name, "bytes": e.bytes, "used": e.used}
                for kind, e in every
            ]
        )
        return
    shown = table("folder" if folder is None else "name", "size", "last used")
    for kind, of_kind in found.items():
        if folder is None:
            size, last = sum(e.bytes for e in of_kind), max((e.used for e in of_kind), default=0)
            shown.add_row(kind, in_bytes(size), _minute(last))
        else:
            for each in of_kind:
                shown.add_row(each.path.name, in_bytes(each.bytes), _minute(each.used))
    console.out().print(shown)
    total, place = in_bytes(sum(e.bytes for _, e in every)), cache_folder() / (folder or "")
    console.tell(f"{counted(len(every), 'entry', 'entries')} in {place}, {total}")


def _minute(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M") if seconds else ""


def _endpoint(url: str | None, model: str | None, key: str | None) -> EndpointSpec | None:
    from kdcore.specs.parts.endpoint import EndpointSpec
    from kdcore_cli.commands.decoding_options import checked

    if url is None and model is None and key is None:
        return None
    if url is None or model is None:
        raise UserError(
            "an endpoint requires both --endpoint and --model", "add the missing option"
        )
    said = {"endpoint": url, "model": model, "key": key}
    return checked(EndpointSpec, said, registry.installed())


def _with_rows(file: Path, sets: list[str] | None) -> tuple[DistillSpec, bool]:
    """Read a distill spec; the second value is True for the base of a comparison."""
    from kdcore.specs.compare import CompareSpec
    from kdcore.specs.distill import DistillSpec
    from kdcore.specs.reading.file import read_spec

    found = registry.installed()
    read = read_spec(file, sets or [], registry=found)
    asked, is_base = (read.base, True) if isinstance(read, CompareSpec) else (read, False)
    if not isinstance(asked, DistillSpec):
        raise UserError(f"{file} is not a distill spec", "write job: distill in it")
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
    from kdcore_cli.terminal.tables import table

    if as_json:
        console.print_json(_facts(cache))
        return
    shown = table("", "", show_header=False)
    for name, value in _facts(cache).items():
        if value is not None:
            shown.add_row(name, f"{value:.1f}" if isinstance(value, float) else str(value))
    console.out().print(shown)
