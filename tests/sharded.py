"""Lets accelerate shard a model over CPU processes, as it otherwise does over devices only."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType


def allow_on_the_cpu() -> None:
    """From now on this process counts as one device of several."""
    begun = PartialState.__init__

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        begun(self, *args, **kwargs)
        self._shared_state["distributed_type"] = DistributedType.MULTI_NEURON
        self.distributed_type = DistributedType.MULTI_NEURON

    PartialState.__init__ = begin  # type: ignore[method-assign]
