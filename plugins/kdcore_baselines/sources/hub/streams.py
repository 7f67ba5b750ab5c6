"""Rows of the hub that training reads while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from functools import cached_property
from typing import Any

from kdcore_baselines.sources.components import LoadedParams
from kdcore_baselines.sources.hub.loading import load, name_of, readable

BATCH = 256
"""Number of rows of a stream that are read at a time."""


class SplitStream:
    """The examples of a streamed split; see `kdcore.data.source.ExampleStream`.

    A state has the number of the rows before a batch of the data, the state of the data there, and
    how many rows of the batch were given.

    Args:
        params: The split.
        example: Makes an example of the fields of a row, and of its place in messages.
        prepared: Prepares the loaded split, before a row is read.
    """

    def __init__(
        self,
        params: LoadedParams,
        example: Callable[[dict[str, Any], str], Any],
        prepared: Callable[[Any], Any] = lambda data: data,
    ) -> None:
        self._params, self.window = params, params.shuffle_buffer
        self._example, self._prepared, self._given = example, prepared, 0

    @cached_property
    def _data(self) -> Any:
        return self._prepared(load(self._params))

    @cached_property
    def _batch(self) -> dict[str, Any]:
        return {"rows": 0, "data": self._data.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        return deepcopy({**self._batch, "given": self._given})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._data.load_state_dict(deepcopy(state["data"]))
        self._batch = {"rows": state["rows"], "data": state["data"]}
        self._given = state["given"]

    def __iter__(self) -> Iterator[Any]:
        name, skipped = name_of(self._params), self._given
        # not its own iteration, which gives a worker of a torch loader only a part of the rows
        batches = readable(self._data.iter(BATCH), self._params)
        for batch in batches:
            columns = [*batch.values()]
            rows = [dict(zip(batch, each, strict=True)) for each in zip(*columns, strict=True)]
            before = self._batch["rows"]
            for place, row in enumerate(rows[skipped:], start=skipped):
                self._given = place + 1
                yield self._example(row, f"{name}:{before + place + 1}")
            self._batch = {"rows": before + len(rows), "data": self._data.state_dict()}
            self._given = skipped = 0
