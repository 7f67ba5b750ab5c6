from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.device.mock_device import MockDevice


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
