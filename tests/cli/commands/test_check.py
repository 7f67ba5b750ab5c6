"""``kdcore check``, over what is really installed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from kdcore.components import registry
from kdcore.components.registry import Registry
from kdcore.jobs.preflight import drafter_cost
from kdcore.models.device import CPU, machine
from kdcore_cli.terminal import console
from tests.cli.conftest import Kdcore
from tests.tiny.tiny_chat_models import saved, tiny_model


@pytest.fixture
def installed() -> Registry:
    """The real one."""
    return registry.installed()


@pytest.fixture
def starter(kdcore: Kdcore, tmp_path: Path) -> list[str]:
    """The arguments that check the spec which `init` wrote, over a tiny teacher."""
    saved(tiny_model(), tmp_path / "teacher")
    assert kdcore("init").code == 0
    changes = ["teacher.model=teacher", "student.layers=[0, 2]"]
    return ["check", "spec.yaml", *(word for change in changes for word in ("--set", change))]


def test_check_accepts_what_init_wrote(kdcore: Kdcore, starter: list[str]) -> None:
    said = kdcore(*starter)
    assert said.code == 0, said.err
    assert said.err == ""
    assert max(map(len, said.out.splitlines())) <= 80 or "--set" in said.out.splitlines()[-1]
    for phrase in (
        "speckd",
        "1 x kd",
        "teacher: teacher (LlamaForCausalLM)",
        "2 of 4",
        "teacher and student share 290 classes",
        "the teacher generates 40 responses first",
        "of the positions of a batch (",
        "«(the teacher's response)<|im_end|>»",
        "total memory",
        "total time",
    ):
        assert phrase in said.out
    assert said.out.splitlines()[-1] == (
        "ready: kdcore distill spec.yaml --set teacher.model=teacher --set 'student.layers=[0, 2]'"
    )
    assert not Path("runs").exists()


def test_check_as_json(kdcore: Kdcore, starter: list[str]) -> None:
    data = json.loads(kdcore(*starter, "--json").out)
    assert data["train"]["rows"] == 32
    assert data["models"]["teacher"]["layers"] == 4
    assert ["(the", False] not in data["example"]
    assert data["steps"] == 16


def test_check_says_when_the_run_folder_is_in_use(kdcore: Kdcore, starter: list[str]) -> None:
    Path("runs/first").mkdir(parents=True)
    Path("runs/first/run.json").write_text('{"versions": {"kdcore": "0.1.0"}}')
    assert "already contains" not in kdcore(*starter).out  # it ended before any work
    Path("runs/first/before.json").touch()
    assert "runs/first already contains a run" in kdcore(*starter).out


def test_learned_tokens_are_in_colour_in_a_terminal(
    kdcore: Kdcore, starter: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, color_system="standard", width=80)
    monkeypatch.setattr(console, "out", lambda: terminal)
    monkeypatch.setattr(console.err, "cache_clear", lambda: None)
    from kdcore_cli import main

    assert main.run(starter) == 0
    assert "\x1b[1;32m(the teacher's response)<|im_end|>" in file.getvalue()
    assert "«" not in file.getvalue()


def test_what_would_stop_the_run_is_code_2(kdcore: Kdcore, starter: list[str]) -> None:
    said = kdcore(*starter, "--set", "method.momentum=deepkd", "--set", "method.splitters=[deepkd]")
    assert said.code == 2
    line = "error: spec.yaml:48: training.optimizer: momentum policy 'deepkd' computes the whole"
    assert line in said.err
    assert (
        "  fix: set training.optimizer: sgd, training.momentum: 0.0, training.clip: 0.0" in said.err
    )


def test_lines_in_a_pipe_end_without_blanks(kdcore: Kdcore, starter: list[str]) -> None:
    assert not [line for line in kdcore(*starter).out.splitlines() if line != line.rstrip()]


def test_what_is_compared_is_told(
    kdcore: Kdcore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached teacher, three models, the labels alone, and a reduced draft vocabulary."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("teacher", 0), ("student", 1), ("third", 2)):
        saved(tiny_model(seed=seed), tmp_path / name)
    row = {"prompt": "the mat", "response": "for the teacher"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    both = "teacher: {model: teacher}\nstudent: {model: student}\n"
    alone = "student: {model: student}\n"
    data = "data: {train: {name: chat, path: train.jsonl}"

    def check(text: str) -> str:
        (tmp_path / "spec.yaml").write_text(text)
        said = kdcore("check", "spec.yaml")
        assert said.code == 0, said.err
        return said.out

    distill = "job: distill\n"
    assert "teacher and student share 290 classes" in check(f"{distill}{both}{data}}}\n")
    (tmp_path / "spec.yaml").write_text(f"{distill}{both}{data}}}\n")
    assert kdcore("cache", "build", "spec.yaml", "--out", "cache", "--k", "8").code == 0
    cached = check(f"{distill}{alone}{data}, teacher_cache: cache}}\n")
    assert "the teacher's logits come from" in cached
    assert "only the labels" not in cached
    labels = check(f"{distill}{alone}{data}}}\nmethod: {{terms: {{task: 1, kd: 0}}}}\n")
    assert "there is no teacher: the student learns from the labels only" in labels
    gate = "method: {gates: [{name: adaspec, reference: third}]}\n"
    three = check(f"{distill}{both}{data}}}\n{gate}")
    assert "teacher, student and reference share 290 classes" in three
    drafter = "drafter: {name: fasteagle, depth: 2, vocabulary: 64}\n"
    reduced = check(f"job: train-drafter\ntarget: {{model: teacher}}\n{drafter}{data}}}\n")
    assert "the drafter proposes 64 of the target's 290 tokens" in reduced


@pytest.fixture
def drafter(kdcore: Kdcore, tmp_path: Path) -> list[str]:
    """The arguments that check the drafter's spec which `init` wrote, over a tiny target."""
    saved(tiny_model(), tmp_path / "target")
    assert kdcore("init", "d.yaml", "--job", "train-drafter").code == 0
    changes = ["target.model=target", "drafter={name: fasteagle, depth: 2}"]
    return ["check", "d.yaml", *(word for change in changes for word in ("--set", change))]


