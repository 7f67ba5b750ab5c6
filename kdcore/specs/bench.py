"""A benchmark of decoding, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from kdcore.method.choice import SourceChoice
from kdcore.specs.decoding import DraftingSpec
from kdcore.specs.fields import ModelSpec, Name, Seed, SpecModel

PLAIN = "plain"
"""The method that is always there: our own loop without a drafter."""

BASELINES = ("generate", "prompt_lookup", "assisted")
"""What transformers itself offers; those but the first take one prompt at a time."""


class BenchSpec(SpecModel):
    """Decode the same prompts by several methods, side by side in one run."""

    job: Literal["bench"]
    run: Path = Field(Path("runs/bench"), description="the run folder")
    seed: Seed = 0
    target: ModelSpec
    methods: dict[Name, DraftingSpec] = Field(
        {}, description="name of each method -> what drafts, in which tree, who verifies"
    )
    baselines: list[Literal["generate", "prompt_lookup", "assisted"]] = Field(
        ["generate"],
        description="transformers' own: generate, and generate with prompt_lookup_num_tokens or "
        "with an assistant_model",
    )
    assistant: ModelSpec | None = Field(
        None, description="for the baseline assisted: a smaller model of the same tokenizer"
    )
    sets: dict[str, SourceChoice] = Field(
        min_length=1, description="name of each task set -> its prompts; the first turn is decoded"
    )
    limit: PositiveInt = Field(12, description="prompts of each set, spread evenly over it")
    max_new_tokens: PositiveInt = Field(128, description="longest answer, in tokens")
    temperatures: list[NonNegativeFloat] = Field([0.0], min_length=1, description="0 is greedy")
    batch_sizes: list[PositiveInt] = Field([1], min_length=1, description="prompts at once")

    @model_validator(mode="after")
    def _assisted_has_an_assistant(self) -> BenchSpec:
        asked, given = "assisted" in self.baselines, self.assistant is not None
        if asked and not given:
            raise ValueError("the baseline 'assisted' lacks an assistant: name a small model")
        if given and not asked:
            raise ValueError("nothing reads the assistant: add 'assisted' to baselines")
        return self

    @model_validator(mode="after")
    def _names_are_free(self) -> BenchSpec:
        for name in self.methods.keys() & {PLAIN, *BASELINES}:
            raise ValueError(f"the method name '{name}' is taken by another: choose another name")
        return self

    @model_validator(mode="after")
    def _nothing_is_measured_twice(self) -> BenchSpec:
        for field in ("baselines", "temperatures", "batch_sizes"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"a value stands twice in {field}: remove one of them")
        return self
