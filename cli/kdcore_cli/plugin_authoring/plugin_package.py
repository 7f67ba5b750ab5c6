"""Starter package of a plugin, rendered from `plugin_templates`."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from kdcore import __version__
from kdcore.components.hookspecs import GROUP
from kdcore.components.registry import Registry
from kdcore.errors import UserError, nearest, with_article
from kdcore.runs.whole_files import new_folder, unwritable

TEMPLATES = Path(__file__).parent / "plugin_templates"


@dataclass(frozen=True, slots=True)
class Example:
    """Method of a template, and its one parameter.

    Attributes:
        summary: One-line description of the method.
        field: Name of the parameter.
        type: Python type of the parameter.
        default: Default value as Python source.
        bounds: Bounds as keyword arguments of pydantic's ``Field``.
        meaning: Description of the parameter.
    """

    summary: str
    field: str
    type: str
    default: str
    bounds: str
    meaning: str


EXAMPLES = {
    "gate": Example(
        "keeps the positions where the teacher's probability of the label is high",
        *("least", "float", "0.1", "ge=0, le=1", "minimum probability of a kept label"),
    ),
    "divergence": Example(
        "sum of the differences of probability, each raised to a power",
        *("power", "float", "2.0", "gt=1", "exponent of each difference"),
    ),
    "splitter": Example(
        "separates the positions where the teacher is confident from the others",
        *("least", "float", "0.5", "ge=0, le=1", "minimum top-class probability"),
    ),
    "advantage": Example(
        "sum of the later log-ratios of teacher and student",
        *("most", "float", "5.0", "gt=0", "maximum size of a token's reward"),
    ),
    "matcher": Example(
        "distance of the last hidden states, through a learned projection",
        *("power", "float", "2.0", "gt=1", "exponent of each difference"),
    ),
    "momentum": Example(
        "one heavy-ball momentum for all terms",
        *("momentum", "float", "0.9", "ge=0, lt=1", "momentum coefficient"),
    ),
    "drafter": Example(
        "copies the tokens that followed the last occurrence of the newest token",
        *("length", "int", "4", "ge=1", "maximum number of copied tokens"),
    ),
    "verifier": Example(
        "accepts tokens that are likely under the target; NOT lossless",
        *("least", "float", "0.3", "gt=0, le=1", "minimum probability of kept tokens"),
    ),
    "engine": Example(
        "runs all tokens again in each pass, without a cache; SLOW",
        *("most", "int", "4096", "ge=1", "maximum number of tokens of a pass"),
    ),
    "score": Example(
        "share of the words of the reference that the answer contains",
        *("shortest", "int", "1", "ge=1", "minimum length of a word"),
    ),
}


def write_package(name: str, kind: str, folder: Path, registry: Registry) -> list[Path]:
    """Write a complete package into a new folder.

    Args:
        name: Name of the package, as pip installs it.
        kind: Kind of component.
        folder: New folder to write.
        registry: Known components.

    Returns:
        The written files, sorted.

    Raises:
        UserError: The kind has no template, the name is invalid or already exists, or the folder
            exists or cannot be created. Nothing is written then.
    """
    if kind not in EXAMPLES:
        raise UserError(f"kind '{kind}' does not have a template", nearest(kind, EXAMPLES))
    package = name.replace("-", "_")
    _check(name, package, kind, registry)
    facts = {
        "name": name,
        "package": package,
        "component": package,
        "title": "".join(word.capitalize() for word in package.split("_")),
        "kind": kind,
        "a_kind": with_article(kind),
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
        source / f"{kind}.py": f"kinds/{kind}/method.py.j2",
        Path("tests") / f"test_{package}.py": f"kinds/{kind}/test.py.j2",
    }
    rendered = {path: _rendered(template, facts) for path, template in files.items()}
    rendered[source / "py.typed"] = ""
    if os.path.lexists(folder):
        raise UserError(f"{folder} already exists", "name another folder with --out")
    try:
        with new_folder(folder) as place:
            for path, text in rendered.items():
                (place / path).parent.mkdir(parents=True, exist_ok=True)
                (place / path).write_text(text, "utf-8")
    except OSError as fault:
        raise unwritable(folder, fault, "name a writable folder with --out") from None
    return sorted(folder / path for path in rendered)


def _check(name: str, package: str, kind: str, registry: Registry) -> None:
    cure = "choose another name"
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 30:
        form = "lowercase letters, digits and single hyphens; start with a letter"
        raise UserError(f"invalid package name '{name}'", f"use at most 30 {form}")
    if keyword.iskeyword(package) or importlib.util.find_spec(package):
        raise UserError(f"'{package}' is already a Python keyword or module", cure)
    if package in registry.names(kind):
        plugin = registry.plugin_of(kind, package)
        raise UserError(f"{kind} '{package}' already exists in {plugin.distribution}", cure)


def _rendered(template: str, facts: dict[str, str]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # not when the program starts

    made = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True
    )
    return made.get_template(template).render(facts)