def test_check_says_when_a_drafter_pays(
    kdcore: Kdcore, drafter: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = kdcore(*drafter)
    assert said.code == 0, said.err
    assert "does a drafter pay here?" in said.out and "break-even tau" in said.out
    assert machine(CPU).split(",")[0] in " ".join(said.out.split())
    [row] = json.loads(kdcore(*drafter, "--json").out)["drafting"]["drafters"]
    cost = row["cost"]
    assert row["name"] == "fasteagle" and row["engine"] == "torch"
    assert cost["tau"] == pytest.approx((cost["draft_ms"] + cost["verify_ms"]) / cost["plain_ms"])

    for change, reason in (
        (("LARGEST", 1000), "and a check reads at most"),
        (("available_memory", lambda device: 1000), "and this machine has 0 MiB free"),
        (("are_here", lambda spec: False), "its weights are not on this machine yet"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(drafter_cost, *change)
            said = kdcore(*drafter)
        assert said.code == 0 and "not measured: " in said.out
        assert reason in " ".join(said.out.split()) and "break-even tau" not in said.out


def test_check_of_a_benchmark(kdcore: Kdcore, tmp_path: Path) -> None:
    saved(tiny_model(), tmp_path / "target")
    assert kdcore("init", "b.yaml", "--job", "bench").code == 0
    sets = ["--set", "target.model=target", "--set", "batch_sizes=[1, 3]"]
    said = kdcore("check", "b.yaml", *sets)
    assert said.code == 0, said.err
    assert "prompts of mine" in said.out and said.out.count("ngram  ") == 2
    assert max(map(len, said.out.splitlines()[:-1])) <= 80
    assert not Path("runs").exists()
    said = kdcore("check", "b.yaml", *sets, "--set", "max_new_tokens=100000")
    assert said.code == 2 and "exceeds the target's context" in said.err
