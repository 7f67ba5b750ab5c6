"""Packages that kdcore does not require: how they are imported, and the message without them."""

from __future__ import annotations

import importlib
import traceback
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from types import ModuleType

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from kdcore.errors import UserError, first_line

_IMPORTING = {"", "torch", "transformers", "importlib", "_frozen_importlib", "kdcore"}
"""Packages that import others."""


def optional_package(
    module: str, install: str, user: str, *, package: str = "", instead: str = ""
) -> ModuleType:
    """Import a package that an extra installs.

    Args:
        module: The module, e.g. ``lm_eval.evaluator``.
        install: What pip installs it by, e.g. ``kdcore[lm-eval]``, or the package's own name.
        user: What requires it, as the message names it, e.g. "the score math".
        package: Name of the package for pip (default: that of the module, with hyphens).
        instead: What the user can do without it, e.g. "use the engine torch".

    Returns:
        The module.

    Raises:
        UserError: The package is not installed, is older than the extra allows, or fails while it
            is imported.
    """
    root = module.partition(".")[0]
    package = package or root.replace("_", "-")
    cure = _installed_by(install, instead)
    with suppress(PackageNotFoundError):
        found, allowed = _versions(package, install)
        if not allowed.contains(found, prereleases=True):
            raise UserError(f"{user} requires {package} {allowed}, and {found} is installed", cure)
    try:
        importlib.import_module(root)
        return importlib.import_module(module)
    except (Exception, SystemExit) as fault:  # a package of another's may fail in any way
        if isinstance(fault, ModuleNotFoundError) and fault.name == root:
            raise missing_package(user, package, install, instead) from fault
        said = f"{type(fault).__name__}: {first_line(fault)}"
        raise UserError(
            f"{user} requires the package {package}, whose import fails: {said}",
            _installed_by(f"--force-reinstall {package}", instead),
        ) from fault


def missing_package(user: str, package: str, install: str = "", instead: str = "") -> UserError:
    """The message about a package that is not installed; see `optional_package`."""
    return UserError(
        f"{user} requires the package {package}, which is not installed",
        _installed_by(install or package, instead),
    )


def broken_package(fault: BaseException | None) -> UserError | None:
    """The message about a package that transformers finds installed, and that cannot be imported.

    transformers imports some packages wherever they are installed, and then says only which module
    of its own could not be imported.

    Args:
        fault: What an import raised.

    Returns:
        The message; None if the fault is another one.
    """
    while fault is not None and not str(fault).startswith("Could not import module"):
        fault = fault.__cause__ or fault.__context__
    while fault is not None and isinstance(fault, ImportError) and fault.__cause__ is not None:
        fault = fault.__cause__
    if fault is None:
        return None
    frames = (frame for frame, _ in traceback.walk_tb(fault.__traceback__))
    roots = [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame in frames]
    found = next((each for each in reversed(roots) if each not in _IMPORTING), "a package")
    return UserError(
        f"transformers imports the package {found}, whose import fails: {type(fault).__name__}: "
        f"{first_line(fault)}",
        f"install a build of {found} for the installed torch, or run: pip uninstall {found}",
    )


def import_early(module: str) -> ModuleType | None:
    """Import a package at the import of what uses it, which processes that are forked then share.

    Args:
        module: The module.

    Returns:
        The module, or None without it; `optional_package` says why, once it is needed.
    """
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit):
        return None


def _installed_by(install: str, instead: str) -> str:
    quoted = f'"{install}"' if install.endswith("]") else install  # brackets mean much to a shell
    return f"run: pip install {quoted}" + (f", or {instead}" if instead else "")


@cache  # reading the metadata takes milliseconds, and some packages are asked for in each pass
def _versions(package: str, install: str) -> tuple[str, SpecifierSet]:
    """The installed version of a package, and those that an extra allows."""
    return version(package), _allowed(package, install)


def _allowed(package: str, install: str) -> SpecifierSet:
    """The versions of a package that an extra of an installed distribution allows."""
    asked = Requirement(install)
    extras = {canonicalize_name(extra) for extra in asked.extras}
    for text in (requires(asked.name) or []) if extras else []:
        each = Requirement(text)
        of_extra = each.marker and any(each.marker.evaluate({"extra": extra}) for extra in extras)
        if of_extra and canonicalize_name(each.name) == canonicalize_name(package):
            return each.specifier
    return SpecifierSet()
