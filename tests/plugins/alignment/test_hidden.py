"""The matcher of hidden states: its formula, its states in a run, and what a run saves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdcore.data.rows import batch_of
from kdcore.errors import UserError
from kdcore.jobs.caches.build import build_cache
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.method.loss_engine import LossEngine
from kdcore.method.records import StateSizes
from kdcore.specs.distill import DistillSpec
from kdcore.testing import MatcherSuite
from kdcore.training.method import objective_of
from kdcore.training.teachers.kinds import AlignedTeacher, LiveTeacher
from kdcore.training.trainer.matching import matched_by
from kdcore.training.views import StudentView
from kdcore_alignment import Hidden
from tests.fixtures.json_lines import write_lines
from tests.plugins.alignment.test_uld import Pair, model, pair
from tests.tiny.distill_specs import chat
from tests.tiny.tiny_chat_models import OTHER_TEXT, saved, tiny_model, tiny_tokenizer


class TestHidden(MatcherSuite):
    name = "hidden"

    def test_formula(self) -> None:
        self.agrees_with(squares)

    def test_layers_at_the_same_relative_depth(self) -> None:
        assert self.component().pairs == ((0, 0), (1, 2), (2, 4), (3, 6), (4, 8))


def squares(matcher: Any, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """TinyBERT's: one projection, and the sum over pairs of the mean square over the width."""
    (projection,) = matcher.projections
    gaps = [
        s @ projection.weight.T + projection.bias - t for s, t in zip(ours, theirs, strict=True)
    ]
    return torch.stack([(gap**2).sum(-1) / gap.shape[-1] for gap in gaps]).sum(0)


