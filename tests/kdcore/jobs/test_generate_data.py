"""The job that lets a teacher answer: what it leaves, how it goes on, what it says."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from kdcore.components.registry import installed
from kdcore.data.templates.mask import encode
from kdcore.errors import UserError
from kdcore.jobs.bench import bench as run_bench
from kdcore.jobs.distill import distill
from kdcore.jobs.generate_data import generate_data
from kdcore.jobs.preflight.generate_data import preflight_generation
from kdcore.models.assembly import Assembly
from kdcore.specs.bench import BenchSpec
from kdcore.specs.distill import DistillSpec
from kdcore.specs.generate_data import GenerateDataSpec
from kdcore.specs.reading.file import read_spec
from tests.fixtures.json_lines import write_lines
from tests.fixtures.processes.forked import python
from tests.tiny.tiny_chat_models import CHATML, saved, tiny_model, tiny_tokenizer

ROWS = 9


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def asked(tmp_path: Path, teacher: Path) -> dict[str, Any]:
    rows = [{"prompt": f"the mat of {n}?", "response": "mine"} for n in range(ROWS)]
    write_lines(tmp_path / "rows", rows)
    return {
        "job": "generate-data",
        "run": str(tmp_path / "run"),
        "teacher": {"model": str(teacher)},
        "source": {"name": "chat", "path": str(tmp_path / "rows")},
        "responses": {"max_new_tokens": 6, "batch_size": 2, "temperature": 1.0},
    }


def spec_of(asked: dict[str, Any], **changes: Any) -> GenerateDataSpec:
    return GenerateDataSpec.model_validate(asked | changes)


def test_the_chat_source_reads_what_came_out(tmp_path: Path, asked: dict[str, Any]) -> None:
    run = generate_data(spec_of(asked))
    data = {"train": {"name": "chat", "path": run.path("responses.jsonl")}}
    student = {"model": "teacher", "layers": [0]}
    spec = DistillSpec.model_validate(
        {"teacher": asked["teacher"], "student": student, "data": data}
    )
    examples = Assembly(installed()).build(spec.data.train).read()
    assert [c.messages[0].content for c in examples] == [f"the mat of {n}?" for n in range(ROWS)]
    assert all(c.messages[1].content != "mine" for c in examples)
    rows = [encode(c, tiny_tokenizer(), 512) for c in examples]
    came = run.read_json("run.json")["responses"]
    assert came["conversations"] == came["responses"] == ROWS and came["left_out"] == 0
    assert came["ended"] == sum(c.messages[1].ended for c in examples)
    assert all(row.mask.any() for row in rows)
    assert ROWS <= came["tokens"] <= 6 * ROWS
    assert came["seconds"] > 0


def test_a_killed_job_goes_on_as_if_unbroken(tmp_path: Path, asked: dict[str, Any]) -> None:
    whole = generate_data(spec_of(asked, run=str(tmp_path / "whole")))
    script = """
import json, os, signal, sys
from kdcore.data.responses import file as generation
from kdcore.jobs.generate_data import generate_data
from kdcore.specs.generate_data import GenerateDataSpec
append, written = generation._append, []
def killed(path, fresh):
    if len(written) == 2:
        path.open("a").write('{"id": "half a l')
        os.kill(os.getpid(), signal.SIGKILL)
    append(path, fresh)
    written.append(fresh)
generation._append = killed
generate_data(GenerateDataSpec.model_validate(json.loads(sys.argv[1])))
"""
    assert python("-c", script, json.dumps(asked)).returncode == -signal.SIGKILL
    path = tmp_path / "run" / "responses.jsonl"
    kept = path.read_text()
    assert len(kept.splitlines()) == 5 and not kept.endswith("\n")
    with pytest.raises(UserError, match="already contains a run"):
        generate_data(spec_of(asked))
    run = generate_data(spec_of(asked), resume=True)
    assert path.read_bytes() == whole.path("responses.jsonl").read_bytes()
    assert path.read_text().startswith(kept.rpartition("\n")[0])
    tokens = [each.read_json("run.json")["responses"]["tokens"] for each in (run, whole)]
    assert 0 < tokens[0] < tokens[1]


def test_only_conversations_can_be_answered(tmp_path: Path, asked: dict[str, Any]) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nthe mat,sat\n")
    source = {"name": "labelled_text", "path": str(tmp_path / "rows.csv")}
    with pytest.raises(UserError, match="does not contain conversations"):
        generate_data(spec_of(asked, source=source))


def test_what_it_costs_is_told_without_an_answer(asked: dict[str, Any]) -> None:
    report = preflight_generation(spec_of(asked))
    assert (report.conversations, report.responses, report.tokens) == (ROWS, ROWS, 6 * ROWS)
    assert report.seconds is not None and report.seconds > 0
    distant = {"endpoint": "http://localhost:1/v1", "model": "m"}
    assert preflight_generation(spec_of(asked, teacher=distant)).seconds is None
    with pytest.raises(UserError, match="variable NO_SUCH_KEY is not set"):
        preflight_generation(spec_of(asked, teacher=distant | {"key": "NO_SUCH_KEY"}))


@pytest.mark.parametrize(
    ("teacher", "cause"),
    [
        ("{endpoint: localhost, model: m}", "teacher.endpoint: not an http or https URL"),
        (
            "{endpoint: 'http://me:secret@here/v1', model: m}",
            "teacher.endpoint: the URL contains credentials",
        ),
        (
            "{endpoint: 'http://here/v1', model: m, key: sk-secret}",
            "teacher.key: not the name of an environment variable",
        ),
        ("{endpoint: 'http://here/v1'}", "teacher.model: missing field"),
        ("{modle: m}", "teacher.modle: unknown key"),
    ],
)
def test_a_teacher_that_is_neither_is_refused_without_showing_a_secret(
    tmp_path: Path, teacher: str, cause: str
) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(f"job: generate-data\nteacher: {teacher}\nsource: {{name: chat, path: r}}\n")
    with pytest.raises(UserError) as raised:
        read_spec(file)
    assert cause in raised.value.cause
    assert "secret" not in str(raised.value)


def test_a_later_turn_that_the_template_rejects_names_its_source(
    tmp_path: Path, asked: dict[str, Any]
) -> None:
    """Its prompt is rendered after the first answers, when all prompts have been planned."""
    once = "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + CHATML
    (tmp_path / "once.jinja").write_text(once)
    write_lines(tmp_path / "rows", [{"turns": ["the mat of 1?", "of 2?"]}])
    teacher = asked["teacher"] | {"template": str(tmp_path / "once.jinja")}
    with pytest.raises(UserError, match="rejects the conversation: one turn") as refused:
        generate_data(spec_of(asked, teacher=teacher))
    assert refused.value.field == "source"
    student = {"model": "teacher", "layers": [0]}
    data = {"train": asked["source"], "responses": {"by": "teacher", "max_new_tokens": 3}}
    trained = {"teacher": teacher, "student": student, "data": data, "run": str(tmp_path / "kd")}
    with pytest.raises(UserError, match="rejects the conversation: one turn") as refused:
        distill(DistillSpec.model_validate(trained))
    assert refused.value.field == "data.train"
    bench = {"job": "bench", "run": str(tmp_path / "bench"), "target": teacher, "max_new_tokens": 3}
    bench |= {"sets": {"mine": asked["source"]}, "baselines": ["generate"], "turns": None}
    with pytest.raises(UserError, match="rejects the conversation: one turn") as refused:
        run_bench(BenchSpec.model_validate(bench))
    assert refused.value.field == "sets.mine"
