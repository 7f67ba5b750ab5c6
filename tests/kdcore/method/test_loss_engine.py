"""The engine against the same loss written over whole logits; chunks, padding, streams."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.errors import UserError
from kdcore.method.loss_engine import LossEngine, StepLoss
from kdcore.method.objective import Objective
from kdcore.method.records import Batch, LogitBatch, Part
from kdcore.training.model_view import ModelView
from tests.tiny.models import FAMILIES, classifier, language_model

ALL = {"all": ("kd", "task")}


class ForwardKL:
    """sum_k p_k (log p_k - log q_k)."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (teacher.exp() * (teacher - student)).sum(-1)


class HalfConfident:
    """A plain gate: accepts where the student's best logit beats the teacher's."""

    floor = 0.25

    def __call__(self, batch: LogitBatch) -> Tensor:
        return torch.where(batch.student.amax(-1) > batch.teacher.amax(-1), 1.0, self.floor)


class HardGate(HalfConfident):
    floor = 0.0


class TopHalf:
    """A ranked gate: the half of the positions with the largest student logit."""

    def score(self, batch: LogitBatch) -> Tensor:
        return batch.student.amax(-1)

    def weigh(self, scores: Tensor, progress: float) -> Tensor:
        return (scores >= scores.median()).float()


class Noise:
    """A gate of pure randomness from the batch's generator."""

    def __call__(self, batch: LogitBatch) -> Tensor:
        shape = batch.mask.shape
        return torch.rand(shape, generator=batch.generator).round()


class EvenAndOdd:
    """A splitter: even classes in one part, odd ones in another."""

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return ("even", "odd")

    def __call__(self, parts: dict[str, Part], batch: LogitBatch) -> dict[str, Part]:
        whole = parts["kd"]
        return {
            name: Part(whole.student[..., i::2], whole.teacher[..., i::2], whole.weight * (i + 1))
            for i, name in enumerate(("even", "odd"))
        }


def objective(
    gates: tuple[Any, ...] = (),
    splitters: tuple[Any, ...] = (),
    weights: dict[str, Any] | None = None,
    **rest: Any,
) -> Objective:
    return Objective(
        gates={f"gate{i}": gate for i, gate in enumerate(gates)},
        splitters=splitters,
        divergence=ForwardKL(),
        weights=weights or {"task": 0.5, "kd": 2.0},
        **rest,
    )


def lm_batch(rows: int = 3, length: int = 9, pad: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 61, (rows, length), generator=generator)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        mask[row, 2 : 5 + row] = True
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    labels = tokens.roll(-1, 1)
    if pad:
        inputs = {k: torch.nn.functional.pad(v, (0, pad)) for k, v in inputs.items()}
        labels = torch.nn.functional.pad(labels, (0, pad))
        mask = torch.nn.functional.pad(mask, (0, pad))
    return Batch(inputs, labels, mask, torch.arange(rows))


def run(
    made: Objective,
    batch: Batch,
    student: Any,
    teacher: Any,
    *,
    classes: int = 61,
    chunk: int = 512,
    streams: Any = None,
    seed: int = 7,
) -> tuple[StepLoss, dict[str, list[Tensor]]]:
    """The step's loss and, for each stream, the gradient of each parameter."""
    engine = LossEngine(made, streams or {"all": tuple(made.weights)}, chunk)
    with torch.no_grad():
        theirs = ModelView(teacher, classes)(teacher, batch)
    step = engine(
        ModelView(student, classes)(student, batch),
        theirs,
        batch,
        whole=float(batch.mask.any(1).sum()),
        progress=0.5,
        generator=torch.Generator().manual_seed(seed),
    )
    parameters = list(student.parameters())
    grads = {
        stream: list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
        for stream, loss in step.losses.items()
    }
    return step, grads


def whole_loss(made: Objective, batch: Batch, student: Any, teacher: Any) -> Tensor:
    """The same loss in the plainest way: all logits, a loop over rows."""

    def logits(model: Any) -> Tensor:
        found = model(**batch.inputs).logits.float()
        return found if found.ndim == 3 else found[:, None]

    z_student, z_teacher = logits(student), logits(teacher).detach()
    position = torch.arange(batch.mask.shape[1]).expand_as(batch.mask)
    seen = LogitBatch(
        z_student, z_teacher, batch.labels, batch.mask, 0.5, torch.Generator(), position
    )
    gate = torch.ones(batch.mask.shape)
    for each in made.gates.values():
        gate = gate * each(seen).detach()
    total = torch.zeros(())
    rows = [row for row in range(len(batch.mask)) if batch.mask[row].any()]
    for row in rows:
        at = batch.mask[row]
        kl = ForwardKL()(z_student[row, at].log_softmax(-1), z_teacher[row, at].log_softmax(-1))
        task = torch.nn.functional.cross_entropy(
            z_student[row, at], batch.labels[row, at], reduction="none"
        )
        total = total + (2.0 * gate[row, at] * kl + 0.5 * task).mean() / len(rows)
    return total


