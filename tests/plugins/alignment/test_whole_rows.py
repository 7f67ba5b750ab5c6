"""Hidden states of classifiers, and MiniLM's value relations, against transformers' own states."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification

from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.method.loss_engine import LossEngine
from kdcore.method.records import Batch, StateSizes
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.testing import MatcherSuite
from kdcore.training.method import objective_of
from kdcore.training.teachers.kinds import LiveTeacher
from kdcore.training.trainer.matching import bind_matchers, matched_by
from kdcore.training.views import StudentView
from kdcore_alignment import Attention, Hidden
from tests.plugins.alignment.test_attention import (
    CLASSIFIERS,
    batched,
    classifiers,
    kl,
    language_models,
    rows,
    same_gradients,
)
from tests.tiny.distill_specs import logged

LENGTHS = (5, 9, 7)


def given(name: str) -> tuple[Batch, tuple[int, ...]]:
    """A batch of three rows of one label each, and the number of positions of each row."""
    inputs: dict[str, Tensor] = {"pixel_values": torch.randn(3, 3, 12, 12)}
    if name != "vit":
        tokens = [row.inputs["input_ids"] for row in rows(LENGTHS)]
        there = [torch.ones_like(each) for each in tokens]
        inputs = {
            "input_ids": pad_sequence(tokens, batch_first=True),
            "attention_mask": pad_sequence(there, batch_first=True),
        }
    one = torch.ones(3, 1, dtype=torch.int64)
    lengths = (10, 10, 10) if name == "vit" else LENGTHS
    return Batch(inputs, one, one.bool(), torch.arange(3)), lengths


def loss(
    matcher: Any, student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, **gates: Any
) -> Tensor:
    """The loss of a step whose only term is the matcher's."""
    sizes = []
    for model in (student, teacher):
        config = model.config
        heads = config.num_attention_heads
        shared = getattr(config, "num_key_value_heads", heads)
        sizes.append(StateSizes(config.num_hidden_layers, config.hidden_size, heads, shared))
    matcher.bind(*sizes)
    objective = objective_of(
        gates, [], lambda *_: None, {"kd": 0, "it": 0.5}, matchers={"it": matcher}
    )
    ours, theirs = matched_by(objective)
    classes = student.config.vocab_size if student.can_generate() else 2
    view = StudentView(student, classes, LiveTeacher.of(teacher, classes, theirs), matched=ours)
    step = LossEngine(objective, {"all": ("it",)}, 3)(
        *view(student, batch, 0.0),
        batch,
        whole=3.0,
        progress=0.0,
        generator=torch.Generator().manual_seed(0),
    )
    return step.losses["all"]


def states(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """All hidden states; the last is the output of the body, after its norm."""
    body = model.base_model(**batch.inputs, output_hidden_states=True)
    return [*body.hidden_states[:-1], body.last_hidden_state]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_states_of_a_classifiers_row_are_those_of_all_its_positions(name: str) -> None:
    """The mean over rows of the gate times the mean over the row's positions but the padding."""
    student, teacher = classifiers(name)
    batch, lengths = given(name)
    matcher = Hidden(pairs=[(0, 0), (1, 2), (-1, -1)], projection="always")
    weight = torch.tensor([0.25, 1.0, 0.5])
    found = loss(matcher, student, teacher, batch, own=lambda rows: weight[None])
    ours, theirs = states(student, batch), states(teacher, batch)
    means = []
    for n, length in enumerate(lengths):
        gaps = [
            (matcher.projections[0](ours[i][n, :length]) - theirs[j][n, :length].detach()) ** 2
            for i, j in matcher.pairs
        ]
        means.append(weight[n] * torch.stack(gaps).mean(-1).sum(0).mean())
    same_gradients(found, 0.5 * torch.stack(means).mean(), student)


def test_images_in_other_patches_are_refused_before_the_run(tmp_path: Path) -> None:
    """And images in as many patches are not: both matchers learn from the teacher."""
    vit = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "image_size": 8}
    vit |= {"num_attention_heads": 2, "intermediate_size": 16, "num_channels": 1, "patch_size": 4}
    vit |= {"initializer_range": 0.5}
    asked: dict[str, Any] = {
        "run": tmp_path / "teacher",
        "student": {"model": "new", "config": vit},
        "data": {"train": {"name": "digits", "limit": 40}},
        "method": {"terms": {"task": 1, "kd": 0}},
        "training": {"batch_size": 20, "steps": 2},
    }
    first = distill(DistillSpec.model_validate(asked))
    method = {"matchers": ["hidden", {"name": "attention", "maps": "values"}], "terms": {"kd": 1}}
    asked |= {"teacher": {"model": str(first.path("model"))}, "method": method}
    asked |= {"run": tmp_path / "run", "seed": 1}
    spec = DistillSpec.model_validate(asked)
    assert preflight(spec).matched[1].startswith("matcher attention: values of layers 1 with 1")
    assert min(logged(distill(spec), "term/hidden") + logged(Run(spec.run), "term/attention")) > 0
    other = {"model": "new", "config": vit | {"patch_size": 2}}
    for job in (preflight, distill):
        with pytest.raises(UserError, match="a matcher compares"):
            job(DistillSpec.model_validate(asked | {"student": other, "run": tmp_path / "other"}))


