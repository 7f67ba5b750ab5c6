"""Declarations of the scores of answers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from kdcore import Component, Params
from kdcore.specs.parts.endpoint import EndpointSpec
from kdcore.specs.parts.fields import Count

_JUDGE: Any = {"endpoint": "http://localhost:8000/v1", "model": "judge"}


def _consent(given: bool) -> bool:
    if not given:
        raise ValueError(
            "pass_at_1 runs the programs that the model writes on this machine: set run_code: true "
            "if that is safe, or remove the score"
        )
    return given


class MathParams(Params):
    """Parameters of the math score."""

    reference: str | None = Field(
        None,
        description="name of the field with the final answer, which the source keeps (default: "
        "the response, with the answer in \\boxed{...} or as its last formula or number)",
    )


class PassParams(Params):
    """Parameters of the pass_at_1 score."""

    run_code: Annotated[bool, AfterValidator(_consent)] = Field(
        description="consent to run programs of the model on this machine: a process with limits "
        "of time and memory, which can still read files and use the network",
        examples=[True],
    )
    tests: str | None = Field(
        None,
        description="name of the field with the tests, which the source keeps: Python code or a "
        "list of assertions (default: the response)",
    )
    entry_point: str | None = Field(
        None,
        description="name of the field with the name of the tested function, which the source "
        "keeps: the tests are then run as check(FUNCTION), and an answer without that function "
        "continues the prompt",
    )
    seconds: Annotated[float, Field(gt=0, le=3600)] = Field(
        10.0, description="maximum time of a program in seconds"
    )
    memory_mb: Annotated[int, Field(ge=64, le=2**20)] = Field(
        1024, description="maximum address space of a program in MB"
    )


class WinRateParams(Params):
    """Parameters of the win_rate score."""

    judge: EndpointSpec = Field(
        description="model that compares the answers: {endpoint, model, key, timeout}",
        examples=[_JUDGE],
    )
    max_new_tokens: Count = Field(
        1024, description="maximum length of a verdict with its reasons, in tokens"
    )
    at_once: Count = Field(8, description="number of concurrent requests")


SCORES = (
    Component(
        kind="score",
        name="rouge_l",
        build="kdcore_baselines.scores.text:RougeL",
        summary="F-measure of the longest common subsequence of words",
        source="Lin 2004, by the package rouge-score",
    ),
    Component(
        kind="score",
        name="exact_match",
        build="kdcore_baselines.scores.text:ExactMatch",
        summary="whether the final number is that of the reference, as for GSM8K",
        source="GSM8K, arXiv 2110.14168",
    ),
    Component(
        kind="score",
        name="math",
        build="kdcore_baselines.scores.mathematics:Mathematics",
        summary="whether the final formula equals that of the reference, as for MATH",
        source="MATH, arXiv 2103.03874, by the package math-verify (needs kdcore[math])",
        params=MathParams,
    ),
    Component(
        kind="score",
        name="pass_at_1",
        build="kdcore_baselines.scores.programs:PassAtOne",
        summary="whether the program passes the tests of its row, as for HumanEval and MBPP",
        source="HumanEval, arXiv 2107.03374",
        params=PassParams,
    ),
    Component(
        kind="score",
        name="win_rate",
        build="kdcore_baselines.scores.judge:WinRate",
        summary="how often a judge prefers the answer to the reference, over both orders",
        source="MT-Bench, arXiv 2306.05685",
        params=WinRateParams,
    ),
)