def close(left: list[Any], right: list[Any], **tolerance: float) -> None:
    for a, b in zip(left, right, strict=True):
        if a is None or b is None:
            assert (a is None or not a.any()) and (b is None or not b.any())
        else:
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gate", [HalfConfident, HardGate])
def test_value_and_gradient_equal_the_loss_over_whole_logits(family: str, gate: Any) -> None:
    student, teacher = language_model(family, seed=1), language_model(family, seed=2)
    made, batch = objective((gate(),)), lm_batch()
    view = ModelView(student, 61)
    assert view.takes_the_head_off, "the head of a known family must come off"
    step, grads = run(made, batch, student, teacher, chunk=4)
    expected = whole_loss(made, batch, student, teacher)
    torch.testing.assert_close(step.losses["all"], expected)
    plain = torch.autograd.grad(expected, list(student.parameters()), allow_unused=True)
    close(grads["all"], list(plain), rtol=1e-4, atol=1e-6)


def test_a_classifier_goes_the_same_way() -> None:
    student, teacher = classifier(seed=1), classifier(seed=2)
    tokens = torch.randint(3, 61, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = Batch(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        torch.tensor([[0], [3], [6], [1]]),
        torch.ones(4, 1, dtype=torch.bool),
        torch.arange(4),
    )
    made = objective((HalfConfident(),))
    step, grads = run(made, batch, student, teacher, classes=7, chunk=3)
    expected = whole_loss(made, batch, student, teacher)
    torch.testing.assert_close(step.losses["all"], expected)
    plain = torch.autograd.grad(expected, list(student.parameters()), allow_unused=True)
    close(grads["all"], list(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "gates", [(), (HardGate(),), (TopHalf(),), (Noise(), HalfConfident(), Noise())]
)
@pytest.mark.parametrize("normalize", ["sequence", "token", "accepted"])
def test_chunk_length_and_padding_change_nothing(gates: Any, normalize: str) -> None:
    student, teacher = language_model(seed=1), language_model(seed=2)
    made = objective(gates, normalize=normalize)
    step, grads = run(made, lm_batch(), student, teacher, chunk=512)
    for chunk, pad in ((1, 0), (5, 0), (512, 4)):
        other, others = run(made, lm_batch(pad=pad), student, teacher, chunk=chunk)
        torch.testing.assert_close(other.losses["all"], step.losses["all"], rtol=1e-5, atol=1e-6)
        close(others["all"], grads["all"], rtol=1e-4, atol=1e-6)
        for label, rate in step.acceptance.items():
            torch.testing.assert_close(other.acceptance[label], rate)


def test_streams_add_up_to_one_stream() -> None:
    student, teacher = language_model(seed=1), language_model(seed=2)
    weights = {"task": 0.5, "even": 1.0, "odd": [[0.0, 0.0], [1.0, 4.0]]}
    made = objective((HardGate(),), (EvenAndOdd(),), weights)
    step, together = run(made, lm_batch(), student, teacher, chunk=4)
    apart, grads = run(
        made,
        lm_batch(),
        student,
        teacher,
        chunk=4,
        streams={"slow": ("task", "odd"), "fast": ("even",)},
    )
    torch.testing.assert_close(sum(apart.losses.values()), step.losses["all"])
    added = [
        a if b is None else b if a is None else a + b
        for a, b in zip(grads["slow"], grads["fast"], strict=True)
    ]
    close(added, together["all"], rtol=1e-4, atol=1e-6)


def test_rows_without_a_learned_position_count_for_nothing() -> None:
    student, teacher = language_model(seed=1), language_model(seed=2)
    batch = lm_batch()
    mask = batch.mask.clone()
    mask[1] = False
    emptied = Batch(batch.inputs, batch.labels, mask, batch.index)
    step, _ = run(objective(), emptied, student, teacher)
    torch.testing.assert_close(
        step.losses["all"], whole_loss(objective(), emptied, student, teacher)
    )
    nothing = Batch(batch.inputs, batch.labels, torch.zeros_like(mask), batch.index)
    engine = LossEngine(objective(), ALL, 8)
    view = ModelView(student, 61)
    step = engine(
        view(student, nothing),
        view(student, nothing),
        nothing,
        whole=1.0,
        progress=0.0,
        generator=torch.Generator(),
    )
    assert float(step.losses["all"].detach()) == 0.0
    step.losses["all"].backward()


def test_acceptance_is_the_mean_over_sequences_of_each_ones_share() -> None:
    student, teacher = language_model(seed=1), language_model(seed=2)
    batch = lm_batch()
    step, _ = run(objective((HalfConfident(),)), batch, student, teacher, chunk=3)
    z_student = student(**batch.inputs).logits.amax(-1)
    accepted = (z_student > teacher(**batch.inputs).logits.amax(-1)).float()
    shares = [accepted[row, batch.mask[row]].mean() for row in range(3)]
    torch.testing.assert_close(step.acceptance["gate0"], torch.stack(shares).mean())
    by_token, _ = run(objective((HalfConfident(),), normalize="token"), batch, student, teacher)
    torch.testing.assert_close(by_token.acceptance["gate0"] * 3, accepted[batch.mask].sum())


def test_no_gate_changes_the_mean_of_the_task() -> None:
    """Also where the gated terms are means over what it accepts."""
    student, teacher = language_model(seed=1), language_model(seed=2)
    for gates in ((), (HardGate(),), (TopHalf(),), (lambda batch: 0.0 * batch.labels,)):
        step, _ = run(objective(gates, normalize="accepted"), lm_batch(), student, teacher)
        plain, _ = run(objective(), lm_batch(), student, teacher)
        torch.testing.assert_close(step.terms["task"], plain.terms["task"])


class Refusing:
    """A splitter that nothing asks."""

    reads_spans = True

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names

    def __call__(self, parts: dict[str, Part], batch: LogitBatch) -> dict[str, Part]:
        raise AssertionError("no term has a weight for its parts")


@pytest.mark.parametrize("term", ["task", "label"])
def test_a_splitter_whose_parts_have_weight_0_costs_nothing(term: str) -> None:
    made = objective(splitters=(Refusing(),), weights={term: 1.0})
    assert not made.reads_spans
    step, _ = run(made, lm_batch(), language_model(seed=1), language_model(seed=2))
    plain, _ = run(objective(), lm_batch(), language_model(seed=1), language_model(seed=2))
    torch.testing.assert_close(step.losses["all"], plain.terms["task"])


@pytest.mark.parametrize(("gates", "passes"), [((), 1), ((HardGate(),), 2)])
def test_the_positions_are_passed_twice_for_gates_alone(gates: Any, passes: int) -> None:
    student, teacher, batch = language_model(seed=1), language_model(seed=2), lm_batch()
    theirs, asked = ModelView(teacher, 61)(teacher, batch), []

    def logits(place: slice) -> Tensor:
        asked.append(place)
        return theirs.logits(place)

    LossEngine(objective(gates, normalize="accepted"), ALL, 512)(
        ModelView(student, 61)(student, batch),
        SimpleNamespace(logits=logits),  # type: ignore[arg-type]
        batch,
        whole=3.0,
        progress=0.5,
        generator=torch.Generator().manual_seed(7),
    )
    assert len(asked) == passes


def test_features_alone_in_a_stream_leave_the_head_alone() -> None:
    student, teacher = language_model(seed=1), language_model(seed=2)
    made = objective(weights={"kd": 1.0, "feature": 1.0})
    streams = {"logits": ("kd",), "features": ("feature",)}
    _, grads = run(made, lm_batch(), student, teacher, streams=streams, chunk=5)
    head = [n for n, _ in student.named_parameters()].index("lm_head.weight")
    assert not grads["features"][head].any() and grads["logits"][head].any()
    assert any(grad is not None and grad.any() for grad in grads["features"])


def test_features_of_a_model_whose_head_stays_on_are_refused() -> None:
    """Its logits would be compared in their place."""
    model, tokens = classifier(), torch.ones(2, 3, dtype=torch.int64)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    learned = torch.ones(2, 1, dtype=torch.bool)
    batch = Batch(inputs, torch.zeros(2, 1, dtype=torch.int64), learned, torch.arange(2))
    with pytest.raises(UserError, match="the teacher gives no hidden states"):
        run(objective(weights={"feature": 1.0}), batch, model, model, classes=7)


def test_padded_vocabularies_are_sliced_to_the_shared_part() -> None:
    student, teacher = language_model(classes=64, seed=1), language_model(classes=61, seed=2)
    step, grads = run(objective(), lm_batch(), student, teacher, classes=61)
    assert step.losses["all"].isfinite()
    head = grads["all"][[n for n, _ in student.named_parameters()].index("lm_head.weight")]
    assert not head[61:].any() and head[:61].any()


def test_an_unknown_architecture_falls_back_to_whole_logits() -> None:
    student, teacher = language_model(seed=1), language_model(seed=2)
    inner = student.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        return SimpleNamespace(logits=inner(*args, **inputs).logits * 3.0)

    student.forward = forward
    assert not ModelView(student, 61).takes_the_head_off
    step, _ = run(objective(), lm_batch(), student, teacher)
    torch.testing.assert_close(
        step.losses["all"], whole_loss(objective(), lm_batch(), student, teacher)
    )


@pytest.mark.parametrize("gates", [(), (HalfConfident(),), (HardGate(),), (TopHalf(),)])
def test_the_term_label_is_the_cross_entropy_that_the_gates_weigh(gates: tuple[Any, ...]) -> None:
    """The mean over rows of (1/|y|) sum_t w_t (-log q(y_t)); without gates it is the task."""
    student, teacher, batch = language_model(seed=1), language_model(seed=2), lm_batch()
    step, _ = run(objective(gates, weights={"label": 1.0, "task": 1.0}), batch, student, teacher)
    logits = student(**batch.inputs).logits[batch.mask].double()
    surprise = -logits.log_softmax(-1).gather(-1, batch.labels[batch.mask][:, None])[:, 0]
    weights = torch.ones_like(surprise)
    if gates:
        best = teacher(**batch.inputs).logits[batch.mask].amax(-1)
        ours = logits.amax(-1)
        weights = (
            (ours >= ours.median()).double()
            if isinstance(gates[0], TopHalf)
            else torch.where(ours > best, 1.0, gates[0].floor).double()
        )
    counts = batch.mask.sum(1)
    expected = (weights * surprise / counts.repeat_interleave(counts)).sum() / len(counts)
    assert float(step.terms["label"]) == pytest.approx(float(expected), rel=1e-5)
    assert gates or torch.equal(step.terms["label"], step.terms["task"])


def test_a_gate_that_gives_another_shape_is_named() -> None:
    student = language_model(seed=1)

    def one_for_all(batch: LogitBatch) -> Tensor:
        return torch.ones(1, 1)

    with pytest.raises(
        UserError,
        match=r"gate 'gate0' returned weights of shape \[1, 1\], expected .* \[1, 12\]",
    ):
        run(objective((one_for_all,)), lm_batch(), student, student)


@pytest.mark.parametrize("given", [None, [1.0] * 12])
def test_a_gate_that_gives_no_tensor_is_named(given: Any) -> None:
    student = language_model(seed=1)
    with pytest.raises(UserError, match=r"gate 'gate0' returned weights of type \w+, expected"):
        run(objective((lambda batch: given,)), lm_batch(), student, student)


@pytest.mark.parametrize("given", [None, torch.tensor(1.0)])
def test_a_divergence_that_gives_another_shape_is_refused(given: Any) -> None:
    """A mean over the positions, for example, would hide what the gates do."""
    student = language_model(seed=1)
    made = replace(objective(()), divergence=lambda student, teacher: given)
    with pytest.raises(UserError, match=r"term 'kd' returned values of .* of shape \[1, 12\]"):
        run(made, lm_batch(), student, student)


@pytest.mark.parametrize("weight", [1.0, torch.tensor(1.0), torch.ones(1, 1)])
def test_a_splitter_that_gives_another_shape_of_weights_is_refused(weight: Any) -> None:
    class Heavier:
        def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
            return names

        def __call__(self, parts: Any, batch: LogitBatch) -> dict[str, Part]:
            return {name: replace(part, weight=weight) for name, part in parts.items()}

    student = language_model(seed=1)
    made = replace(objective(()), splitters=(Heavier(),))
    with pytest.raises(UserError, match=r"the splitter of 'kd' returned weights of .* \[1, 12\]"):
        run(made, lm_batch(), student, student)


@pytest.mark.parametrize("method", ["score", "weigh"])
def test_a_ranked_gate_that_gives_another_shape_is_named(method: str) -> None:
    """Broadcast, it would give every position one weight."""
    gate: Any = TopHalf()
    setattr(gate, method, lambda *_: torch.ones(1))
    student = language_model(seed=1)
    with pytest.raises(
        UserError, match=r"gate0. returned (scores|weights) of shape \[1\], expected"
    ):
        run(objective((gate,)), lm_batch(), student, student)


def test_components_with_a_memory_are_told_the_sum_of_the_parts_alone() -> None:
    class Remembering(HalfConfident):
        def step_done(self, metrics: Any) -> None:
            self.told = metrics

        def state_dict(self) -> dict[str, Tensor]:
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    gate, matcher = Remembering(), torch.nn.Identity()
    weights = dict.fromkeys(("target", "non_target", "task", "policy", "hidden"), 0.5)
    made = Objective({"gate": gate}, (), ForwardKL(), weights, matchers={"hidden": matcher})
    figures = {f"term/{name}": 2.0**place for place, name in enumerate(weights)}
    made.step_done(figures | {"auxiliary/term/target": 64.0, "loss": 9.0})
    assert gate.told["distilled"] == 1 + 2 and gate.told["loss"] == 9
