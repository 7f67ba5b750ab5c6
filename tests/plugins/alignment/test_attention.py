"""The matcher of attention: its formula, and the maps of models as eager attention gives them."""

from __future__ import annotations

import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    PreTrainedModel,
    ViTConfig,
)

from kdcore.data.batching.packing import Packing
from kdcore.data.rows import collate
from kdcore.method.loss_engine import LossEngine
from kdcore.method.records import LOG_ZERO, Batch, Row, StateSizes
from kdcore.models.matching.layers import LayerAttention, PassLayers, Queries
from kdcore.testing import MatcherSuite
from kdcore.training.method import objective_of
from kdcore.training.model_view import MovedLogits
from kdcore.training.teachers.kinds import LiveTeacher
from kdcore.training.trainer.matching import matched_by
from kdcore.training.views import StudentView
from kdcore_alignment import Attention
from tests.plugins.logit_batches import build
from tests.reference.attention import distance
from tests.tiny.models import SIZE, config_of

KINDS = ("kl", "mse", "mse_of_scores")


def by_reference(matcher: Any, ours: list[Tensor], theirs: list[Tensor], heads: int) -> Tensor:
    """[N] from the maps [N, heads, S] of each pair."""
    total = torch.zeros(len(ours[0]), dtype=torch.float64)
    for student, teacher in zip(ours, theirs, strict=True):
        seen = (teacher[:, 0] > LOG_ZERO).numpy()
        maps = student.detach().numpy(), teacher.numpy()
        for n, visible in enumerate(seen):
            total[n] += distance(maps[0][n], maps[1][n], visible, matcher.params.distance, heads)
    return total


class TestAttention(MatcherSuite):
    name = "attention"

    def test_the_last_layers_unless_the_spec_says_otherwise(self) -> None:
        assert self.component().pairs == ((4, 8),)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("how", "heads", "compared"), [("each", (2, 2), 2), ("groups", (2, 6), 2), ("mean", (3, 2), 1)]
)
def test_formula(kind: str, how: str, heads: tuple[int, int], compared: int) -> None:
    suite = MatcherSuite()
    suite.name = "attention"
    suite.params = {"distance": kind, "heads": how, "pairs": None}
    suite.student, suite.teacher = StateSizes(2, 8, heads[0]), StateSizes(5, 8, heads[1])
    assert suite.component().pairs == ((1, 2), (2, 5))
    suite.agrees_with(lambda *given: by_reference(*given, heads=compared))


