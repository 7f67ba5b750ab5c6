"""Built-in components built by keywords, without a run: the same as the registry builds."""

import inspect
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field, TypeAdapter

import kdcore
import kdcore_baselines
import kdcore_deepkd
import kdcore_speckd
from kdcore.components.choice import Choice, OfKind
from kdcore.components.component import Component
from kdcore.components.construction import ChoiceBuilder
from kdcore.components.registry import installed
from kdcore.testing import suite_of

BUILT_IN = {
    (component.kind, component.name): component
    for component, plugin in installed().components()
    if plugin.distribution == "kdcore"
    and component.kind in ("gate", "splitter", "divergence", "momentum")
}
KEYWORDS: dict[tuple[str, str], dict[str, Any]] = {
    ("divergence", "jsd"): {"beta": 0.3},
    ("gate", "adaspec"): {"reference": "a model", "fraction": 0.6},
    ("gate", "inverted"): {"gate": {"name": "speckd", "k": 2}},
    ("gate", "random"): {"rate": 0.4, "floor": 0.1},
    ("gate", "speckd"): {"k": 3, "verification": "sampling"},
    ("gate", "uniform"): {"weight": 0.3},
    ("momentum", "deepkd"): {"mu": 0.8, "weight_decay": 0.1},
    ("momentum", "per_term"): {"overrides": {"kd": 0.5}, "kernel": "adamw"},
    ("splitter", "by_position"): {"positions": 3},
    ("splitter", "deepkd"): {"unit": "classes", "k": 5},
    ("splitter", "top_k_mask"): {"part": "kd", "k": 0.4},
}


def exported(component: Component) -> Any:
    """What the component's package exports under the name of what builds it."""
    module, _, name = str(component.build).partition(":")
    return getattr(__import__(module.partition(".")[0]), name)


@pytest.mark.parametrize("kind, name", BUILT_IN)
def test_keywords_build_what_the_registry_builds(kind: Any, name: str) -> None:
    component, keywords = BUILT_IN[kind, name], KEYWORDS.get((kind, name), {})
    form: TypeAdapter[Choice] = TypeAdapter(Annotated[Choice, OfKind(kind)])
    of_a_spec = ChoiceBuilder().build(form.validate_python({"name": name, **keywords}))
    ours = exported(component)(**keywords)
    assert type(ours) is type(of_a_spec)
    suite = suite_of(component, params=keywords)()
    for step in range(3):
        pairs = zip(suite.observe(ours, step), suite.observe(of_a_spec, step), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        for each in (ours, of_a_spec):
            suite.finish(each, step)


def test_every_keyword_is_in_the_signature() -> None:
    """What help() and editors show: the params' fields with their defaults."""
    for component in BUILT_IN.values():
        declared = component.params.model_fields
        shown = inspect.signature(exported(component)).parameters
        assert list(shown) == list(declared)
        assert all(each.kind is each.KEYWORD_ONLY for each in shown.values())


@pytest.mark.parametrize(
    "call, cause, cure",
    [
        (lambda: kdcore_speckd.SpecKD(kk=3), "SpecKD has no parameter 'kk'", "did you mean 'k'?"),
        (
            lambda: kdcore_speckd.SpecKD(k=0, beta=2),
            "SpecKD: k: must be greater than or equal to 1; beta: must be less than or equal to 1",
            "parameters: verification, k, beta",
        ),
        (lambda: kdcore_speckd.SpecKD(3), "SpecKD takes keywords only", "write SpecKD(NAME=VALUE"),
        (lambda: kdcore_baselines.jsd(0.5), "jsd takes keywords only", "write jsd(NAME=VALUE"),
        (lambda: kdcore_baselines.uniform(), "uniform: weight: Field required", "parameters: wei"),
        (
            lambda: kdcore_deepkd.DeepKDMomentum(mu=0.99),
            "DeepKDMomentum: the momentum of 'task' would be 1.065",
            "parameters: mu, kernel",
        ),
        (lambda: kdcore_baselines.inverted(gate="spekd"), "inverted: gate: unknown gate", "par"),
        (
            lambda: kdcore_baselines.inverted(gate={"name": "speckd", "k": 0}),
            "inverted: gate: invalid parameters of gate 'speckd' (k: must be greater",
            "parameters: gate",
        ),
    ],
)
def test_a_wrong_keyword_is_told_in_one_line(call: Any, cause: str, cure: str) -> None:
    with pytest.raises(kdcore.UserError) as wrong:
        call()
    assert wrong.value.cause.startswith(cause) and "\n" not in wrong.value.cause
    assert wrong.value.cure.startswith(cure)


class MarginParams(kdcore.Params):
    least: float = Field(default=1.0, description="smallest margin")


class Margin:
    """A third party's gate."""

    @kdcore.by_keywords(MarginParams)
    def __init__(self, params: MarginParams, context: kdcore.BuildContext) -> None:
        self.params, self.context = params, context


def test_a_third_party_s_component_is_built_both_ways() -> None:
    assert Margin(least=2).params == MarginParams(least=2.0)
    asked: Any = object()
    by_a_run = Margin(MarginParams(), asked)  # type: ignore[call-arg]
    assert by_a_run.context is asked and by_a_run.params.least == 1.0


def test_a_component_that_needs_a_model_says_so() -> None:
    with pytest.raises(kdcore.UserError, match="needs the model 'gpt2', and only a run loads"):
        Margin().context.load_model("gpt2")


@pytest.mark.parametrize("package", [kdcore_speckd, kdcore_deepkd, kdcore_baselines])
def test_a_package_has_no_other_names(package: Any) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018
