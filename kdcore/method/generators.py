"""The random generators of a training, each seeded by its place in the run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


def generator_at(device: torch.device | str, *place: str | int) -> torch.Generator:
    """A generator seeded from a place in a training, so that a resumed one needs no state.

    Args:
        device: The device of the tensors that are drawn.
        *place: The seed of the training, the optimizer step, and what it is for.
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def one_generator_each(
    gates: Iterable[str], generator: torch.Generator, device: torch.device
) -> dict[str, torch.Generator]:
    """Create a generator for each gate: gates that shared one would interleave by chunks.

    Args:
        gates: Their labels.
        generator: Source of the seeds, on the CPU: the host would wait for those of another device.
        device: Device of the logits.

    Returns:
        Label -> generator on the device.
    """
    labels = list(gates)
    drawn = torch.randint(torch.iinfo(torch.int64).max, (len(labels),), generator=generator)
    return {
        label: torch.Generator(device).manual_seed(seed)
        for label, seed in zip(labels, drawn.tolist(), strict=True)
    }


def drawing_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """The generator itself on the CPU, or one that it seeds on another device."""
    if device.type == "cpu":
        return generator
    return one_generator_each([""], generator, device)[""]
