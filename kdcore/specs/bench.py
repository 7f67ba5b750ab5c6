"""A benchmark of decoding, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from kdcore.components.choice import EngineChoice, SourceChoice
from kdcore.specs.parts.decoding import DraftingSpec
from kdcore.specs.parts.endpoint import EndpointSpec
from kdcore.specs.parts.fields import Count, Device, ModelSpec, Name, NonNegative, Seed, SpecModel

PLAIN = "plain"
"""The method that is always there: our own loop without a drafter."""

BASELINES = ("generate", "prompt_lookup", "assisted")
"""What transformers itself offers; those but the first take one prompt at a time."""


class BenchSpec(SpecModel):
    """Decode the same prompts by several methods, side by side in one run."""

    job: Literal["bench"]
    run: Path = Field(Path("runs/bench"), description="the run folder")
    seed: Seed = 0
    device: Device = None
    target: ModelSpec
    methods: dict[Name, DraftingSpec] = Field(
        {}, description="method name -> its drafter, tree, verifier and engine"
    )
    engine: EngineChoice | None = Field(
        None, description="engine of plain decoding, and of methods without one (default: as there)"
    )
    baselines: list[Literal["generate", "prompt_lookup", "assisted"]] = Field(
        ["generate"],
        description="baselines from transformers: plain generate, prompt lookup "
        "(prompt_lookup_num_tokens) or assisted generation (assistant_model)",
    )
    assistant: ModelSpec | None = Field(
        None, description="smaller model with the target's tokenizer, for the baseline 'assisted'"
    )
    servers: dict[Name, EndpointSpec] = Field(
        {},
        description="server name -> a running OpenAI-compatible server of the target, with or "
        "without a drafter; the others are compared with the first one",
    )
    sets: dict[str, SourceChoice] = Field(
        min_length=1,
        description="task set name -> its source of prompts; only the first turn is decoded",
    )
    limit: Count = Field(12, description="number of prompts per set, taken at even intervals")
    max_new_tokens: Count = Field(128, description="maximum length of an answer in tokens")
    temperatures: list[NonNegative] = Field(
        [0.0], min_length=1, description="sampling temperature; 0 is greedy decoding"
    )
    batch_sizes: list[Count] = Field(
        [1], min_length=1, description="number of prompts decoded at once"
    )

    @model_validator(mode="after")
    def _assisted_has_an_assistant(self) -> BenchSpec:
        asked, given = "assisted" in self.baselines, self.assistant is not None
        if asked and not given:
            raise ValueError(
                "the baseline 'assisted' needs an assistant model: set assistant to a small model"
            )
        if given and not asked:
            raise ValueError(
                "assistant is set but not used: add 'assisted' to baselines, or remove assistant"
            )
        return self

    def drafting(self, name: str) -> DraftingSpec:
        """A method's drafter, tree, verifier and engine; the method ``plain`` drafts nothing."""
        own = self.methods.get(name) or DraftingSpec.model_validate({})
        return own if own.engine else own.model_copy(update={"engine": self.engine})

    @model_validator(mode="after")
    def _names_are_free(self) -> BenchSpec:
        for name in (self.methods.keys() | self.servers.keys()) & {PLAIN, *BASELINES}:
            raise ValueError(f"the method name '{name}' is reserved: choose another name")
        for name in self.methods.keys() & self.servers.keys():
            raise ValueError(f"'{name}' names a method and a server: choose another name")
        return self

    @model_validator(mode="after")
    def _nothing_is_measured_twice(self) -> BenchSpec:
        for field in ("baselines", "temperatures", "batch_sizes"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field} contains the same value twice: remove one of them")
        return self
