"""DeepKD's splitters against the float64 formulas, and the identities they must keep."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from kdcore.components.registry import Registry
from kdcore.errors import UserError
from kdcore.method.protocols import KnowledgeSplitter
from kdcore.method.records import LOG_ZERO, LogitBatch, Part
from kdcore_deepkd import plugin
from kdcore_deepkd.params import CurriculumParams
from kdcore_deepkd.top_k_mask import classes_kept
from tests.reference.deepkd import decoupled as reference
from tests.reference.deepkd import top_k_mask as reference_mask
from tests.reference.positions import per_position

REGISTRY = Registry()
REGISTRY.register(plugin, "deepkd", "kdcore", "0")
SPLITTERS = REGISTRY.names("splitter")

seeds = st.integers(0, 2**31)
classes = st.integers(2, 12)
taus = st.sampled_from([1.0, 2.0, 4.0])
scales = st.sampled_from([0.1, 3.0, 30.0])
few = settings(max_examples=40, deadline=None)


def build(name: str, **params: object) -> KnowledgeSplitter:
    component = REGISTRY.component("splitter", name)
    return REGISTRY.attribute(component)(component.params.model_validate(params), None)


def logit_batch(
    seed: int = 0,
    v: int = 7,
    scale: float = 3.0,
    dtype: torch.dtype = torch.float64,
    progress: float = 1.0,
) -> LogitBatch:
    generator = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(2, 3, v, generator=generator, dtype=dtype)
    teacher = scale * torch.randn(2, 3, v, generator=generator, dtype=dtype)
    labels = torch.randint(v, (2, 3), generator=generator)
    mask = torch.ones(2, 3, dtype=torch.bool)
    position = torch.arange(3).expand(2, -1)
    return LogitBatch(
        student.requires_grad_(), teacher, labels, mask, progress, generator, position
    )


def whole(batch: LogitBatch, tau: float = 1.0, weight: float = 1.0) -> dict[str, Part]:
    weights = torch.full(batch.mask.shape, weight, dtype=batch.student.dtype)
    return {"kd": Part(batch.student / tau, batch.teacher / tau, weights)}


def term(part: Part, tau: float = 1.0) -> Tensor:
    """tau^2 KL(teacher || student) [B, T], without the part's weight."""
    student, teacher = part.student.log_softmax(-1), part.teacher.log_softmax(-1)
    return tau**2 * (teacher.exp() * (teacher - student)).sum(-1)


def slope(value: Tensor, batch: LogitBatch) -> Tensor:
    return torch.autograd.grad(value.sum(), batch.student, retain_graph=True)[0]


def at_each_position(formula, batch: LogitBatch, *more) -> Tensor:
    """formula(student, teacher, label, *more) at each position."""

    def one(student, teacher, label):
        return formula(student, teacher, int(label), *more)

    arrays = batch.student.detach().numpy(), batch.teacher.numpy(), batch.labels.numpy()
    return torch.from_numpy(per_position(one, *arrays))


def kept_classes(part: Part, batch: LogitBatch) -> Tensor:
    """Which classes of the batch a part's student logits come from: [B, T, V] bool."""
    return slope(part.student, batch) != 0


# the cut


@few
@given(seeds, classes, taus, scales)
def test_the_parts_add_up_in_value_and_gradient(seed, v, tau, scale):
    batch = logit_batch(seed, v, scale)
    kd = term(whole(batch, tau)["kd"], tau)
    parts = build("target_split")(whole(batch, tau), batch)
    total = sum(part.weight * term(part, tau) for part in parts.values())
    torch.testing.assert_close(total, kd, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slope(total, batch), slope(kd, batch), rtol=1e-9, atol=1e-9)


@few
@given(seeds, classes, taus, scales)
def test_values_and_cotangents_are_the_closed_forms(seed, v, tau, scale):
    batch = logit_batch(seed, v, scale)
    parts = build("target_split")(whole(batch, tau), batch)
    target, non_target = term(parts["target"], tau), term(parts["non_target"], tau)
    close = {"rtol": 1e-9, "atol": 1e-9}

    expected = at_each_position(reference.tckd, batch, tau)
    torch.testing.assert_close(target, expected, **close)
    expected = at_each_position(reference.tckd_cotangent, batch, tau)
    torch.testing.assert_close(slope(target, batch), expected, **close)

    expected = at_each_position(reference.nckd, batch, tau)
    torch.testing.assert_close(non_target, expected, **close)
    expected = at_each_position(reference.nckd_cotangent, batch, tau)
    torch.testing.assert_close(slope(non_target, batch), expected, **close)

    expected = at_each_position(lambda s, t, y: reference.nckd_weight(t, y, tau), batch)
    torch.testing.assert_close(parts["non_target"].weight, expected, rtol=1e-12, atol=0)


