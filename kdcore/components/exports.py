"""Names that a package exports without importing the modules that define them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def on_access(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return a ``__getattr__`` and a ``__dir__`` that import each name on first access.

    A package whose modules import torch stays fast to import this way (PEP 562).

    Args:
        package: The package's ``__name__``.
        modules: Module -> the names exported from it, separated by spaces. A module that begins
            with a dot is relative to the package.
    """
    module_of = {name: module for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        found = getattr(import_module(module_of[name], package), name)
        setattr(sys.modules[package], name, found)  # the next access is a plain one
        return found

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return get, names
