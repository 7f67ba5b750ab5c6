"""A benchmark of decoding, as data."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kdcore.components.choice import BaselineChoice, Choice, EngineChoice, SourceChoice
from kdcore.specs.parts.decoding import DraftingSpec
from kdcore.specs.parts.endpoint import EndpointSpec
from kdcore.specs.parts.fields import (
    Count,
    Device,
    ModelSpec,
    Name,
    NonNegative,
    RunFolder,
    Seed,
    SpecModel,
)

_GENERATE: Any = ["generate"]  # validated like what a user writes
PLAIN = "plain"
"""The method that is always there: our own loop without a drafter."""


def _by_name(given: Any) -> Any:
    """Name the baselines of a list after their components."""
    if not isinstance(given, list | tuple):
        return given
    names = [_name(each) for each in given]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"contains {name} twice: remove one of them, or name each: "
                f"{{NAME: {{name: {name}, PARAMETER: VALUE}}}}"
            )
    return dict(zip(names, given, strict=True))


def _name(given: Any) -> str:
    if isinstance(given, Choice):
        return given.name
    return str(given.get("name") if isinstance(given, dict) else given)


Baselines = Annotated[
    dict[Name, BaselineChoice],
    BeforeValidator(
        _by_name, json_schema_input_type=list[BaselineChoice] | dict[Name, BaselineChoice]
    ),
]
"""Name of a baseline -> its component; a list names each after its component."""


class BenchSpec(SpecModel):
    """Decode the same prompts by several methods, side by side in one run."""

    job: Literal["bench"]
    run: RunFolder = Field(Path("runs/bench"), description="the run folder")
    seed: Seed = 0
    device: Device = None
    target: ModelSpec
    methods: dict[Name, DraftingSpec] = Field(
        {}, description="method name -> its drafter, tree, verifier and engine"
    )
    engine: EngineChoice | None = Field(
        None, description="engine of plain decoding, and of methods without one (default: as there)"
    )
    baselines: Baselines = Field(
        _GENERATE,
        description="other software that decodes the same prompts: a list of baselines, or a "
        "mapping of names to baselines",
    )
    servers: dict[Name, EndpointSpec] = Field(
        {},
        description="server name -> a running OpenAI-compatible server of the target, with or "
        "without a drafter; the others are compared with the first one",
    )
    sets: dict[str, SourceChoice] = Field(
        min_length=1, description="task set name -> its source of prompts"
    )
    limit: Count = Field(12, description="number of rows per set, taken at even intervals")
    turns: Count | None = Field(
        None,
        description="maximum number of turns of a row that are decoded (default: all); the "
        "prompt of a later turn contains the target's greedy answers to the earlier turns",
    )
    max_new_tokens: Count = Field(128, description="maximum length of an answer in tokens")
    temperatures: list[NonNegative] = Field(
        [0.0], min_length=1, description="sampling temperature; 0 is greedy decoding"
    )
    batch_sizes: list[Count] = Field(
        [1], min_length=1, description="number of prompts decoded at once"
    )
    threads: list[Annotated[int, Field(gt=0, le=1024)]] = Field(
        [], description="numbers of threads on a CPU (default: that of torch, OMP_NUM_THREADS)"
    )

    def drafting(self, name: str) -> DraftingSpec:
        """A method's drafter, tree, verifier and engine; the method ``plain`` drafts nothing."""
        own = self.methods.get(name) or DraftingSpec.model_validate({})
        return own if own.engine else own.model_copy(update={"engine": self.engine})

    @model_validator(mode="after")
    def _names_are_free(self) -> BenchSpec:
        kinds: dict[str, Mapping[str, object]] = {
            "method": self.methods,
            "server": self.servers,
            "baseline": self.baselines,
        }
        for names in kinds.values():
            if PLAIN in names:
                raise ValueError(
                    f"the method name '{PLAIN}' is reserved for decoding without a drafter, which "
                    "is always measured: choose another name"
                )
        for (kind, names), (other, others) in combinations(kinds.items(), 2):
            for name in names.keys() & others.keys():
                raise ValueError(f"'{name}' names a {kind} and a {other}: choose another name")
        return self

    @model_validator(mode="after")
    def _nothing_is_measured_twice(self) -> BenchSpec:
        for field in ("temperatures", "batch_sizes", "threads"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field} contains the same value twice: remove one of them")
        return self
