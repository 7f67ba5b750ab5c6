"""The momentum policies against torch's optimizers and the float64 formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import Tensor

from kdcore.components.registry import Registry
from kdcore.errors import UserError
from kdcore.method.protocols import MomentumPolicy
from kdcore_deepkd import plugin
from tests.reference.deepkd import momentum as reference

REGISTRY = Registry()
REGISTRY.register(plugin, "deepkd", "kdcore", "0")
POLICIES = REGISTRY.names("momentum")
TERMS = ("task", "target", "non_target")
SHAPES = [(3, 2), (5,), (), *[(1,)] * 9]
"""Enough tensors that their order by number is not that by name."""
STEPS = 6

Gradients = dict[str, list[Tensor]]
momenta = st.sampled_from([0.0, 0.5, 0.825, 0.9, 0.975])


def build(name: str, **params: object) -> MomentumPolicy:
    component = REGISTRY.component("momentum", name)
    return REGISTRY.attribute(component)(component.params.model_validate(params), None)


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def gradients_of(terms: tuple[str, ...], step: int, dtype: torch.dtype = torch.float64):
    return {term: tensors(1000 * step + len(term), dtype) for term in terms}


def by_stream(policy: MomentumPolicy, gradients: Gradients) -> Gradients:
    """What the backward passes would give: each stream's terms summed."""
    return {
        stream: [sum(together) for together in zip(*(gradients[t] for t in terms), strict=True)]
        for stream, terms in policy.streams(tuple(gradients)).items()
    }


def learning_rate(step: int) -> float:
    return 0.1 / (1 + step)


def stepped(parameters: list[Tensor], update: list[Tensor], lr: float) -> list[Tensor]:
    """As torch.optim.SGD without momentum does it, in one rounding."""
    return [p.add(u, alpha=-lr) for p, u in zip(parameters, update, strict=True)]


def train(policy: MomentumPolicy, steps=range(STEPS), terms=TERMS, dtype=torch.float64, at=None):
    """Plain SGD on what the policy makes of the terms' gradients."""
    parameters = at or tensors(7, dtype)
    for step in steps:
        gradients = by_stream(policy, gradients_of(terms, step, dtype))
        update = policy.combine(gradients, parameters)
        parameters = stepped(parameters, update, learning_rate(step))
    return parameters


def train_torch(optimizer: type, terms=TERMS, dtype=torch.float64, clip=None, **options):
    parameters = [tensor.requires_grad_() for tensor in tensors(7, dtype)]
    optimizer = optimizer(parameters, lr=1.0, **options)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        gradients = gradients_of(terms, step, dtype)
        for parameter, *parts in zip(parameters, *gradients.values(), strict=True):
            parameter.grad = sum(parts)
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def flat(many: list[Tensor]) -> np.ndarray:
    return torch.cat([tensor.flatten() for tensor in many]).numpy()


def train_reference(mu: dict[str, float], decay: float = 0.0, decay_into=None, **options):
    """The heavy ball in float64, with one buffer for each term and one for the decay."""
    theta, buffers = flat(tensors(7)), {}
    for step in range(STEPS):
        gradients = {term: flat(g) for term, g in gradients_of(TERMS, step).items()}
        if decay_into:
            gradients[decay_into] = gradients.get(decay_into, 0) + decay * theta
        theta, buffers = reference.heavy_ball(
            theta, buffers, gradients, mu, learning_rate(step), **options
        )
    return theta


def close(ours: list[Tensor], expected: list[Tensor] | np.ndarray, tolerance: float = 1e-13):
    expected = expected if isinstance(expected, np.ndarray) else flat(expected)
    np.testing.assert_allclose(flat(ours), expected, rtol=tolerance, atol=tolerance)


def ours_for_theirs(mu: dict[str, float]) -> dict[str, float]:
    return {"non_target" if term == "nontarget" else term: value for term, value in mu.items()}


# streams


