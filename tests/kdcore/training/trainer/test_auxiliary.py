"""Auxiliary rows: their part of the loss, their order, and what they leave alone."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcore.errors import UserError
from kdcore.training.method import Method, objective_of, on_other_rows
from kdcore_baselines import forward_kl
from kdcore_deepkd import DeepKDSplitter
from tests.kdcore.training.trainer.test_trainer import DEEPKD, trainer, weights

SGD: dict[str, Any] = {"optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
BOTH = {"task": 0.5, "kd": 0.25}


def of_step(made: Any) -> list[Any]:
    return made.auxiliary.of_step(0, 0, made.args, made.args.gradient_accumulation_steps)


def in_float64(model: Any, padded: Any) -> Tensor:
    """The logits of a float64 copy of a model at the learned positions."""
    copied = deepcopy(model).double().eval()
    inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return copied(**inputs).logits[padded["mask"]]


@pytest.mark.parametrize("normalize", ["token", "sequence"])
def test_a_step_adds_the_mean_over_the_auxiliary_rows(tmp_path: Path, normalize: str) -> None:
    """MiniLLM's: (1 - r) CE(y, q) + r CE(p, q) over a corpus, whose gradient is that of the KL."""
    made = trainer(
        tmp_path,
        {"normalize": normalize},
        auxiliary=BOTH,
        max_steps=1,
        gradient_accumulation_steps=2,
        **SGD,
    )
    task, kd, rows = 0.0, 0.0, [0, 0]
    for padded in of_step(made):
        ours, theirs = (
            in_float64(model, padded).log_softmax(-1).numpy()
            for model in (made.model, made.view.taught_by.model)
        )
        labels = padded["labels"][padded["mask"]].numpy()
        lengths = padded["mask"].sum(1)
        of_row = np.repeat(1 / lengths.numpy(), lengths.numpy())
        each = np.ones(len(labels)) if normalize == "token" else of_row
        task -= (each * ours[np.arange(len(labels)), labels]).sum()
        kd += (each[:, None] * np.exp(theirs) * (theirs - ours)).sum()
        rows[0] += len(labels)
        rows[1] += len(lengths)
    whole = rows[0] if normalize == "token" else rows[1]
    made.train()
    (line,) = (line for line in made.state.log_history if "loss" in line)
    assert line["auxiliary/term/task"] == pytest.approx(task / whole, rel=1e-5)
    assert line["auxiliary/term/kd"] == pytest.approx(kd / whole, rel=1e-5)
    total = line["term/kd"] + 0.5 * task / whole + 0.25 * kd / whole
    assert line["loss"] == pytest.approx(total, rel=1e-5)


def moved(made: Any) -> dict[str, Tensor]:
    """The change of each weight in one step."""
    before = {
        name: each.detach().double() for name, each in deepcopy(made.model).named_parameters()
    }
    made.train()
    return {name: each - before[name] for name, each in weights(made).items()}


