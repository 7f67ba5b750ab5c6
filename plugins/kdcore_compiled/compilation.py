"""Functions through torch.compile, at shapes that recur."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as limits
from torch._dynamo.exc import TorchDynamoException

from kdcore import UserError
from kdcore.errors import first_line
from kdcore_compiled.plugin import CompiledParams

SHAPES = 128
"""Number of shapes that may be compiled for one function; torch's own limit is 8."""


class Compilation:
    """A function that is compiled once for each shape; on CUDA, it runs as CUDA graphs.

    Args:
        function: A function whose results are tensors by name.
        name: What it runs, for messages.
        params: The mode.
        device: Device of the tensors.
    """

    def __init__(
        self,
        function: Callable[..., dict[str, Tensor]],
        name: str,
        params: CompiledParams,
        device: torch.device,
    ) -> None:
        self.name = name
        cuda = device.type == "cuda"
        mode = params.mode or ("reduce-overhead" if cuda else "default")
        self._graphs = cuda and mode != "default"
        self._compiled = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    def __call__(self, *given: Any) -> dict[str, Tensor]:
        """Run the function.

        Args:
            *given: Its arguments.

        Returns:
            Its results.

        Raises:
            UserError: torch cannot compile it.
        """
        try:
            with limits.patch(recompile_limit=SHAPES):
                if self._graphs:
                    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                found = self._compiled(*given)
        except TorchDynamoException as unsuited:
            raise UserError(
                f"torch cannot compile {self.name}: {first_line(unsuited)}",
                "set the engine to torch",
            ) from unsuited
        if self._graphs:  # the next replay writes into the same tensors
            return {name: each.clone() for name, each in found.items()}
        return found