def test_terms_of_equal_momentum_share_a_stream():
    assert build("per_term").streams(TERMS) == {"task+target+non_target": TERMS}
    apart = build("per_term", overrides={"task": 0.5}).streams(TERMS)
    assert apart == {"task": ("task",), "target+non_target": ("target", "non_target")}
    deepkd = {"task+non_target": ("task", "non_target"), "target": ("target",)}
    assert build("deepkd").streams(TERMS) == deepkd
    assert build("deepkd", variant="released").streams(TERMS) == {
        "task+target": ("task", "target"),
        "non_target": ("non_target",),
    }
    assert build("dot").streams(("task", "kd")) == {"task": ("task",), "kd": ("kd",)}
    assert build("dot", d=0).streams(("task", "kd")) == {"task+kd": ("task", "kd")}
    by_another_sum = build("per_term", mu=0.9 + 0.075, overrides={"task": 0.975})
    assert len(by_another_sum.streams(TERMS)) == 1


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("terms", [("task", "kd"), ("kd",), TERMS, (*TERMS, "other")])
def test_every_policy_keeps_the_contract(name, terms):
    policy = build(name, weight_decay=0.1)
    assert isinstance(policy, MomentumPolicy)
    assert policy.owns_momentum
    streams = policy.streams(terms)
    assert sorted(term for together in streams.values() for term in together) == sorted(terms)
    parameters = tensors(7)
    update = policy.combine(by_stream(policy, gradients_of(terms, 0)), parameters)
    assert [tensor.shape for tensor in update] == [tensor.shape for tensor in parameters]
    assert all(map(torch.equal, parameters, tensors(7)))
    assert all(tensor.is_floating_point() for tensor in policy.state_dict().values())


@pytest.mark.parametrize("kernel", ["sgd", "adamw"])
def test_what_is_returned_is_no_buffer(kernel):
    """The trainer clips it in place."""
    parameters, finals = tensors(7), []
    for spoil in (False, True):
        policy = build("deepkd", kernel=kernel, weight_decay=0.1)
        for step in range(2):
            update = policy.combine(by_stream(policy, gradients_of(TERMS, step)), parameters)
            if spoil and step == 0:
                torch._foreach_zero_(update)
        finals.append(update)
    assert all(map(torch.equal, *finals))


# the heavy ball


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("terms", [("kd",), TERMS])
def test_equal_momenta_are_torch_sgd_bit_for_bit(dtype, weight_decay, terms):
    policy = build("per_term", weight_decay=weight_decay)
    expected = train_torch(torch.optim.SGD, terms, dtype, momentum=0.9, weight_decay=weight_decay)
    assert all(map(torch.equal, train(policy, terms=terms, dtype=dtype), expected))


@settings(max_examples=30, deadline=None)
@given(momenta, momenta, momenta, st.booleans())
def test_merged_streams_are_three_buffers(task, target, non_target, normalise):
    mu = {"task": task, "target": target, "non_target": non_target}
    policy = build("per_term", overrides=mu, normalise_gain=normalise)
    assert len(policy.streams(TERMS)) == len(set(mu.values()))
    close(train(policy), train_reference(mu, gain_normalised=normalise), 1e-12)


@pytest.mark.parametrize("d", [0.075, 0.0, -0.05])
def test_deepkd_has_the_papers_momenta(d):
    mu = ours_for_theirs(reference.deepkd_momenta(0.9, d))
    close(train(build("deepkd", d=d)), train_reference(mu))


def test_dot_has_two_momenta():
    mu = reference.dot_momenta(0.8, 0.1)
    mu = {"task": mu["task"], "target": mu["kd"], "non_target": mu["kd"]}
    close(train(build("dot", mu=0.8, d=0.1)), train_reference(mu))


