"""A generator of random numbers that says where it is."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

PlainGenerator = torch.Generator


class DeviceGenerator(PlainGenerator):
    """A generator of the CPU that says it is where it was asked to be.

    torch hands a new object to each operation, so it is known by its address.
    """

    _places: ClassVar[dict[int, torch.device]] = {}

    def __new__(cls, device: Any = "cpu") -> DeviceGenerator:
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        place = torch.device(device)
        numbered = place.type != "cpu" and place.index is None
        self.place = torch.device(place.type, 0) if numbered else place
        self._places[self._cdata] = self.place

    @property
    def device(self) -> torch.device:
        return self.place

    @classmethod
    def place_of(cls, generator: torch.Generator) -> torch.device:
        return cls._places.get(generator._cdata, torch.device("cpu"))


def refuse_other_generator(func: Any, generator: torch.Generator | None, wanted: str) -> None:
    """Raises RuntimeError, as torch does, for a generator of another place than the result's."""
    if generator is None:
        return
    found = DeviceGenerator.place_of(generator).type
    if found != wanted:
        raise RuntimeError(
            f"Expected a '{wanted}' device type for generator but found '{found}' ({func})"
        )
