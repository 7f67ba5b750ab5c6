"""The base class of a component's parameters. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Params(BaseModel):
    """What a spec may write beside a component's name: frozen, without unknown keys.

    A component's own params derive from it and describe each field. As it stands it is the params
    of a component that has none. Defaults are validated like what a user writes, so a field of
    another component's choice may default to a bare name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
