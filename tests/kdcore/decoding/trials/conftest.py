"""A clock in the place of the loop's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kdcore.models import device
from tests.tiny.timed_decoding import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=found.perf_counter))
    return found