def test_a_model_of_stages_has_no_common_width() -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    model = LoadedModel(ResNetForImageClassification(config), None, "it", "")
    objective = objective_of({}, [], lambda *_: None, {}, matchers={"hidden": Hidden()})
    models: Any = type("Models", (), {"teacher": model, "student": model})
    with pytest.raises(UserError, match="stages of several widths"):
        bind_matchers(objective, models)


class TestValues(MatcherSuite):
    name = "attention"
    params: ClassVar = {"maps": "values"}


def values(model: PreTrainedModel, layer: int, batch: Batch, heads: int) -> Tensor:
    """[heads, B, L, W] of a layer, from 1: the output of its linear map."""
    heard: list[Tensor] = []
    body = model.base_model
    block = body.encoder.layer if hasattr(body, "encoder") else body.layers
    attention = block[layer - 1].get_submodule(
        "attention.self.value" if hasattr(body, "encoder") else "self_attn.v_proj"
    )
    handle = attention.register_forward_hook(lambda *given: heard.append(given[2]))
    model(**batch.inputs)
    handle.remove()
    return heard[0].unflatten(-1, (heads, -1)).movedim(2, 0)


def relations(value: Tensor, visible: Tensor) -> Tensor:
    """MiniLM, equation 9: softmax(V V' / sqrt(d)) over the visible keys [B, L, L]."""
    scores = value @ value.mT / value.shape[-1] ** 0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def test_value_relations_of_a_classifier() -> None:
    student, teacher = classifiers("bert")
    batch, lengths = given("bert")
    found = loss(Attention(maps="values"), student, teacher, batch)
    visible = batch.inputs["attention_mask"].bool()[:, None].expand(-1, max(lengths), -1)
    ours, theirs = (relations(values(m, 2, batch, 4), visible) for m in (student, teacher))
    means = [
        kl(ours[:, n, :length, :length], theirs[:, n, :length, :length].detach()).mean()
        for n, length in enumerate(lengths)
    ]
    same_gradients(found, 0.5 * torch.stack(means).mean(), student)


def test_value_relations_of_a_language_model_with_grouped_values() -> None:
    """Those of the keys that a query sees, at the learned positions; 2 value heads of 4."""
    student, teacher = language_models("llama")
    batch = batched(rows(LENGTHS))
    matcher = Attention(maps="values", pairs=[(1, 2), (-1, -1)])
    found = loss(matcher, student, teacher, batch)
    length = max(LENGTHS)
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    means = []
    for n, mask in enumerate(batch.mask):
        distance = torch.zeros(int(mask.sum()))
        for i, j in matcher.pairs:
            ours = relations(values(student, i, batch, 2), visible)
            theirs = relations(values(teacher, j, batch, 2), visible)
            distance = distance + kl(ours[:, n, mask], theirs[:, n, mask].detach())
        means.append(distance.mean())
    same_gradients(found, 0.5 * torch.stack(means).mean(), student)