@pytest.mark.parametrize("variant", ["equations", "released"])
def test_deepkd_has_a_difference_for_each_term(variant):
    """Those of the released configuration of ResNet110 and ResNet20: -0.1 and -0.05."""
    task = 0.8 if variant == "released" else 0.975
    mu = {"task": task, "target": 0.8, "non_target": 0.85}
    policy = build("deepkd", d_target=0.1, d_non_target=-0.05, variant=variant)
    close(train(policy), train_reference(mu))


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("d", [0.075, -0.05])
def test_the_released_variant_of_dot_is_its_code(weight_decay, d):
    policy = build("dot", variant="released", d=d, weight_decay=weight_decay)
    terms = ("task", "kd")
    theta, buffers = flat(tensors(7)), {}
    for step in range(STEPS):
        gradients = {term: flat(g) for term, g in gradients_of(terms, step).items()}
        theta, buffers = reference.released_dot(
            theta, buffers, gradients, 0.9, d, learning_rate(step), weight_decay
        )
    close(train(policy, terms=terms), theta)


@pytest.mark.parametrize("normalise", [False, True])
def test_weight_decay_is_a_stream_of_the_base_momentum(normalise):
    mu = {**ours_for_theirs(reference.deepkd_momenta()), "decay": 0.9}
    policy = build("deepkd", weight_decay=0.2, normalise_gain=normalise)
    expected = train_reference(mu, 0.2, "decay", gain_normalised=normalise)
    close(train(policy), expected)


def test_a_steady_gradient_gains_what_its_momentum_says():
    for normalise, gains in ((False, [40.0, 1 / 0.175]), (True, [10.0, 10.0])):
        policy = build("deepkd", normalise_gain=normalise)
        policy.streams(TERMS)
        for _ in range(1500):
            steady = {"task+non_target": [torch.tensor([1.0, 0.0])]}
            steady["target"] = [torch.tensor([0.0, 1.0])]
            (update,) = policy.combine(steady, [torch.zeros(2)])
        torch.testing.assert_close(update, torch.tensor(gains))


def test_released_variant_restated():
    """The task under the target's momentum, and weight decay in the target's buffer alone."""
    mu = {"task": 0.825, "target": 0.825, "non_target": 0.975}
    policy = build("deepkd", variant="released", weight_decay=0.2)
    close(train(policy), train_reference(mu, 0.2, "target"))


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_released_variant_is_the_released_code(weight_decay):
    """Which decays parameters that two buffers have moved already: as lr squared, so a small lr
    brings the two together."""
    apart = []
    for lr in (1e-3, 1e-4):
        policy = build(
            "deepkd", variant="released", d_target=0.1, d_non_target=0.05, weight_decay=weight_decay
        )
        parameters, theta, buffers = tensors(7), flat(tensors(7)), {}
        for step in range(STEPS):
            terms = gradients_of(TERMS, step)
            update = policy.combine(by_stream(policy, terms), parameters)
            parameters = stepped(parameters, update, lr)
            theirs = {"nontarget" if t == "non_target" else t: flat(g) for t, g in terms.items()}
            theta, buffers = reference.released(
                theta, buffers, theirs, 0.9, -0.1, 0.05, lr, weight_decay
            )
        apart.append(abs(flat(parameters) - theta).max())
    if weight_decay:
        assert apart[1] == pytest.approx(apart[0] / 100, rel=0.05)
    else:
        assert max(apart) < 1e-14


def test_released_variant_without_decay_is_dot_with_the_task_joined_to_the_target():
    joined = build("per_term", overrides={"task": 0.825, "target": 0.825, "non_target": 0.975})
    released = train(build("deepkd", variant="released"))
    assert all(map(torch.equal, released, train(joined)))


# adamw


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("terms", [("kd",), TERMS])
def test_equal_beta1_is_torch_adamw(weight_decay, terms):
    policy = build("per_term", kernel="adamw", weight_decay=weight_decay, beta2=0.98)
    expected = train_torch(torch.optim.AdamW, terms, betas=(0.9, 0.98), weight_decay=weight_decay)
    close(train(policy, terms=terms), expected)


