"""Looking at the gradients of a training: what is found, and that nothing changes by it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcore.method.records import Batch
from kdcore.specs.parts.training import TrainingSpec
from kdcore.training.trainer.probe import Probe, layer_of, signal_to_noise
from tests.kdcore.training.trainer.test_trainer import DEEPKD, Watched, trainer, weights
from tests.reference.deepkd.gsnr import gsnr

TERMS = ("task", "target", "non_target")
METHODS: list[dict[str, Any]] = [
    DEEPKD,
    {"gates": [{"name": "speckd", "verification": "sampling"}], "terms": {"task": 0.5}},
]


def steps(made: Any) -> list[dict[str, float]]:
    return [line for line in made.state.log_history if "loss" in line]


def with_dropout(made: Any) -> Any:
    for layer in made.model.model.layers:
        layer.self_attn.attention_dropout = 0.4
    return made


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_is_looked_at_ends_at_the_same_bits(
    tmp_path: Path, method: dict[str, Any], accumulation: int
) -> None:
    sizes = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 3}
    seen = []
    for probe in (None, (1, 3)):
        torch.manual_seed(7)
        made = with_dropout(trainer(tmp_path, method, probe=probe, max_steps=5, **sizes))
        made.train()
        seen.append((weights(made), steps(made), torch.get_rng_state()))
    (without, plain, before), (looked, probed, after) = seen
    assert all(torch.equal(value, looked[name]) for name, value in without.items())
    assert torch.equal(before, after)
    for line, more in zip(plain, probed, strict=True):
        assert {name: more[name] for name in line if name != "seconds"} == {
            name: value for name, value in line.items() if name != "seconds"
        }
        assert any(name.startswith("gsnr/") for name in more.keys() - line.keys())


def test_the_ratio_is_the_formulas_at_the_weights_of_the_step(tmp_path: Path) -> None:
    """The first step's probe, at the initial weights, against one gradient of each row set."""
    method = {"terms": {"task": 0.3}}
    batches, inner = [], None
    made = trainer(tmp_path, method, probe=(1, 4), max_steps=1)
    inner = made.view

    def watched(model: Any, batch: Batch) -> Any:
        both = inner(model, batch, 0.0)
        if not model.training:
            batches.append((batch, both[1].logits(slice(None))))
        return both

    made.view = Watched(watched, inner.reference)
    initial = trainer(tmp_path, method).model.double()
    made.train()
    (line,) = steps(made)
    assert len(batches) == 4
    rows = [tuple(batch.index.tolist()) for batch, _ in batches]
    assert len(set(rows)) > 1 and all(len(set(each)) == 4 for each in rows)
    for term in ("task", "kd"):
        gradients = [gradient_of(initial, batch, theirs, term) for batch, theirs in batches]
        assert line[f"gsnr/{term}"] == pytest.approx(gsnr(np.stack(gradients)), rel=1e-3)


def gradient_of(model: Any, batch: Batch, teacher: Tensor, term: str) -> np.ndarray:
    """Of the mean over rows of the mean over each one's positions; teacher: [N, V] logits."""
    logp = model(**batch.inputs).logits[batch.mask].log_softmax(-1)
    theirs = teacher.double().log_softmax(-1)
    labels = batch.labels[batch.mask]
    loss = {
        "task": -logp.gather(-1, labels[:, None])[:, 0],
        "kd": (theirs.exp() * (theirs - logp)).sum(-1),
    }[term]
    rows = batch.mask.nonzero()[:, 0]
    share = 1.0 / batch.mask.sum(1)[rows] / len(batch.mask)
    gradients = torch.autograd.grad((share * loss).sum(), list(model.parameters()))
    return torch.cat([gradient.reshape(-1) for gradient in gradients]).numpy()


def test_it_looks_every_so_many_steps_and_tells_the_last_look_once(tmp_path: Path) -> None:
    made = trainer(tmp_path, DEEPKD, probe=(2, 2), max_steps=5)
    made.train()
    looked = ["gsnr/task" in line for line in steps(made)]
    assert looked == [False, True, False, True, False]
    rarely = trainer(tmp_path, DEEPKD, probe=(2, 2), max_steps=6, logging_steps=3)
    rarely.train()
    often = trainer(tmp_path, DEEPKD, probe=(2, 2), max_steps=6)
    often.train()
    for name in ("gsnr/target", "momentum_norm/target"):
        told = [line[name] for line in steps(often) if name in line]
        assert [line[name] for line in steps(rarely)] == [told[0], told[2]]


@pytest.mark.parametrize("kernel", ["sgd", "adamw"])
def test_each_momentum_is_told_by_its_norm(tmp_path: Path, kernel: str) -> None:
    momentum = {"name": "deepkd", "kernel": kernel, "weight_decay": 0.1}
    made = trainer(tmp_path, DEEPKD | {"momentum": momentum}, probe=(4, 2))
    made.train()
    buffers: dict[str, float] = {}
    for key, tensor in made.policy.state_dict().items():
        name = key.rpartition(".")[0]
        if name:
            buffers[name] = buffers.get(name, 0.0) + float(tensor.double().square().sum())
    told = {
        name.removeprefix("momentum_norm/"): value
        for name, value in steps(made)[-1].items()
        if name.startswith("momentum_norm/")
    }
    expected = {name: math.sqrt(squares) for name, squares in buffers.items()}
    assert told == pytest.approx(expected, rel=1e-5)
    assert {"task+non_target", "target"} < told.keys()


def test_a_term_without_a_ratio_is_left_out() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    batches = [{"steady": weight.sum(), "nothing": 0 * weight.sum(), "some": (weight * n).sum()}
               for n in (1.0, 2.0, 3.0)]  # fmt: skip
    found = signal_to_noise(batches, {"layers.0.weight": weight}, layers=True)
    ratio = pytest.approx((4 - 1 / 3) / 1)
    assert found == {"gsnr/some": ratio, "gsnr_layer/some/layers.0": ratio}
    assert weight.grad is None


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "model.layers.11"),
        ("0.weight", "0"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("conv1.bias", "conv1"),
        ("norms", "norms"),
    ],
)
def test_the_layer_of_a_parameter(parameter: str, layer: str) -> None:
    assert layer_of(parameter) == layer


def test_a_run_logs_each_layer_where_the_spec_asks_for_it(tmp_path: Path) -> None:
    made = trainer(tmp_path, DEEPKD, probe=(1, 2, True), max_steps=1)
    made.train()
    (line,) = steps(made)
    names = {layer_of(name) for name, _ in made.model.named_parameters()}
    for term in TERMS:
        logged = {n.split("/")[2] for n in line if n.startswith(f"gsnr_layer/{term}/")}
        assert "model.layers.0" in logged and logged <= names


def test_a_spec_asks_for_it_or_does_not() -> None:
    assert Probe.of(TrainingSpec()) is None
    assert Probe.of(TrainingSpec(probe_every=3)) == Probe(3, 16)
    assert Probe.of(TrainingSpec(probe_every=3, probe_layers=True)) == Probe(3, 16, True)