METHODS: list[dict[str, Any]] = [
    {},
    {"gates": ["entropy"], "normalize": "accepted"},
    {"splitters": ["dkd"], "momentum": "per_term"},
    DEEPKD,
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("terms", [{"task": 0.5}, {"label": 0.3, "task": 0.1}])
def test_the_gradient_is_the_sum_of_that_of_each_kind_of_rows(
    tmp_path: Path, method: dict[str, Any], terms: dict[str, float]
) -> None:
    """With every gate, splitter and momentum policy: nothing of them knows of the rows."""
    one_step = {"max_steps": 1, "learning_rate": 1.0, **SGD}
    alone, both = (trainer(tmp_path, method, auxiliary=a, **one_step) for a in (None, terms))
    weightless = trainer(tmp_path, method, auxiliary=dict.fromkeys(terms, 1e-30), **one_step)
    (padded,) = of_step(both)
    other = trainer(tmp_path, method, auxiliary=terms, **one_step)
    other.engine.objective.weights.update(dict.fromkeys(other.engine.objective.weights, 0.0))
    changes = [moved(each) for each in (alone, other, both, weightless)]
    assert len(padded["index"]) == 3
    for name, change in changes[2].items():
        torch.testing.assert_close(
            change, changes[0][name] + changes[1][name], atol=1e-6, rtol=1e-3
        )
        torch.testing.assert_close(changes[3][name], changes[0][name], atol=1e-6, rtol=1e-4)
    assert any(change.abs().max() > 1e-3 for change in changes[1].values())


def test_every_row_is_read_once_before_any_is_read_twice(tmp_path: Path) -> None:
    """Over steps, micro-batches and processes."""
    made = trainer(tmp_path, {}, auxiliary={"task": 1.0}, gradient_accumulation_steps=2)
    beside = made.auxiliary
    assert beside is not None
    args = made.args
    args.world_size  # noqa: B018 -- set up the processes before the number is replaced
    read: list[int] = []
    for step in range(5):
        both = [beside.of_step(step, process, _TwoProcesses(), 2) for process in (0, 1)]
        for micro_step in range(2):
            read += [i for each in both for i in each[micro_step]["index"].tolist()]
    assert len(read) == 60
    epochs = [read[start : start + 5] for start in range(0, 60, 5)]
    assert all(Counter(epoch) == Counter(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 6


class _TwoProcesses:
    gradient_accumulation_steps = 2
    world_size = 2


def test_a_resumed_training_reads_the_rows_that_the_uninterrupted_one_reads(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    made = [
        trainer(tmp_path / folder, DEEPKD, auxiliary={"task": 1.0}, **saving)
        for folder in ("whole", "resumed")
    ]
    for each in made:
        each.train()
    again = trainer(tmp_path / "resumed", DEEPKD, auxiliary={"task": 1.0}, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    assert all(torch.equal(each, weights(again)[name]) for name, each in weights(made[0]).items())


def test_on_sampled_steps_the_corpus_keeps_its_labels(tmp_path: Path) -> None:
    """MiniLLM: a policy gradient on samples, and language modelling on the corpus alone."""
    made = trainer(
        tmp_path,
        {"divergence": "forward_kl", "sampled_divergence": "reverse_kl", "advantage": "minillm"},
        on_policy={"probability": 1.0},
        auxiliary={"task": 0.5, "kd": 0.5},
    )
    made.train()
    lines = [line for line in made.state.log_history if "loss" in line]
    names = {name for line in lines for name in line if "term/" in name}
    assert names == {"term/kd", "term/policy", "auxiliary/term/kd", "auxiliary/term/task"}


class TestTerms:
    objective = objective_of({}, [DeepKDSplitter()], forward_kl, {"task": 0.0})

    def test_a_term_that_is_not_named_has_no_weight(self) -> None:
        assert on_other_rows(self.objective, {"task": 1.0}).weights == {"task": 1.0}
        assert on_other_rows(self.objective, {"target": 2.0}).weights == {"target": 2.0}

    def test_the_task_alone_needs_no_teacher(self) -> None:
        assert not on_other_rows(self.objective, {"task": 1.0}).of_teacher
        assert on_other_rows(self.objective, {"target": 1.0}).of_teacher

    @pytest.mark.parametrize("terms", [{"tusk": 1.0}, {"kd": 1.0}, {"target": 0.0}])
    def test_an_unknown_term_or_none_is_refused(self, terms: dict[str, float]) -> None:
        with pytest.raises(UserError):
            on_other_rows(self.objective, terms)

    def test_the_momentum_policy_sees_the_terms_of_all_rows(self) -> None:
        class Each:
            def streams(self, terms: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
                return {term: (term,) for term in terms}

        others = on_other_rows(self.objective, {"task": 1.0})
        made: Any = Each()
        assert [*Method(self.objective, made, others).streams] == ["target", "non_target", "task"]
