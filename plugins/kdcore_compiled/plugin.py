"""Declaration of the compiled engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from kdcore import Component, Params, hookimpl


class CompiledParams(Params):
    """Parameters of the compiled engine."""

    tokens: int = Field(
        64,
        ge=1,
        le=4096,
        description="maximum number of tokens of a compiled pass; a longer one, such as that over "
        "a prompt, runs uncompiled",
    )
    mode: Literal["default", "reduce-overhead", "max-autotune"] | None = Field(
        None,
        description="mode of torch.compile (default: reduce-overhead, which uses CUDA graphs, on "
        "CUDA; elsewhere default)",
    )


@hookimpl
def kdcore_components() -> Iterable[Component]:
    """Declare the engine."""
    yield Component(
        kind="engine",
        name="compiled",
        build="kdcore_compiled.engine:CompiledEngine",
        summary="runs short passes through torch.compile, on CUDA as CUDA graphs",
        source="torch.compile (PyTorch), at shapes that recur",
        params=CompiledParams,
    )