def language_models(family: str, **changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    made = []
    for layers, seed in ((2, 1), (4, 2)):
        torch.manual_seed(seed)
        config = config_of(family, vocab_size=61, num_hidden_layers=layers, **(SIZE | changes))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(4)  # maps of a new model are flat
        made.append(model.eval())
    return made[0], made[1]


def rows(lengths: tuple[int, ...] = (5, 9, 7), classes: int = 61) -> list[Row]:
    """Rows whose second half is learned."""
    torch.manual_seed(3)
    made = []
    for length in lengths:
        tokens = torch.randint(3, classes, (length + 1,))
        inputs = {"input_ids": tokens[:-1], "attention_mask": torch.ones_like(tokens[:-1])}
        made.append(Row(inputs, tokens[1:], torch.arange(length) >= length // 2, f"{length}"))
    return made


def batched(made: list[Row]) -> Batch:
    names = {"input_ids": 0, "attention_mask": 0}
    padded = collate(list(enumerate(made)), pad=names)
    inputs = {name: padded.pop(name) for name in names}
    return Batch(inputs, padded["labels"], padded["mask"], padded["index"])


def compared(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batch: Batch,
    *,
    gates: dict[str, Any] | None = None,
    chunk: int = 3,
    normalize: str = "sequence",
    **params: Any,
) -> tuple[Tensor, Any]:
    """The loss of a step whose only term is the matcher's, and the bound matcher."""
    matcher = Attention(**params)
    sizes = [
        StateSizes(m.config.num_hidden_layers, m.config.hidden_size, m.config.num_attention_heads)
        for m in (student, teacher)
    ]
    matcher.bind(*sizes)
    objective = objective_of(
        gates or {},
        [],
        lambda *_: None,
        {"kd": 0, "attention": 0.5},
        matchers={"attention": matcher},
        normalize=normalize,
    )
    ours, theirs = matched_by(objective)
    classes = getattr(student.config, "vocab_size", 2) if student.can_generate() else 2
    taught_by = LiveTeacher.of(teacher, classes, theirs)
    view = StudentView(student, classes, taught_by, matched=ours)
    step = LossEngine(objective, {"all": ("attention",)}, chunk)(
        *view(student, batch, 0.0),
        batch,
        whole=float(len(batch.mask)),
        progress=0.0,
        generator=torch.Generator().manual_seed(0),
    )
    return step.losses["all"], matcher


def eager(model: PreTrainedModel, inputs: Any) -> tuple[Tensor, ...]:
    """The attention weights of each layer, as transformers gives them, with the same parameters."""
    model.set_attn_implementation("eager")
    try:
        found: tuple[Tensor, ...] = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    return found


def kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """[...] the mean over heads of KL, from weights [heads, ..., S]."""
    ratio = torch.where(theirs > 0, theirs / ours.where(theirs > 0, 1.0), 1.0)
    return (theirs * ratio.log()).sum(-1).mean(0)


def same_gradients(found: Tensor, expected: Tensor, model: PreTrainedModel) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert expected.item() > 1e-4, "nothing is compared"
    weights = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(found, weights, allow_unused=True),
        torch.autograd.grad(expected, weights, allow_unused=True),
        strict=True,
    ):
        other = torch.zeros_like(one) if other is None and one is not None else other
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("qwen2", {}), ("gpt2", {}), ("mistral", {"sliding_window": 4})],
)
def test_the_maps_of_a_language_model_are_those_of_eager_attention(
    family: str, changes: dict[str, Any], chunk: int
) -> None:
    """At the learned positions, with grouped keys, padding and windows; and any gate applies."""
    student, teacher = language_models(family, **changes)
    batch = batched(rows())
    gate = build("gate", "entropy")
    found, matcher = compared(
        student, teacher, batch, gates={"entropy": gate}, chunk=chunk, pairs=[(1, 2), (2, 4)]
    )
    ours, theirs = eager(student, batch.inputs), eager(teacher, batch.inputs)
    logp = teacher(**batch.inputs).logits.log_softmax(-1)
    weight = (1 + (logp.exp() * logp).sum(-1) / torch.tensor(61.0).log()).detach()
    means = []
    for n, mask in enumerate(batch.mask):
        distance = sum(
            kl(ours[i - 1][n][:, mask], theirs[j - 1][n][:, mask].detach())
            for i, j in matcher.pairs
        )
        means.append((weight[n, mask] * distance).mean())
    same_gradients(found, 0.5 * torch.stack(means).mean(), student)


BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 61,
}
CLASSIFIERS: dict[str, Any] = {
    "bert": (AutoModelForSequenceClassification, BertConfig(**BERT)),
    "distilbert": (
        AutoModelForSequenceClassification,
        DistilBertConfig(vocab_size=61, dim=32, n_layers=2, n_heads=4, hidden_dim=32),
    ),
    "llama": (
        AutoModelForSequenceClassification,
        config_of("llama", vocab_size=61, num_hidden_layers=2, num_labels=2, **SIZE),
    ),
    "vit": (
        AutoModelForImageClassification,
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=32,
            image_size=12,
            patch_size=4,
        ),
    ),
}