@settings(max_examples=30, deadline=None)
@given(momenta, momenta, momenta)
def test_adamw_has_one_first_moment_for_each_stream(task, target, non_target):
    beta1s = {"task": task, "target": target, "non_target": non_target}
    policy = build("per_term", kernel="adamw", overrides=beta1s, weight_decay=0.1)
    theta = flat(tensors(7))
    state = reference.adam_start(theta, list(TERMS))
    for step in range(STEPS):
        gradients = {term: flat(g) for term, g in gradients_of(TERMS, step).items()}
        theta, state = reference.adamw(
            theta, state, gradients, beta1s, learning_rate(step), weight_decay=0.1
        )
    close(train(policy), theta, 1e-11)


# clipping


@pytest.mark.parametrize("clip", [0.5, 1e3])
def test_clipping_comes_before_the_momentum_as_in_torch(clip):
    close(
        train(build("per_term", clip=clip, weight_decay=0.1)),
        train_torch(torch.optim.SGD, clip=clip, momentum=0.9, weight_decay=0.1),
    )
    close(
        train(build("per_term", clip=clip, kernel="adamw")),
        train_torch(torch.optim.AdamW, clip=clip, weight_decay=0.0),
    )


def test_clipping_is_of_the_sum_and_keeps_proportions():
    policy, gradients = build("deepkd", clip=0.5), gradients_of(TERMS, 0)
    policy.combine(by_stream(policy, gradients), tensors(7))
    clipped = reference.clipped_on_the_sum({t: flat(g) for t, g in gradients.items()}, 0.5)
    buffers = policy.state_dict()
    for stream, terms in policy.streams(TERMS).items():
        buffer = flat([buffers[f"{stream}.{index}"] for index in range(len(SHAPES))])
        np.testing.assert_allclose(buffer, sum(clipped[term] for term in terms), rtol=1e-5)


# state


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("kernel", ["sgd", "adamw"])
def test_resuming_is_bit_exact(name, kernel):
    options = {"kernel": kernel, "weight_decay": 0.1}
    unbroken = train(build(name, **options), dtype=torch.float32)
    first, second = build(name, **options), build(name, **options)
    parameters = train(first, range(3), dtype=torch.float32)
    second.load_state_dict(load(save(first.state_dict())))
    resumed = train(second, range(3, STEPS), dtype=torch.float32, at=parameters)
    assert all(map(torch.equal, resumed, unbroken))
    forgotten = train(build(name, **options), range(3, STEPS), dtype=torch.float32, at=parameters)
    assert not all(map(torch.equal, forgotten, unbroken))


def test_a_state_is_a_copy_on_its_way_out_and_in():
    first, second = build("deepkd"), build("deepkd")
    train(first, range(2))
    state = first.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    second.load_state_dict(state)
    train(first, range(2, 4))
    train(second, range(2, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_buffers_of_other_streams_are_refused():
    first, second = build("deepkd"), build("per_term")
    train(first, range(2))
    second.load_state_dict(first.state_dict())
    with pytest.raises(UserError, match="has no momentum buffer 'task\\+target\\+non_target'"):
        train(second, range(2, 3))


# mistakes in a spec


def test_a_momentum_of_no_term_is_refused():
    policy = build("per_term", overrides={"nontarget": 0.5})
    with pytest.raises(UserError, match="did you mean 'non_target'"):
        policy.streams(TERMS)
    build("per_term", overrides={"task": 0.5}).streams(("kd",))


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("deepkd", {"mu": 0.95}, "the momentum of 'task' would be 1.025"),
        ("deepkd", {"d_target": 0.95}, "the momentum of 'target' would be -0.05"),
        ("deepkd", {"d_non_target": 0.1}, "the momentum of 'non_target' would be 1"),
        ("dot", {"mu": 0.95, "d": -0.075}, "the momentum of 'task' would be 1.025"),
        ("dot", {"mu": 0.05}, "the momentum of 'task' would be -0.025"),
        ("per_term", {"overrides": {"task": 1.0}}, "less than 1"),
        ("per_term", {"kernel": "adamw", "normalise_gain": True}, "always 1"),
        ("per_term", {"clip": 0}, "greater than 0"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(name, params, said):
    with pytest.raises(ValidationError, match=said):
        build(name, **params)
