"""Weights that a config does not describe: which one, and by which of its fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def unlike(
    stored: Mapping[str, Sequence[int]],
    made: Mapping[str, Sequence[int]],
    config: Mapping[str, Any],
    file: str = "config.json",
) -> str | None:
    """The first weight whose shape a config does not make.

    Args:
        stored: Name -> shape of the weights in a file.
        made: Name -> shape of the weights that the config makes.
        config: The config as plain data.
        file: Name of the config's file in the message.

    Returns:
        The weight, both shapes, and the field with the size that the weights do not have, where one
        has it; None if the shapes of all weights that are in both agree.
    """
    for name in stored:
        found, wanted = list(stored[name]), list(made.get(name, stored[name]))
        if found != wanted:
            pairs = zip(found, wanted, strict=False)
            belied = {size for own, size in pairs if own != size}
            fields = [f"{field}: {size}" for field, size in _sizes(config) if size in belied]
            by = f" by {' or '.join(fields)}" if fields else ""
            return f"{name} has the shape {found}, and {file} makes it {wanted}{by}"
    return None


def _sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The fields, dotted, that may be sizes: integers that are no ids of tokens."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", size) for inner, size in _sizes(value))
        elif isinstance(value, int) and not isinstance(value, bool) and not name.endswith("_id"):
            yield name, value
