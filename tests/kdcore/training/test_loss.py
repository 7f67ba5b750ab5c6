"""The loss for loops of one's own: equal to the engine, and to a run of kdcore's Trainer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kdcore.components.registry import installed
from kdcore.data.rows import collate
from kdcore.errors import UserError
from kdcore.method.generators import generator_at
from kdcore.method.logits import Head, HiddenLogits
from kdcore.method.loss_engine import LossEngine
from kdcore.method.records import Batch
from kdcore.models.assembly import Assembly
from kdcore.specs.parts.schedule import COLDEST, HOTTEST
from kdcore.specs.parts.student_method import StudentMethodSpec
from kdcore.specs.parts.training import MethodSpec
from kdcore.training.loss import DistillationLoss
from kdcore.training.method import build_objective
from tests.kdcore.training.test_composition import every
from tests.kdcore.training.trainer.test_trainer import rows, trainer
from tests.tiny.models import language_model


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(11, (4, 7))
    labels[:, :3] = -100
    return torch.randn(4, 7, 11, requires_grad=True), torch.randn(4, 7, 11), labels


def test_equals_forward_kl_over_the_shifted_positions() -> None:
    student, teacher, labels = tensors()
    found = DistillationLoss(divergence="forward_kl", normalize="token")(student, teacher, labels)
    p, q = (x[:, 2:-1].log_softmax(-1) for x in (teacher, student))
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("tau", [COLDEST, 1.0, HOTTEST])
def test_rounding_leaves_the_loss_of_each_temperature(tau: float) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(4, 1000, generator=generator) for _ in "ab")
    found = DistillationLoss(tau=tau)(student, teacher, torch.zeros(4, dtype=torch.int64))
    p, q = ((logits.double() / tau).log_softmax(-1) for logits in (teacher, student))
    wanted = tau**2 * (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=0)


NORMALIZE = ["sequence", "token", "accepted"]


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_equals_the_engine_for_each_gate_divergence_and_splitter(normalize: str) -> None:
    student, teacher, labels = tensors()
    reference = torch.randn(4, 7, 11)
    shifted, mask = labels[:, 1:], labels[:, 1:] != -100
    batch = Batch({}, shifted, mask, torch.arange(4))
    whole = float(mask.sum() if normalize == "token" else 4)
    refused = 0
    product = list(itertools.product(every("gate"), every("divergence"), every("splitter")))
    dealt = product[NORMALIZE.index(normalize) :: 29]  # a prime deals out each component
    for place, kind in enumerate(("gate", "divergence", "splitter")):
        assert all(any(each[place] == one for each in dealt) for one in every(kind))
    for gate, divergence, splitter in dealt:
        method: dict[str, Any] = {
            "gates": [gate],
            "divergence": divergence,
            "splitters": [splitter],
            "terms": {"task": 0.5},
            "normalize": normalize,
        }
        spec = MethodSpec.model_validate(method)
        try:
            loss = DistillationLoss(**method, steps=10, chunk=4)
            assert loss.engine.objective.reference is None or gate["name"] == "adaspec"
            objective = build_objective(spec, Assembly(installed()))
            wanted = LossEngine(objective, {"all": tuple(objective.weights)}, chunk=4)(
                *(HiddenLogits(x[:, :-1][mask], Head(), 11) for x in (student, teacher)),
                batch,
                whole=whole,
                progress=0.0,
                generator=generator_at("cpu", 0, 0, 0, 0),
                reference=HiddenLogits(reference[:, :-1][mask], Head(), 11),
            ).losses["all"]
        except UserError as wrong:
            assert splitter["name"] == "top_k_mask", wrong
            refused += 1
            continue
        found = loss(student, teacher, labels, reference=reference)
        assert found == wanted, method
        (ours,) = torch.autograd.grad(found, student)
        assert torch.equal(ours, torch.autograd.grad(wanted, student)[0]), method
    assert refused == sum(splitter["name"] == "top_k_mask" for _, _, splitter in dealt)


@pytest.mark.parametrize(
    "method",
    [
        {"gates": [{"name": "speckd", "verification": "sampling", "k": 2}]},
        {"splitters": ["deepkd"], "terms": {"task": [[0, 1.0], [1, 0.2]]}, "normalize": "token"},
    ],
    ids=["a gate that samples", "schedules"],
)
def test_a_plain_loop_reaches_the_weights_of_a_run(tmp_path: Path, method: dict[str, Any]) -> None:
    """Three steps of two micro-batches, the same rows in the same order."""
    ours = trainer(
        tmp_path,
        method,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )
    ours.train()

    student, teacher = language_model(seed=1), language_model(seed=2)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    loss_of = DistillationLoss(**method, steps=3, chunk=7, seed=ours.args.seed)
    pads = {"input_ids": 0, "attention_mask": 0}
    loader = list(DataLoader(rows(), batch_size=2, collate_fn=lambda each: collate(each, pads)))  # type: ignore[arg-type, var-annotated]
    student.train()
    logged = []
    for step in range(3):
        batches = loader[2 * step : 2 * step + 2]
        by_token = method.get("normalize") == "token"
        items = sum(b["mask"].sum() if by_token else b["mask"].any(1).sum() for b in batches)
        for batch in batches:
            inputs = {name: batch[name] for name in pads}
            with torch.no_grad():
                taught = teacher(**inputs).logits
            loss_of(
                student(**inputs).logits,
                taught,
                batch["labels"],
                mask=batch["mask"],
                num_items=items,
                shifted=True,
            ).backward()
        optimizer.step()
        optimizer.zero_grad()
        logged.append(loss_of.step())
    for name, value in ours.model.named_parameters():
        torch.testing.assert_close(dict(student.named_parameters())[name], value)
    for found, wanted in zip(logged, ours.state.log_history[:-1], strict=True):
        for name in found.keys() - {"progress"}:
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), name


ADVANTAGE = {"name": "minillm", "gamma": 0.9}
OF_SAMPLES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"splitters": ["deepkd"], "divergences": {"target": "reverse_kl"}}, {}),
    ({"advantage": ADVANTAGE, "gates": ["entropy"]}, {"sampled": True}),
    ({"advantage": ADVANTAGE, "momentum": "per_term"}, {"sampled": True, "teacher_share": 0.3}),
    ({"advantage": ADVANTAGE, "sampled_divergence": "jsd"}, {}),
    ({"sampled_divergence": "jsd", "normalize": "accepted"}, {"sampled": True}),
]


@pytest.mark.parametrize(("method", "said"), OF_SAMPLES)
def test_equals_the_engine_on_sampled_responses(
    method: dict[str, Any], said: dict[str, Any]
) -> None:
    student, teacher, labels = tensors()
    shifted, mask = labels[:, 1:], labels[:, 1:] != -100
    found = DistillationLoss(**method, steps=1)(student, teacher, labels, **said)
    assembly, spec = Assembly(installed()), StudentMethodSpec.model_validate(method)
    objective, policy = build_objective(spec, assembly), assembly.build(spec.momentum)
    engine = LossEngine(objective, policy.streams(tuple(objective.weights)), 512)
    flat = [HiddenLogits(x[:, :-1][mask], Head(), 11) for x in (student, teacher)]
    step = engine(
        *flat,
        Batch({}, shifted, mask, torch.arange(4), **said),
        whole=4.0,
        progress=0.0,
        generator=generator_at("cpu", 0, 0, 0, 0),
    )
    wanted = torch.stack([*step.losses.values()]).sum()
    assert found == wanted
    (ours,) = torch.autograd.grad(found, student)
    assert torch.equal(ours, torch.autograd.grad(wanted, student)[0])


def test_an_advantage_changes_nothing_on_the_data() -> None:
    student, teacher, labels = tensors()
    with_it, without = (DistillationLoss(advantage=a) for a in (ADVANTAGE, None))
    assert with_it(student, teacher, labels) == without(student, teacher, labels)
    assert with_it(student, teacher, labels, sampled=True) != without(student, teacher, labels)


@pytest.mark.parametrize("said", [{"teacher_share": 0.2}, {"teacher_share": 1, "sampled": True}])
def test_a_share_that_did_not_sample_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is not a share of what sampled the labels"):
        DistillationLoss()(*tensors(), **said)


@pytest.mark.parametrize("normalize", ["sequence", "token", "accepted"])
def test_two_micro_batches_give_the_gradient_of_one(normalize: str) -> None:
    student, teacher, labels = tensors()
    loss = DistillationLoss(gates=["speckd"], divergence="forward_kl", normalize=normalize)
    (whole,) = torch.autograd.grad(loss(student, teacher, labels), student)
    items = 16 if normalize == "token" else 4
    for half in (slice(0, 2), slice(2, 4)):
        loss(student[half], teacher[half], labels[half], num_items=items).backward()
    torch.testing.assert_close(student.grad, whole)


def test_hidden_states_and_their_head_give_the_gradients_of_whole_logits() -> None:
    _, teacher, labels = tensors()
    body, head = torch.randn(4, 7, 6, requires_grad=True), nn.Linear(6, 11)
    loss = DistillationLoss(gates=["speckd"], terms={"task": 0.5}, chunk=3)
    known = [body, head.weight, head.bias]
    whole = torch.autograd.grad(loss(head(body), teacher, labels), known)
    loss((body, head), teacher, labels).backward()
    for tensor, wanted in zip(known, whole, strict=True):
        torch.testing.assert_close(tensor.grad, wanted)


def test_a_classifier_has_no_shift() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    labels = torch.tensor([0, 1, 2, 3, 4, -100])
    found = DistillationLoss(splitters=["target_split"], terms={"task": 1.0})(
        student, teacher, labels
    )
    cross_entropy = nn.functional.cross_entropy(student, labels)
    assert found > cross_entropy
    alone = DistillationLoss(terms={"task": 1.0, "kd": 0.0})
    torch.testing.assert_close(alone(student, None, labels), cross_entropy)


def test_streams_are_those_of_the_momentum_policy_and_sum_to_the_loss() -> None:
    student, teacher, labels = tensors()
    loss = DistillationLoss(splitters=["deepkd"], momentum="deepkd", terms={"task": 1.0}, steps=9)
    streams = loss.by_stream(student, teacher, labels)
    assert set(streams) == set(loss.policy.streams(("task", "target", "non_target")))
    (apart,) = torch.autograd.grad(sum(streams.values()), student, retain_graph=True)
    (whole,) = torch.autograd.grad(loss(student, teacher, labels), student)
    torch.testing.assert_close(apart, whole)


def test_a_component_may_be_an_object() -> None:
    student, teacher, labels = tensors()
    named = DistillationLoss(gates=["speckd", "speckd"])
    given = DistillationLoss(gates=list(named.engine.objective.gates.values()))
    found = given(student, teacher, labels)
    assert found == named(student, teacher, labels)
    assert list(given.engine.objective.gates) == ["SpecKD", "SpecKD#2"]


def test_figures_are_the_means_of_the_step() -> None:
    student, teacher, labels = tensors()
    loss = DistillationLoss(gates=["speckd"], terms={"task": 1.0})
    single = [loss(student, teacher, labels), loss(student * 2, teacher, labels)]
    figures = loss.step()
    assert figures["loss"] == pytest.approx(float(sum(single).detach()) / 2)
    assert set(figures) == {"loss", "term/kd", "term/task", "acceptance/speckd"}
    with pytest.raises(UserError, match="no loss was made"):
        loss.step()


def test_a_resumed_loop_goes_on_as_the_unbroken_one() -> None:
    student, teacher, labels = tensors()
    method: dict[str, Any] = {
        "gates": [{"name": "speckd", "verification": "sampling", "k": 2}],
        "divergence": "taid",
        "steps": 4,
    }
    unbroken, begun = DistillationLoss(**method), DistillationLoss(**method)
    for loss in (unbroken, begun):
        for _ in range(2):
            loss(student, teacher, labels)
            loss.step()
    resumed = DistillationLoss(**method)
    resumed.load_state_dict(begun.state_dict())
    assert resumed(student, teacher, labels) == unbroken(student, teacher, labels)
    assert resumed.step() == unbroken.step()


def test_nothing_learned_gives_zero_and_a_zero_gradient() -> None:
    student, teacher, labels = tensors()
    loss = DistillationLoss(gates=["speckd"])(student, teacher, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize(
    ("method", "cause"),
    [
        ({"gates": ["spekd"]}, "unknown gate 'spekd'"),
        ({"gates": [{"name": "speckd", "k": 0}]}, "k: "),
        ({"gates": [3]}, "3 does not satisfy the Protocol Gate or RankedGate"),
        ({"terms": {"tsk": 1.0}}, "unknown term 'tsk'"),
        ({"normalize": "rows"}, "normalize: "),
        ({"advantage": "minilm"}, "unknown advantage 'minilm'"),
        ({"divergences": {"target": "jsd"}}, "unknown part 'target'"),
        ({"divergence": "taid"}, "divergence learns from each step"),
    ],
)
def test_a_wrong_method_is_refused(method: dict[str, Any], cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        DistillationLoss(**method)


def test_a_schedule_is_refused_where_the_progress_is_not_known() -> None:
    student, teacher, labels = tensors()
    for method in (
        {"tau": [[0, 1.0], [1, 2.0]]},
        {"splitters": ["dkd"]},
        {"splitters": ["deepkd"]},
    ):
        with pytest.raises(UserError, match="the progress of the training is not known"):
            DistillationLoss(**method)(student, teacher, labels)  # type: ignore[arg-type]


def test_tensors_that_do_not_fit_are_refused() -> None:
    student, teacher, labels = tensors()
    loss = DistillationLoss()
    with pytest.raises(UserError, match="numbers of classes: student 11, teacher 10"):
        loss(student, teacher[..., :10], labels)
    with pytest.raises(UserError, match=r"student's tensor \[4, 7, 11\] does not fit labels"):
        loss(student, teacher, labels[:, 1:])
    with pytest.raises(UserError, match="there is no teacher"):
        loss(student, None, labels)
    with pytest.raises(UserError, match="classes=12, but a model has 11"):
        DistillationLoss(classes=12)(student, teacher, labels)
    cut = DistillationLoss(classes=10)(student, teacher[..., :10], labels.clamp(max=9))
    assert cut == DistillationLoss()(student[..., :10], teacher[..., :10], labels.clamp(max=9))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_labels_of_any_integers_are_read(dtype: torch.dtype) -> None:
    student, teacher, labels = tensors()
    loss = DistillationLoss(terms={"task": 0.5}, splitters=["target_split"])
    found = loss(student, teacher, labels.to(dtype))
    assert found == loss(student, teacher, labels)


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ({"labels": torch.ones(4, 7)}, r"the labels are a float32 tensor \[4, 7\]"),
        ({"labels": torch.ones(4, 7, dtype=torch.bool)}, "the labels are a bool tensor"),
        ({"labels": None}, "the labels are a NoneType"),
        ({"labels": torch.full((4, 7), 11)}, "the labels contain 11, but the classes are 0 to 10"),
        ({"labels": torch.full((4, 7), -1)}, "the labels contain -1"),
        ({"student": [[0.0]]}, "the student's logits are a list"),
        ({"teacher": torch.ones(4, 7, 11).long()}, "the teacher's logits are an int64 tensor"),
        ({"mask": torch.full((4, 7), 0.5)}, "the mask is a float32 tensor"),
        ({"mask": torch.ones(4, 6, dtype=torch.bool)}, r"the mask \[4, 6\] does not fit labels"),
        ({"num_items": 0}, "num_items=0 is not a number of rows .*, and this micro-batch has 4"),
        ({"num_items": -8.0}, "num_items=-8.0 is not"),
        ({"num_items": float("nan")}, "num_items=nan is not"),
        ({"num_items": torch.ones(2)}, "num_items=tensor"),
    ],
)
def test_a_wrong_argument_is_refused(given: dict[str, Any], cause: str) -> None:
    student, teacher, labels = tensors()
    arguments = {"student": student, "teacher": teacher, "labels": labels} | given
    with pytest.raises(UserError, match=cause):
        DistillationLoss()(**arguments)


@pytest.mark.parametrize("name", ["classes", "steps", "chunk"])
def test_a_count_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=0 is below 1"):
        DistillationLoss(**{name: 0})


def test_the_state_of_a_loss_with_other_components_is_refused() -> None:
    plain, taid = DistillationLoss(), DistillationLoss(divergence="taid", steps=2)
    for loss, other in ((plain, taid), (taid, plain)):
        with pytest.raises(UserError, match="only one of the two has divergence/momentum, "):
            loss.load_state_dict(other.state_dict())


def test_the_loss_in_inference_mode_is_that_of_a_step() -> None:
    student, teacher, labels = tensors()
    head = nn.Linear(11, 11)
    loss = DistillationLoss(gates=["entropy"], terms={"task": 0.5}, chunk=4)
    wanted = loss((student, head), (teacher, head), labels)
    with torch.inference_mode():
        assert loss((student.clone(), head), (teacher.clone(), head), labels) == wanted


def test_gate_weights_outside_the_range_of_their_gate_are_refused_at_the_end_of_the_step() -> None:
    """The floor of a gate is the least weight; what rounding does is tolerated."""

    class Given:
        floor = 0.5

        def __init__(self, least: float) -> None:
            self.least = least

        def __call__(self, batch: Any) -> Tensor:
            return torch.where(batch.labels == batch.labels[0, 0], self.least, batch.mask.float())

    student, teacher, labels = tensors()
    right, wrong = (DistillationLoss(gates=[Given(least)]) for least in (0.5 - 1e-3, 0.4))
    for loss in (right, wrong):
        loss(student, teacher, labels)
    assert right.step().keys() >= {"loss"}
    with pytest.raises(UserError, match=r"'Given' gave \d+ weights? outside \[0.5, 1\] in step 1"):
        wrong.step()
