"""A plugin package to begin from: files rendered from `plugin_templates`."""

from __future__ import annotations

import importlib.util
import keyword
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from kdcore import __version__
from kdcore.errors import UserError, nearest
from kdcore.method.hookspecs import GROUP
from kdcore.method.registry import Registry

TEMPLATES = Path(__file__).parent / "plugin_templates"


@dataclass(frozen=True, slots=True)
class Example:
    """The method that a template holds, and its one parameter."""

    summary: str
    field: str
    type: str
    default: str
    bounds: str
    meaning: str


EXAMPLES = {
    "gate": Example(
        "keep the positions where the teacher gives the label a chance",
        *("least", "float", "0.1", "ge=0, le=1", "smallest probability of a kept label"),
    ),
    "divergence": Example(
        "the differences of the probabilities to a power",
        *("power", "float", "2.0", "gt=1", "how much a large difference outweighs small ones"),
    ),
    "splitter": Example(
        "tell the positions where the teacher is sure from the others",
        *("least", "float", "0.5", "ge=0, le=1", "smallest probability of a sure position"),
    ),
    "momentum": Example(
        "one heavy ball for all terms",
        *("momentum", "float", "0.9", "ge=0, lt=1", "share of the last update that is kept"),
    ),
    "drafter": Example(
        "copy what followed the newest token before",
        *("length", "int", "4", "ge=1", "tokens copied at most"),
    ),
    "verifier": Example(
        "keep what is likely enough for the target; NOT lossless",
        *("least", "float", "0.3", "gt=0, le=1", "smallest probability of a kept token"),
    ),
}


def write_package(name: str, kind: str, folder: Path, registry: Registry) -> list[Path]:
    """Write a whole package into a new folder; the files, in order.

    Raises UserError for a kind without a template, a name that pip, Python or a spec could not
    take or that is taken, and a folder that exists or cannot be made. Nothing is written then.
    """
    if kind not in EXAMPLES:
        cure = f"{nearest(kind, EXAMPLES)}; templates there are for {', '.join(EXAMPLES)}"
        raise UserError(f"there is no template for the kind '{kind}'", cure)
    package = name.replace("-", "_")
    _check(name, package, kind, registry)
    facts = {
        "name": name,
        "package": package,
        "component": package,
        "title": "".join(word.capitalize() for word in package.split("_")),
        "kind": kind,
        "kdcore": ".".join(__version__.split(".")[:2]),
        "group": GROUP,
        **asdict(EXAMPLES[kind]),
    }
    source = Path("src") / package
    files = {
        Path("pyproject.toml"): "pyproject.toml.j2",
        Path("README.md"): "README.md.j2",
        source / "__init__.py": "__init__.py.j2",
        source / "plugin.py": "plugin.py.j2",
        source / f"{kind}.py": f"{kind}/method.py.j2",
        Path("tests") / f"test_{package}.py": f"{kind}/test.py.j2",
    }
    rendered = {folder / path: _rendered(template, facts) for path, template in files.items()}
    rendered[folder / source / "py.typed"] = ""
    try:
        folder.mkdir(parents=True)
        for path, text in rendered.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    except FileExistsError:
        raise UserError(f"{folder} already exists", "name another folder with --out") from None
    except OSError as fault:
        cure = "name a folder that you may write to with --out"
        raise UserError(f"{folder} cannot be written: {fault.strerror}", cure) from None
    return sorted(rendered)


def _check(name: str, package: str, kind: str, registry: Registry) -> None:
    cure = "choose another name"
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 30:
        form = "small letters, digits and single hyphens, a letter first, at most 30 of them"
        raise UserError(f"'{name}' is no name for a package", f"write {form}")
    if keyword.iskeyword(package) or importlib.util.find_spec(package):
        raise UserError(f"'{package}' has a meaning to Python here already", cure)
    if package in registry.names(kind):
        plugin = registry.plugin_of(kind, package)
        raise UserError(f"{plugin.distribution} has a {kind} '{package}' already", cure)


def _rendered(template: str, facts: dict[str, str]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # not when the program starts

    made = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return made.get_template(template).render(facts)