def classifiers(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    kind, config = CLASSIFIERS[name]
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = kind.from_config(deepcopy(config), attn_implementation="sdpa")
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(4)
        made.append(model.eval())
    return made[0], made[1]


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifiers_row_has_the_mean_over_its_positions(name: str, chunk: int) -> None:
    student, teacher = classifiers(name)
    lengths = (5, 9, 7)
    if name == "vit":
        lengths = (10, 10, 10)  # 9 patches and the class
        inputs = {"pixel_values": torch.randn(3, 3, 12, 12)}
    else:
        tokens = [row.inputs["input_ids"] for row in rows(lengths)]
        inputs = {
            "input_ids": pad_sequence(tokens, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True),
        }
    one = torch.ones(3, 1, dtype=torch.int64)
    batch = Batch(inputs, one, one.bool(), torch.arange(3))
    found, _ = compared(student, teacher, batch, chunk=chunk, pairs=[(1, 2)])
    ours, theirs = eager(student, inputs)[0], eager(teacher, inputs)[1].detach()
    means = [
        kl(ours[n, :, :length], theirs[n, :, :length]).mean() for n, length in enumerate(lengths)
    ]
    same_gradients(found, 0.5 * torch.stack(means).mean(), student)


def test_packed_rows_have_the_maps_of_the_rows() -> None:
    student, teacher = language_models("llama")
    made = rows((5, 9, 7, 4))
    plain, _ = compared(student, teacher, batched(made))
    packs = [[(0, made[0]), (1, made[1])], [(2, made[2]), (3, made[3])]]
    padded = Packing({"input_ids": 0})(packs)
    inputs = {name: padded[name] for name in ("input_ids", "position_ids")}
    mask = padded["mask"]
    rows_of, place = mask.nonzero().unbind(1)
    batch = Batch(
        inputs,
        padded["labels"],
        mask,
        padded["index"],
        starts=padded["starts"],
        learned_in_inputs=padded["starts"][rows_of] + place,
    )
    packed, _ = compared(student, teacher, batch)
    same_gradients(packed, plain, student)


class Elsewhere(LiveTeacher):
    """A teacher whose logits are moved."""

    def logits(self, batch: Batch, progress: float) -> MovedLogits:
        made: Any = super().logits(batch, progress)
        return MovedLogits(made, torch.device("cpu"))


def test_a_teacher_may_have_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = language_models("llama")
    batch = batched(rows())
    plain, _ = compared(student, teacher, batch)
    monkeypatch.setitem(globals(), "LiveTeacher", Elsewhere)
    moved, _ = compared(student, teacher, batch)
    assert torch.equal(plain, moved)


def test_checkpointed_layers_give_the_same_gradients() -> None:
    student, teacher = language_models("llama")
    batch = batched(rows())
    plain, _ = compared(student, teacher, batch)
    student.gradient_checkpointing_enable()
    student.train()
    recomputed, _ = compared(student, teacher, batch)
    same_gradients(recomputed, plain, student)


def test_keys_that_only_one_model_sees_are_left_out() -> None:
    """The weights of both are then those among the keys that both see."""
    near = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril().triu(-2)
    queries, matcher = Queries((6,), torch.arange(6)), Attention()
    matcher.bind(StateSizes(1, 8, 2), StateSizes(1, 8, 2))

    def maps(seed: int, mask: Tensor | None) -> PassLayers:
        torch.manual_seed(seed)
        query, key = torch.randn(2, 1, 2, 6, 4)
        return PassLayers({}, queries, {1: LayerAttention(query, key, mask, True, 0.5)})

    weights = torch.rand(6)
    both = maps(0, near).distance(matcher, maps(1, near), weights, 4)
    assert both > 1e-2
    for masks in ((near, None), (None, near)):
        student, teacher = map(maps, (0, 1), masks)
        found = student.distance(matcher, teacher, weights, 4)
        torch.testing.assert_close(found, both)


def test_no_map_outlives_its_piece() -> None:
    """What autograd saves is no larger than the maps of a piece, and is free at the end."""
    heads, length, chunk = 2, 64, 8
    query, key = torch.randn(2, 3, heads, length, 4).requires_grad_().unbind()
    layer = LayerAttention(query, key, None, True, 0.5)
    queries = Queries((length,) * 3, torch.arange(length).repeat(3))
    maps = PassLayers({}, queries, {1: layer})
    matcher = Attention()
    matcher.bind(StateSizes(1, 8, heads), StateSizes(1, 8, heads))
    saved: list[weakref.ref[Tensor]] = []

    def kept(tensor: Tensor) -> Tensor:
        assert tensor.numel() <= max(heads * length * chunk, heads * length * 4)
        saved.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        total = maps.distance(matcher, maps, torch.ones(3 * length), chunk)
    assert len(saved) > 24 and total.requires_grad
    assert [each() for each in saved if each() is not None] == []
