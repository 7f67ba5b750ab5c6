"""Runs with several teachers: against runs with one, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from kdcore.errors import Mistakes, UserError
from kdcore.jobs.caches.build import build_cache
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from tests.fixtures.json_lines import write_lines
from tests.tiny.distill_specs import logged
from tests.tiny.tiny_chat_models import OTHER_TEXT, saved, tiny_model, tiny_tokenizer

V = 290


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, one with padding in its vocabulary, a student, and a stranger."""
    folder = tmp_path_factory.mktemp("models")
    saved(tiny_model(seed=1), folder / "math")
    saved(tiny_model("qwen2", seed=2, extra=6), folder / "chat")
    saved(tiny_model(seed=3), folder / "student")
    stranger = tiny_model(seed=4)
    stranger.model.save_pretrained(folder / "stranger")
    tiny_tokenizer(text=OTHER_TEXT).save_pretrained(folder / "stranger")
    return folder


def rows(path: Path, *teachers: Any) -> Path:
    lines = [
        {"prompt": f"the mat of {n}?", "response": f"the student sat {n}"}
        | ({"teacher": teacher} if teacher else {})
        for n, teacher in enumerate(teachers)
    ]
    write_lines(path, lines)
    return path


@pytest.fixture
def asked(tmp_path: Path, models: Path) -> dict[str, Any]:
    path = rows(tmp_path / "rows.jsonl", "math", "chat", "math", "chat", "chat")
    return {
        "job": "distill",
        "run": str(tmp_path / "run"),
        "teachers": {name: {"model": str(models / name)} for name in ("math", "chat")},
        "student": {"model": str(models / "student")},
        "data": {"train": {"name": "chat", "path": str(path)}},
        "method": {"gates": ["speckd"]},
        "training": {"batch_size": 5, "optimizer": "sgd", "momentum": 0, "learning_rate": 0.1}
        | {"steps": 2},
        "evaluation": {"samples": 0},
    }


def spec_of(asked: dict[str, Any], **changes: Any) -> DistillSpec:
    return DistillSpec.model_validate(asked | changes)


def weights(run: Run) -> dict[str, Tensor]:
    return load_file(run.path("model/model.safetensors"))


def named(asked: dict[str, Any], tmp_path: Path, name: str, *teachers: Any) -> dict[str, Any]:
    path = rows(tmp_path / f"{name}.jsonl", *teachers)
    return {"run": str(tmp_path / name), "data": {"train": {"name": "chat", "path": str(path)}}}