@few
@given(seeds, classes)
def test_the_target_opposes_the_task_only_where_the_student_is_surer(seed, v):
    batch = logit_batch(seed, v, 1.0)
    target = slope(term(build("target_split")(whole(batch), batch)["target"]), batch)
    student = batch.student.log_softmax(-1)
    task = slope(-student.gather(-1, batch.labels[..., None]), batch)
    q = student.exp().gather(-1, batch.labels[..., None])
    r = batch.teacher.softmax(-1).gather(-1, batch.labels[..., None])
    torch.testing.assert_close(target, -(q - r) / (1 - q) * task, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["target_split", "dkd", "deepkd"])
@pytest.mark.parametrize("v", [2, 3, 50])
@pytest.mark.parametrize("student_sure", [-1e3, 0.0, 1e3])
@pytest.mark.parametrize("teacher_sure", [-1e3, 0.0, 1e3])
def test_nothing_is_nan_at_the_extremes(name, v, student_sure, teacher_sure):
    batch = logit_batch(v=v, dtype=torch.float32)
    label = torch.nn.functional.one_hot(batch.labels, v)
    student = (batch.student.detach() + student_sure * label).requires_grad_()
    teacher = batch.teacher + teacher_sure * label
    batch = replace(batch, student=student, teacher=teacher, progress=0.0)
    k_of_1 = {"unit": "classes", "k": 1} if name == "deepkd" else {}
    parts = build(name, **k_of_1)(whole(batch), batch)
    total = sum(part.weight * term(part) for part in parts.values())
    assert total.isfinite().all()
    assert slope(total, batch).isfinite().all()
    if v == 2 or name == "deepkd":
        assert (term(parts["non_target"]) == 0).all()
        assert (slope(term(parts["non_target"]), batch) == 0).all()


def test_float32_stays_near_the_formula_next_to_certainty():
    """Where 1 - r_y is about 1e-9, float32 probabilities would say 0."""
    batch = logit_batch(v=5, scale=1.0)
    label = torch.nn.functional.one_hot(batch.labels, 5)
    student, teacher = batch.student.detach() + 15 * label, batch.teacher + 22 * label
    exact = replace(batch, student=student, teacher=teacher, progress=1.0)
    rounded = replace(exact, student=student.float(), teacher=teacher.float())
    parts = build("target_split")(whole(rounded), rounded)
    expected = at_each_position(lambda s, t, y: reference.nckd_weight(t, y), exact)
    assert (expected < 1e-7).all()
    torch.testing.assert_close(parts["non_target"].weight.double(), expected, rtol=1e-5, atol=0)
    expected = at_each_position(reference.tckd, exact)
    torch.testing.assert_close(term(parts["target"]).double(), expected, rtol=0, atol=2e-7)


def test_labels_off_the_mask_may_be_no_class():
    batch = logit_batch()
    mask = batch.mask.clone()
    mask[1, 2] = False
    labels = batch.labels.masked_fill(~mask, -100)
    padded = replace(batch, labels=labels, mask=mask, progress=1.0)
    parts = build("target_split")(whole(padded), padded)
    full = build("target_split")(whole(batch), batch)
    for name, part in parts.items():
        assert torch.equal(term(part)[mask], term(full[name])[mask])
        assert term(part).isfinite().all()


# dkd


@few
@given(seeds, taus, st.floats(0, 4), st.floats(0, 10), st.floats(0, 1))
def test_dkd_frees_the_weights_and_warms_up(seed, tau, alpha, beta, progress):
    batch = logit_batch(seed, progress=progress)
    parts = build("dkd", alpha=alpha, beta=beta)(whole(batch, tau, weight=0.5), batch)
    total = sum(part.weight * term(part, tau) for part in parts.values())
    warm_up = reference.dkd_warm_up(240 * progress)
    expected = at_each_position(reference.dkd, batch, tau, alpha, beta, warm_up)
    torch.testing.assert_close(total, 0.5 * expected, rtol=1e-9, atol=1e-9)


