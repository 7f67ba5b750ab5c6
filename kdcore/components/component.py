"""Declaration of a component, and the base class of its parameters. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Kind = Literal[
    "gate",
    "splitter",
    "divergence",
    "advantage",
    "matcher",
    "momentum",
    "source",
    "drafter",
    "tree",
    "verifier",
    "engine",
    "baseline",
    "score",
]

PROTOCOLS: dict[str, tuple[str, ...]] = {
    "gate": ("kdcore.method.protocols:Gate", "kdcore.method.protocols:RankedGate"),
    "splitter": ("kdcore.method.protocols:KnowledgeSplitter",),
    "divergence": ("kdcore.method.protocols:Divergence",),
    "advantage": ("kdcore.method.protocols:Advantage",),
    "matcher": ("kdcore.method.protocols:Matcher",),
    "momentum": ("kdcore.method.protocols:MomentumPolicy",),
    "source": ("kdcore.data.source:DataSource",),
    "drafter": ("kdcore.decoding.protocols:Drafter",),
    "tree": ("kdcore.decoding.protocols:TreeBuilder",),
    "verifier": ("kdcore.decoding.protocols:Verifier",),
    "engine": ("kdcore.decoding.engines.protocols:Engine",),
    "baseline": ("kdcore.decoding.baseline:Baseline",),
    "score": ("kdcore.data.responses.score:AnswerScore",),
}
"""The Protocols of each kind, of which a component satisfies one. They are named by their places,
as each is defined in the room that calls it."""


class Params(BaseModel):
    """What a spec may write beside a component's name: frozen, without unknown keys.

    A component's own params derive from it and describe each field. As it stands it is the params
    of a component that has none. Defaults are validated like what a user writes, so a field of
    another component's choice may default to a bare name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One declared method.

    Attributes:
        kind: Kind of the component.
        name: Name in a spec: a-z, 0-9 and _.
        build: Builder, called as ``build(params, context)``; it returns an object that satisfies
            the kind's Protocol. A package names it ``module:attribute``, which is imported only
            when a run uses it; a notebook or a script passes the class or function itself
            (`registry_with`).
        summary: One line for ``plugins list``.
        source: Paper or code that the method comes from.
        params: Subclass of `Params`, whose fields all have a description.
        licence: Licence of that paper or code; "" if it is not known.
    """

    kind: Kind
    name: str
    build: str | Callable[[Any, Any], Any]
    summary: str
    source: str
    params: type[BaseModel] = Params
    licence: str = ""

    @property
    def place(self) -> str:
        """Place of the builder's definition, as ``module:attribute``."""
        if isinstance(self.build, str):
            return self.build
        made_by: Any = self.build
        named = made_by if hasattr(made_by, "__qualname__") else type(made_by)
        return f"{named.__module__}:{named.__qualname__}"