def test_rows_that_all_name_one_teacher_give_the_run_of_that_teacher(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    routed = distill(spec_of(asked, **named(asked, tmp_path, "routed", *["math"] * 5)))
    one = asked | {"teacher": asked["teachers"]["math"], "teachers": {}}
    alone = distill(spec_of(one, **named(asked, tmp_path, "alone", *["math"] * 5)))
    assert logged(routed) == logged(alone)
    for name, weight in weights(alone).items():
        assert torch.equal(weights(routed)[name], weight), name


def test_a_cached_and_a_live_teacher_give_the_run_of_two_live_ones(
    tmp_path: Path, asked: dict[str, Any], models: Path
) -> None:
    """The cache has the rows that it teaches, and lacks the others."""
    live = distill(spec_of(asked))
    build = asked | {"teachers": {}, "teacher": asked["teachers"]["chat"], "method": {}}
    own = named(asked, tmp_path, "own", *["chat"] * 5)
    lines = Path(asked["data"]["train"]["path"]).read_text().splitlines(keepends=True)
    Path(own["data"]["train"]["path"]).write_text("".join(x for x in lines if "chat" in x))
    build_cache(spec_of(build, **own), tmp_path / "cache", k=V)
    teachers = asked["teachers"] | {"chat": {"cache": str(tmp_path / "cache")}}
    mixed = distill(spec_of(asked, run=str(tmp_path / "mixed"), teachers=teachers))
    assert logged(mixed) == pytest.approx(logged(live), rel=2e-3)
    for name, weight in weights(live).items():
        torch.testing.assert_close(weights(mixed)[name], weight, rtol=0, atol=1e-3)
    every = named(asked, tmp_path, "every", *[""] * 5)
    with pytest.raises(UserError, match="lacks 2 of 5 rows"):
        distill(spec_of(asked, teachers=teachers, method={}, **every))


def test_held_out_figures_compare_with_the_average(tmp_path: Path, asked: dict[str, Any]) -> None:
    """Both halves of an average of a teacher with itself are the teacher."""
    heldout = {"name": "chat", "path": str(rows(tmp_path / "heldout", "", "math", {"twin": 2}))}
    math, equal = asked["teachers"]["math"], named(asked, tmp_path, "twins", *[""] * 5)
    shared = {
        "data": equal["data"] | {"heldout": heldout},
        "training": asked["training"] | {"learning_rate": 1e-9},
    }
    twins = {"teachers": {"math": math, "twin": math}, "run": equal["run"]}
    weighted = {"teacher_weights": {"math": [[0, 3], [1, 1]], "twin": 2}}
    average = distill(spec_of(asked, **shared, **twins, **weighted))
    one = asked | {"teachers": {}, "teacher": math, "run": str(tmp_path / "one")}
    alone = distill(spec_of(one, **shared))
    found, wanted = (run.read_json("results.json")["after"] for run in (average, alone))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert {"teacher_kl", "acceptance", "gate/speckd"} <= found.keys()
    assert logged(average) == pytest.approx(logged(alone), rel=1e-5)


def test_a_resume_with_rows_of_other_teachers_is_refused(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    run = distill(spec_of(asked))
    run.path("README.md").unlink()  # unfinished
    rows(Path(asked["data"]["train"]["path"]), "chat", "chat", "math", "chat", "chat")
    with pytest.raises(UserError, match=r"the teachers of data\.train changed since"):
        distill(spec_of(asked), resume=True)
    with pytest.raises(UserError, match="teacher_weights"):
        distill(spec_of(asked, teacher_weights={"math": 1}), resume=True)


def test_the_check_counts_rows_and_refuses_an_unknown_teacher(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    some = named(asked, tmp_path, "some", "math", "chat", "", {"math": 1, "chat": 3}, "chat")
    found = preflight(spec_of(asked, **some, teacher_weights={"math": 2, "chat": 1})).teachers
    assert [(each.name, each.alone, each.averaged, each.weight) for each in found] == [
        ("math", 1, 2, 2),
        ("chat", 2, 2, 1),
    ]
    unknown = named(asked, tmp_path, "unknown", "math", "gpt", "math")
    for job in (preflight, distill):
        with pytest.raises(UserError, match="names the unknown teacher 'gpt'"):
            job(spec_of(asked, **unknown))


def test_a_teacher_with_another_tokenizer_is_refused(asked: dict[str, Any], models: Path) -> None:
    teachers = asked["teachers"] | {"other": {"model": str(models / "stranger")}}
    with pytest.raises(Mistakes, match=r"the tokenizers of .* differ in") as refused:
        preflight(spec_of(asked, teachers=teachers))
    assert "several teachers need one tokenizer" in refused.value.cure
    assert [mistake.field for mistake in refused.value.found] == ["teachers.other"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"model": "t"}}, "do not support teacher: remove teacher"),
        ({"student": {"layers": [0]}}, "student.model: teacher: set student.model"),
        ({"data": {"responses": {"by": "teacher"}}}, "data.responses.by: teacher: generate"),
        ({"data": {"teacher_cache": "c"}}, "name each cache in teachers"),
        ({"method": {"alignment": "spans"}}, "method.alignment: choose teachers"),
        ({"method": {"matchers": ["hidden"]}}, "method.matchers: remove method.matchers"),
        ({"teachers": {"a": {"model": "t", "device": "sharded"}}}, "device: sharded: cache"),
        (
            {"teachers": {"a": {"cache": "c"}}, "data": {"on_policy": {}}},
            "data.on_policy with a cached teacher: remove",
        ),
        ({"data": {"on_policy": {"policy": "interleaved"}}}, "interleaved: remove data.on_policy"),
        ({"training": {"packing": True}}, "training.packing: replace it by"),
        ({"teacher_weights": {"maths": 1}}, "sets a weight for unknown teacher 'maths'"),
        ({"teacher_weights": {"math": -1}}, "teacher_weights.math must be at least 0"),
        ({"teacher_weights": {"math": [[0, 1], [0.5, 0]]}}, "are all 0 at progress 0.5"),
    ],
)
def test_what_several_teachers_do_not_support(
    asked: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    changes = changes | {"data": asked["data"] | changes.get("data", {})}
    with pytest.raises(ValidationError) as refused:
        spec_of(asked, **changes)
    assert message in str(refused.value)


def test_features_of_several_teachers_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="several teachers have no hidden states in common"):
        preflight(spec_of(asked, method={"terms": {"feature": 1}}))