def test_the_released_plain_kd_is_dkd_with_the_mean_of_the_rest_as_its_beta():
    """As docs/methods/deepkd.md says: the batch's mean of 1 - r_y, times the mean loss."""
    batch, tau = logit_batch(seed=5), 4.0
    rows = [each.detach().flatten(0, 1).numpy() for each in (batch.student, batch.teacher)]
    labels = batch.labels.flatten().numpy()
    pairs = zip(rows[1], labels, strict=True)
    beta = float(np.mean([reference.nckd_weight(t, y, tau) for t, y in pairs]))
    parts = build("dkd", alpha=1.0, beta=beta, warmup=0.0)(whole(batch, tau), batch)
    both = parts["target"], parts["non_target"]
    means = [(part.weight * term(part, tau)).mean().item() for part in both]
    assert means == pytest.approx(reference.released_kd(*rows, labels, tau))


def test_dkd_without_warm_up_starts_at_full_weight():
    batch = logit_batch(progress=0.0)
    assert (build("dkd", warmup=0)(whole(batch), batch)["non_target"].weight == 8).all()
    assert (build("dkd")(whole(batch), batch)["non_target"].weight == 0).all()


# the mask


@few
@given(seeds, st.integers(2, 12), st.integers(1, 14), taus)
def test_the_mask_keeps_exactly_k_and_never_the_label(seed, v, k, tau):
    batch = logit_batch(seed, v)
    part = build("deepkd", unit="classes", k=k)(whole(batch, tau), batch)["non_target"]
    chosen = at_each_position(lambda s, t, y: reference_mask.top_k_mask(t, y, k), batch)
    kept = kept_classes(part, batch)
    assert torch.equal(kept, chosen)
    assert (kept.sum(-1) == min(k, v - 1)).all()
    assert not kept.gather(-1, batch.labels[..., None]).any()

    gradient = slope(term(part, tau), batch)
    assert (gradient[~chosen] == 0).all()

    def masked(formula):
        def at(student, teacher, label):
            keep = reference_mask.top_k_mask(teacher, label, k)
            return formula(student, teacher, label, tau, keep)

        return at_each_position(at, batch)

    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(term(part, tau), masked(reference.nckd), **close)
    torch.testing.assert_close(gradient, masked(reference.nckd_cotangent), **close)


def test_all_classes_kept_is_no_mask():
    batch = logit_batch()
    split = build("target_split")(whole(batch), batch)
    for k in (7, 8, 1e9):
        assert build("top_k_mask", unit="classes", k=k)(split, batch) == split
    assert build("top_k_mask", k=1)(split, batch) == split
    all_but_the_label = build("top_k_mask", unit="classes", k=6)(split, batch)["non_target"]
    torch.testing.assert_close(term(all_but_the_label), term(split["non_target"]))
    torch.testing.assert_close(
        slope(term(all_but_the_label), batch), slope(term(split["non_target"]), batch)
    )


def test_the_mask_leaves_the_target_and_the_weights_alone():
    batch = logit_batch()
    split = build("target_split")(whole(batch), batch)
    masked = build("deepkd", unit="classes", k=2)(whole(batch), batch)
    assert torch.equal(masked["target"].student, split["target"].student)
    assert torch.equal(masked["target"].teacher, split["target"].teacher)
    for name, part in masked.items():
        assert torch.equal(part.weight, split[name].weight)


def test_deepkd_is_the_cut_then_the_mask():
    batch = logit_batch(progress=0.4)
    in_one = build("deepkd", k=0.5)(whole(batch), batch)
    chained = build("top_k_mask", k=0.5)(build("target_split")(whole(batch), batch), batch)
    assert in_one.keys() == chained.keys()
    for name, part in in_one.items():
        assert torch.equal(part.student, chained[name].student)
        assert torch.equal(part.teacher, chained[name].teacher)


