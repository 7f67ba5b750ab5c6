"""Auxiliary rows in a run: from the spec to the log, its resumption, and what a check refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kdcore.errors import Mistakes, UserError
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.runs.inputs import OtherInput
from kdcore.specs.distill import DistillSpec
from kdcore_baselines.sources.components import ChatParams
from tests.tiny.distill_specs import chats_in, distill_spec, logged
from tests.tiny.tiny_chat_models import saved, tiny_model

TEXTS = [{"text": f"on the mat number {n} the cat and the student sat"} for n in range(5)]


def spec(folder: Path, auxiliary: dict[str, Any] | None = None, **changes: Any) -> DistillSpec:
    if not (folder / "student").exists():
        saved(tiny_model("llama", seed=1), folder / "student")
        saved(tiny_model("llama", seed=2), folder / "teacher")
    source = {**chats_in(folder / "corpus", TEXTS), "text": "text"}
    data = {"auxiliary": {"source": source, **(auxiliary or {})}, **changes.pop("data", {})}
    given: dict[str, Any] = {"teacher": {"model": str(folder / "teacher")}, "data": data}
    return distill_spec(folder, folder / "student", **(given | changes))


def test_a_run_learns_a_corpus_beside_its_rows(tmp_path: Path) -> None:
    fast = {"learning_rate": 1e-2}
    asked = spec(tmp_path, {"batch_size": 3, "terms": {"task": 0.5}}, training=fast)
    run = distill(asked)
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    named = {name for line in lines for name in line if "term/" in name}
    assert named == {"term/kd", "auxiliary/term/task"}
    for line in (line for line in lines if "loss" in line):
        total = line["term/kd"] + 0.5 * line["auxiliary/term/task"]
        assert line["loss"] == pytest.approx(total, rel=1e-4)
    falling = logged(run, "auxiliary/term/task")
    assert falling[-1] < falling[0]


def test_a_changed_corpus_is_another_input(tmp_path: Path) -> None:
    asked = spec(tmp_path)
    run = distill(asked)
    run.path("README.md").unlink()  # as of an interrupted run
    run.path("model/README.md").unlink(missing_ok=True)
    chats_in(tmp_path / "corpus", TEXTS[:3])
    with pytest.raises(OtherInput, match=r"data\.auxiliary"):
        distill(asked, resume=True)


def test_a_check_counts_the_rows(tmp_path: Path) -> None:
    asked = spec(tmp_path, {"batch_size": 6, "terms": {"task": [[0, 1], [1, 0.5]]}})
    report = preflight(asked)
    assert (report.terms, report.auxiliary_terms) == ({"kd": 1.0}, {"task": [(0, 1), (1, 0.5)]})
    assert report.rows.keys() == {"train", "auxiliary"}
    facts = report.rows["auxiliary"]
    assert facts.rows == 5
    share = 6 * facts.tokens / (2 * report.train.tokens)
    assert report.seconds["auxiliary rows"] == pytest.approx(share * report.seconds["training"])


@pytest.mark.parametrize(
    ("auxiliary", "cause"),
    [
        ({"terms": {"tusk": 1}}, r"^data\.auxiliary\.terms sets a weight for unknown term 'tusk'"),
        ({"terms": {"task": 0}}, "the weight of every term to 0"),
        ({"source": {"name": "chat", "path": "absent.jsonl"}}, r"absent\.jsonl"),
    ],
)
def test_a_wrong_section_is_refused(tmp_path: Path, auxiliary: Any, cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        preflight(spec(tmp_path, auxiliary))


def test_terms_of_a_teacher_that_cannot_read_the_rows_are_refused(tmp_path: Path) -> None:
    prompted = spec(tmp_path, {"terms": {"kd": 1}})
    data = prompted.data.model_copy(update={"teacher_prompt": "{prompt} {response}"})
    with pytest.raises(UserError, match=r"term 'kd' needs the teacher's logits, but with data"):
        preflight(prompted.model_copy(update={"data": data}))
    served = {"endpoint": "http://localhost:9/v1", "model": "m", "k": 5}
    with pytest.raises(UserError, match="no teacher runs on this machine"):
        preflight(spec(tmp_path, {"terms": {"kd": 1}}, teacher=served))


def test_auxiliary_rows_are_not_held_out(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"set data\.heldout"):
        spec(tmp_path, training={"eval_every": 1})


@pytest.mark.parametrize("other", [{"prompt": "text"}, {"tidy": True}, {"part": [0, 0.5]}])
def test_a_text_has_no_turns(other: dict[str, Any]) -> None:
    given = {"path": "rows.jsonl", "text": "text", **other}
    with pytest.raises(ValidationError, match="text reads rows without turns"):
        ChatParams.model_validate(given)


def test_a_row_without_its_text_is_named(tmp_path: Path) -> None:
    source = {**chats_in(tmp_path / "corpus", TEXTS), "text": "content"}
    absent = {"name": "chat", "path": "absent.jsonl"}
    for wrong, cause in ((source, r"rows\.jsonl:1 has no text in 'content'"), (absent, "absent")):
        with pytest.raises(Mistakes, match=cause) as refused:
            preflight(spec(tmp_path, {"source": wrong}))
        assert [m.field for m in refused.value.found] == ["data.auxiliary.source"]
        with pytest.raises(UserError, match=cause) as stopped:
            distill(spec(tmp_path, {"source": wrong}), overwrite=True)
        assert stopped.value.field == "data.auxiliary.source"


def test_distillm_2_learns_the_responses_of_both_models_in_each_step(tmp_path: Path) -> None:
    """(2 - beta) SKL on the teacher's + beta SRKL on the student's; beta grows to 1.5."""
    method = {
        "divergence": "skew_kl",
        "sampled_divergence": {"name": "skew_reverse_kl", "detached": True},
        "terms": {"kd": [[0, 1], [0.5, 1.5]]},
    }
    training = {"steps": 4, "batch_size": len(TEXTS), "accumulation": 1}
    on_policy = {"on_policy": {"probability": 1.0, "max_new_tokens": 6}}
    terms = {"terms": {"kd": [[0, 1], [0.5, 0.5]]}}
    run = distill(spec(tmp_path, terms, method=method, training=training, data=on_policy))
    losses, ours = logged(run), logged(run, "term/kd")
    theirs = logged(run, "auxiliary/term/kd")
    for step, beta in enumerate((1.0, 1.25, 1.5, 1.5)):
        expected = (2 - beta) * theirs[step] + beta * ours[step]
        assert losses[step] == pytest.approx(expected, rel=1e-5)
    corpus = {"train": {**chats_in(tmp_path / "corpus", TEXTS), "text": "text"}}
    plain = distill_spec(
        tmp_path / "plain",
        tmp_path / "student",
        teacher={"model": str(tmp_path / "teacher")},
        method={"divergence": "skew_kl"},
        training=training,
        data=corpus,
    )
    assert theirs[0] == pytest.approx(logged(distill(plain))[0], rel=1e-5)