@pytest.mark.parametrize("same_tokenizer", [True, False])
def test_a_run_compares_the_hidden_states_that_transformers_returns(same_tokenizer: bool) -> None:
    """At the first token of each span both models have read the same text."""
    made = pair("spans", same_tokenizer=same_tokenizer)
    torch.manual_seed(1)
    matcher = Hidden(pairs=[(0, 0), (1, 2), (-1, -1)])
    matcher.bind(StateSizes(2, 16), StateSizes(2, 24))
    objective = objective_of(
        {}, [], lambda *_: None, {"kd": 0, "hidden": 0.5}, matchers={"hidden": matcher}
    )
    weights = [*made.student.parameters(), *matcher.parameters()]
    ours, theirs = matched_by(objective)
    view = StudentView(
        made.student,
        made.student.config.vocab_size,
        AlignedTeacher(
            LiveTeacher.of(made.teacher, made.teacher.config.vocab_size, theirs), made.rows
        ),
        matched=ours,
    )
    step = LossEngine(objective, {"all": ("hidden",)}, 7)(
        *view(made.student, made.batch, 0.0),
        made.batch,
        whole=3.0,
        progress=0.0,
        generator=torch.Generator().manual_seed(0),
    )
    expected = 0.5 * by_hand(made, matcher)
    torch.testing.assert_close(step.losses["all"], expected)
    found = torch.autograd.grad(step.losses["all"], weights, allow_unused=True)
    wanted = torch.autograd.grad(expected, weights, allow_unused=True)
    for one, other in zip(found, wanted, strict=True):
        other = torch.zeros_like(one) if other is None and one is not None else other
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def by_hand(made: Pair, matcher: Any) -> Tensor:
    """The mean over rows of the mean over their learned tokens, from output_hidden_states."""
    theirs = batch_of(made.rows.collated(made.batch.index))
    ours_of = made.student(**made.batch.inputs, output_hidden_states=True).hidden_states
    theirs_of = made.teacher(**theirs.inputs, output_hidden_states=True).hidden_states
    rows = []
    for n, aligned in enumerate(made.rows.aligned_rows):
        read = made.batch.mask[n].nonzero()[:, 0]
        own = theirs.mask[n].nonzero()[:, 0][aligned.place]
        distance = squares(
            matcher,
            [ours_of[i][n, read] for i, _ in matcher.pairs],
            [theirs_of[j][n, own] for _, j in matcher.pairs],
        )
        rows.append((distance * aligned.compared).mean())
    return torch.stack(rows).mean()


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A student of another tokenizer and another width, learning in every way there is."""
    folder = tmp_path_factory.mktemp("asked")
    rows = [chat(n) for n in range(8)]
    write_lines(folder / "rows.jsonl", rows)
    tokenizer = tiny_tokenizer(text=OTHER_TEXT, size=276)
    model(len(tokenizer), 24, 3).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    return {
        "job": "distill",
        "teacher": {"model": str(saved(tiny_model(), folder / "teacher"))},
        "student": {"model": str(folder / "student")},
        "data": {"train": {"name": "chat", "path": str(folder / "rows.jsonl")}},
        "method": {
            "alignment": "spans",
            "gates": ["entropy"],
            "splitters": [{"name": "uld", "merge": "product"}],
            "divergence": "total_variation",
            "matchers": ["hidden"],
            "tau": [[0, 2], [1, 1]],
        },
        "training": {"batch_size": 4, "learning_rate": 1e-2, "steps": 4, "save_every": 2},
        "evaluation": {"before": False},
    }


def test_a_resumed_run_goes_on_and_the_student_is_saved_without_the_matcher(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    spec = DistillSpec.model_validate(asked | {"run": tmp_path / "run"})
    student = load_file(distill(spec).path("model", "model.safetensors"))
    checkpoint = spec.run / "checkpoint-2"
    assert not any("matcher" in name for name in student)
    assert student.keys() == load_file(checkpoint / "model.safetensors").keys()
    state = load_file(checkpoint / "kdcore_state.safetensors")
    assert state["matcher.hidden/projections.0.weight"].shape == (16, 24)
    for left in ("checkpoint-4", "model"):
        shutil.rmtree(spec.run / left)
    (spec.run / "README.md").unlink()
    resumed = load_file(distill(spec, resume=True).path("model", "model.safetensors"))
    for name, tensor in student.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_cache_of_the_teachers_own_tokens_takes_its_place(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    """With all its classes, the losses are those of the live teacher up to float16."""
    training = asked["training"] | {"steps": 2, "save_every": None}
    plain = asked | {"method": asked["method"] | {"matchers": []}, "training": training}
    live = DistillSpec.model_validate(plain | {"run": tmp_path / "live"})
    build_cache(live, tmp_path / "cache", k=290)
    data = asked["data"] | {"teacher_cache": str(tmp_path / "cache")}
    cached = DistillSpec.model_validate(plain | {"run": tmp_path / "cached", "data": data})
    first, second = (
        [json.loads(line)["loss"] for line in run.path("metrics.jsonl").read_text().splitlines()]
        for run in (distill(live), distill(cached))
    )
    assert first == pytest.approx(second, rel=2e-3)
    wanting = DistillSpec.model_validate(asked | {"run": tmp_path / "no", "data": data})
    with pytest.raises(UserError, match="a teacher cache does not have hidden states"):
        preflight(wanting)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gates": ["speckd"]}, "gate 'speckd' compares the classes of teacher and student"),
        ({"gates": [{"name": "inverted", "gate": "hellinger"}]}, "gate 'inverted' compares"),
        ({"splitters": []}, "no splitter makes them comparable"),
        ({"splitters": ["uld", "target_split"]}, "splitter 'target_split' needs classes"),
        ({"splitters": ["uld", "gold"]}, "an earlier splitter has replaced"),
        ({"alignment": None}, "differ in"),
        ({"matchers": [{"name": "hidden", "pairs": [[3, 0]]}]}, "which has 0 to 2"),
        ({"matchers": [{"name": "hidden", "projection": "never"}]}, "width 24"),
        ({"matchers": [], "terms": {"hidden": 1}}, "unknown term 'hidden'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    asked: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    method = asked["method"] | changes
    spec = DistillSpec.model_validate(asked | {"run": tmp_path / "run", "method": method})
    with pytest.raises(UserError) as wrong:
        preflight(spec)
    assert said in wrong.value.cause and "\n" not in f"{wrong.value.cause}{wrong.value.cure}"


def test_hidden_states_are_matched_on_samples_of_the_student(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    data = asked["data"] | {"on_policy": {"probability": 1.0, "max_new_tokens": 8}}
    run = distill(DistillSpec.model_validate(asked | {"run": tmp_path / "run", "data": data}))
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    assert lines and all(line["on_policy/rows"] > 0 for line in lines)
    assert all(0 < line["term/hidden"] < float("inf") for line in lines)