def test_classes_excluded_before_rank_last():
    batch = logit_batch(v=9)
    excluded = torch.zeros(2, 3, 9, dtype=torch.bool)
    excluded[..., :4] = True
    part = Part(
        batch.student.masked_fill(excluded, LOG_ZERO),
        batch.teacher.masked_fill(excluded, LOG_ZERO),
        torch.ones(2, 3),
    )
    mask = build("top_k_mask", part="some", unit="classes", k=3)
    kept = kept_classes(mask({"some": part}, batch)["some"], batch)
    assert (kept.sum(-1) == 3).all()
    assert not (kept & excluded).any()

    mask = build("top_k_mask", part="some", unit="classes", k=7)
    wide = mask({"some": part}, batch)["some"]
    torch.testing.assert_close(term(wide), term(part))


@pytest.mark.parametrize("progress", np.linspace(0, 1, 25))
def test_curricula_follow_the_phases(progress):
    for v in (10, 100, 1000):
        k_star = 0.2 * v
        expected = reference_mask.linear_k(progress, v, k_star)
        kept = classes_kept(CurriculumParams(), progress, v)
        # ours ends at all classes, the label's own place included, the formula one before
        assert min(kept, v - 1) - expected in ((0, 1) if progress > 2 / 3 else (0,))
    for v in (300, 49_152):
        expected = reference_mask.log_k(progress, v)
        assert min(classes_kept(CurriculumParams(unit="classes"), progress, v), v - 1) == expected


def test_curricula_begin_and_end_where_they_should():
    kept = [classes_kept(CurriculumParams(), progress, 100) for progress in (0, 1 / 3, 0.5, 1)]
    assert kept == [5, 20, 20, 100]
    words = CurriculumParams(unit="classes")
    kept = [classes_kept(words, progress, 49_152) for progress in (0, 1 / 3, 0.5, 1)]
    assert kept == [16, 256, 256, 49_152]
    assert classes_kept(words, 0.0, 10) == 10
    assert classes_kept(CurriculumParams(k=0.01), 0.0, 10) == 1


@pytest.mark.parametrize(
    "params", [{"k": 0}, {"k": 1.5}, {"k": [[0, 0.5], [1, 0]]}, {"unit": "classes", "k": 0.5}]
)
def test_an_empty_set_is_refused(params):
    with pytest.raises(ValidationError, match="class"):
        build("deepkd", **params)


# the others, and the chain


def test_standardised_logits_are_softened_after():
    batch = logit_batch(scale=5.0)
    part = build("standardise")(whole(batch, 4.0), batch)["kd"]
    for ours, logits in ((part.student, batch.student), (part.teacher, batch.teacher)):
        centred = logits - logits.mean(-1, keepdim=True)
        expected = (centred / (logits.std(-1, keepdim=True) + 1e-7) / 4.0).softmax(-1)
        torch.testing.assert_close(ours.softmax(-1), expected)


def test_equal_logits_are_standardised_without_nan():
    batch = logit_batch()
    flat = torch.zeros_like(batch.student).requires_grad_()
    batch = replace(batch, student=flat, progress=1.0)
    value = term(build("standardise")(whole(batch), batch)["kd"])
    assert value.isfinite().all()
    assert slope(value, batch).isfinite().all()


def test_task_kd_cuts_nothing():
    batch = logit_batch()
    assert build("task_kd").parts(("kd",)) == ("kd",)
    parts = whole(batch)
    assert build("task_kd")(parts, batch)["kd"] is parts["kd"]


@pytest.mark.parametrize("name", SPLITTERS)
def test_other_parts_are_left_alone(name):
    splitter = build(name, **({"part": "kd"} if name == "top_k_mask" else {}))
    batch = logit_batch(progress=0.1, v=30)
    given_parts = {"other": whole(batch)["kd"], **whole(batch, 2.0)}
    assert splitter(given_parts, batch)["other"] is given_parts["other"]


def test_chains_in_the_wrong_order_say_so():
    split, mask = build("target_split"), build("top_k_mask")
    with pytest.raises(UserError, match="target_split requires the part 'kd'"):
        split.parts(split.parts(("kd",)))
    with pytest.raises(UserError, match="top_k_mask masks unknown part 'non_target'"):
        mask.parts(("kd",))
    with pytest.raises(UserError, match="did you mean 'non_target'"):
        build("top_k_mask", part="nontarget").parts(("target", "non_target"))
    batch = logit_batch()
    masked = build("top_k_mask", part="kd", k=0.5)(whole(batch), batch)
    with pytest.raises(UserError, match="before top_k_mask"):
        split(masked, batch)
