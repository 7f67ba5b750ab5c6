from __future__ import annotations

from collections.abc import Iterator

import pytest

from kdcore.models.device import pins_memory, widest_float
from tests.device.mock_device import MockDevice


@pytest.fixture(autouse=True)
def nothing_is_known_of_a_device() -> Iterator[None]:
    """The mock device of one test has float64, that of another has not."""
    for known in (pins_memory, widest_float):
        known.cache_clear()
    yield
    for known in (pins_memory, widest_float):
        known.cache_clear()


@pytest.fixture
def device() -> Iterator[MockDevice]:
    """The test runs on a machine with an accelerator."""
    with MockDevice() as mode:
        yield mode


@pytest.fixture
def device_without_float64() -> Iterator[MockDevice]:
    """The test runs on a machine whose accelerator has no float64."""
    with MockDevice(float64=False) as mode:
        yield mode
