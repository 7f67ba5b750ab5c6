"""Arms, controls, grids and figures of a comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdcore.components.registry import installed
from kdcore.errors import UserError
from kdcore.jobs.comparison import compare as comparison
from kdcore.jobs.comparison.cells import cells_by_arm
from kdcore.jobs.comparison.compare import compare
from kdcore.jobs.comparison.shared_states import refuse_other_states
from kdcore.reporting.page import report
from kdcore.runs.folder import Run
from kdcore.runs.progress import Silent
from kdcore.runs.results import Metric, TrainingResults
from kdcore.specs.jobs import JOBS
from tests.fixtures.json_lines import write_lines
from tests.kdcore.jobs.comparison.comparisons import asked, compare_spec, shown
from tests.tiny.tiny_chat_models import saved, tiny_model


def test_only_arms_with_one_gate_are_counted_with_controls(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    gated = {"one": {"method": {"gates": ["speckd"]}}, "two": {"method": {"gates": ["all", "all"]}}}
    fields = {"arms": {"kd": {}, **gated}, "seeds": [0, 1], "controls": True}
    spec = compare_spec(asked(tmp_path, base, **fields))
    assert cells_by_arm(spec) == {"kd": 2, "one": 2 + 3 * 2, "two": 2}
    rows = base["data"]["heldout"] | {"limit": 3}
    grid = {"grid": {"method.tau": [1, 2, 4]}, "validation": rows, "trials": 2}
    spec = compare_spec(asked(tmp_path, base, **fields, **grid))
    assert sum(cells_by_arm(spec).values()) == 2 * (3 + 3) + 3 * 3 * 2
    assert spec.trial_seeds == [2, 3], "none of those that are reported"


def test_arms_controls_and_a_cell_that_fails(
    tmp_path: Path, base: dict[str, Any], kdcore: Callable[..., SimpleNamespace]
) -> None:
    arms = {
        "kd": {},
        "speckd": {"method": {"gates": ["speckd"]}},
        "broken": {"student": {"layers": [0, 99]}},
    }
    file = asked(tmp_path, base, arms=arms, seeds=[3], controls=True, draws=50)
    checked = kdcore("check", file)
    assert checked.returncode == 2 and "arm 'broken'" in checked.stderr
    done = kdcore("compare", file, "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    rows = {row["arm"]: row for row in outcome["arms"]}
    gated = {"speckd", "speckd+random", "speckd+uniform", "speckd+inverted"}
    assert rows.keys() == {"kd", "broken", *gated}
    assert "99" in outcome["failures"]["broken, seed 3"] and "figures" not in rows["broken"]
    for arm in rows.keys() - {"broken"}:
        assert rows[arm]["cost"]["tokens"] == rows["kd"]["cost"]["tokens"], "the same budget"
        for figure in ("teacher_kl", "rouge_l"):
            gap = rows[arm]["differences"][figure]
            assert gap["low"] <= gap["mean"] <= gap["high"]
    assert rows["kd"]["differences"]["teacher_kl"]["mean"] == 0.0
    assert rows["speckd"]["controls"].keys() == {"random", "uniform", "inverted"}
    assert all(rows[arm]["controls"] == {} for arm in rows.keys() - {"speckd"})
    for control, gaps in rows["speckd"]["controls"].items():
        both = (rows[arm]["figures"]["teacher_kl"] for arm in ("speckd", f"speckd+{control}"))
        own, chance = both
        assert gaps["teacher_kl"]["mean"] == pytest.approx(own - chance)
    assert "speckd random" in shown(outcome, "teacher_kl")
    spec_of_control = (tmp_path / "run/cells/speckd+random/seed-3/spec.yaml").read_text()
    lines = (tmp_path / "run/cells/speckd/seed-3/metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line).get("acceptance/speckd") for line in lines]
    rates = [rate for rate in rates if rate is not None]
    assert f"rate: {sum(rates) / len(rates)}"[:10] in spec_of_control
    page = (tmp_path / "run" / "comparison.html").read_text("utf-8")
    assert page == report([tmp_path / "run"]), "as kdcore report draws it"
    assert "speckd minus speckd+random" in page
    assert "differences from kd" in page
    assert f"failed: broken, seed 3: {file}:1: arms.broken.student.layers: layers [99]" in page

    before = (tmp_path / "run/cells/kd/seed-3/run.json").read_text()
    assert kdcore("compare", file).returncode == 2
    again = kdcore("compare", file, "--resume", "--metric", "rouge_l")  # else the first there is
    assert again.returncode == 0, again.stderr
    assert "ROUGE-L" in again.stdout and "failed: broken, seed 3" in again.stdout
    assert (tmp_path / "run/cells/kd/seed-3/run.json").read_text() == before, "not run again"


def test_each_arm_is_compared_at_the_point_that_other_rows_chose(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    """In the mean of its trials; also where every point of an arm fails."""
    other = [{"prompt": f"the student of {n}?", "response": f"sat on {n}"} for n in range(4)]
    write_lines(tmp_path / "other.jsonl", other)
    arms = {"kd": {}, "adamless": {"training": {"optimizer": "sgd"}}, "torn": {"student": TORN}}
    file = asked(
        tmp_path,
        base | {"evaluation": {"samples": 0}},
        arms=arms,
        seeds=[0],
        grid={"training.learning_rate": [1e-6, 1e-2]},
        validation={"name": "chat", "path": str(tmp_path / "other.jsonl")},
        choose_by="perplexity",
        trials=2,
        draws=20,
    )
    outcome = compare(compare_spec(file)).read_json("comparison.json")
    rows = {row["arm"]: row for row in outcome["arms"]}
    chosen_by = outcome["chosen_by"]
    assert chosen_by["metric"]["name"] == "perplexity" and chosen_by["seeds"] == [1, 2]
    assert "other" in chosen_by["rows"]["path"] and outcome["seeds"] == [0]
    said = shown(outcome, "teacher_kl")
    assert f"was lowest on the validation rows ({tmp_path / 'other.jsonl'}), in the mean" in said
    assert "in the mean over seeds 1, 2:" in said
    for arm in ("kd", "adamless"):
        tried = [each["figures"]["perplexity"] for each in rows[arm]["grid"]]
        best = rows[arm]["grid"][tried.index(min(tried))]["fields"]
        assert rows[arm]["chosen"] == best, "on the other rows"
        place = outcome_folder(tmp_path, arm, tried.index(min(tried)))
        figures = json.loads((place / "seed-0/results.json").read_text())["after"]
        assert rows[arm]["figures"] == figures, "on the rows that are reported"
        assert figures["perplexity"] not in tried
        trials = [Run(place / f"seed-{seed}") for seed in (1, 2)]
        for seed, trial in enumerate(trials, start=1):
            spec = trial.spec()
            assert spec["seed"] == seed and "other" in spec["data"]["heldout"]["path"]
        each = [trial.read_json("results.json")["after"]["perplexity"] for trial in trials]
        assert each[0] != each[1] and min(tried) == pytest.approx(sum(each) / 2)
    assert rows["torn"]["chosen"] is None and "figures" not in rows["torn"]
    failed = {f"torn, point {point}, seed {seed}" for point in (0, 1) for seed in (1, 2)}
    assert outcome["failures"].keys() == failed
    said = shown(outcome, "perplexity")
    rate = rows["kd"]["chosen"]["training.learning_rate"]
    assert f"kd: training.learning_rate {rate} (the edge of the grid)" in said
    assert "torn: every grid point failed" in said


def test_an_arm_without_the_field_of_a_grid_runs_once_a_seed(
    tmp_path: Path, base: dict[str, Any], kdcore: Callable[..., Any]
) -> None:
    """The others choose, and check says who does not."""
    gated = {"method": {"gates": ["speckd"]}, "evaluation": {"samples": 0}}
    write_lines(tmp_path / "other.jsonl", [{"prompt": "the cat", "response": "sat"}] * 2)
    file = asked(
        tmp_path,
        base | gated | {"training": base["training"] | {"steps": 1}},
        arms={"none": {"method": {"gates": []}}, "gated": {}},
        seeds=[0],
        grid={"method.gates.0.k": [5]},
        validation={"name": "chat", "path": str(tmp_path / "other.jsonl")},
        controls=True,
        draws=20,
    )
    checked = " ".join(kdcore("check", file).stdout.split())
    told = "arm 'none' runs without trials: its spec lacks method.gates.0.k"
    assert told in checked
    assert "1 arm x 1 seed 1 arm x (1 grid point + 1 seed)" in checked
    notes: list[str] = []
    heard = Silent()
    heard.note = notes.append  # type: ignore[method-assign]
    run = compare(compare_spec(file), progress=heard)
    assert notes.count(told) == 1
    outcome = run.read_json("comparison.json")
    none, chosen, *controls = outcome["arms"]
    assert "grid" not in none and none["figures"] and len(chosen["grid"]) == 1
    assert chosen["chosen"] == {"method.gates.0.k": 5} and len(controls) == 3
    assert run.path("cells/none/seed-0/results.json").is_file()
    assert none["lacks"] == ["method.gates.0.k"] and "lacks" not in chosen
    said = shown(outcome, "teacher_kl")
    assert "none: not tried over method.gates.0.k, which its spec lacks" in said
    assert "gated: method.gates.0.k 5" in said
    assert all("lacks" not in control for control in controls)


TORN = {"layers": [0, 99]}


def outcome_folder(folder: Path, arm: str, point: int) -> Path:
    return folder / "run" / "cells" / arm / f"point-{point}"


def test_a_grid_that_chooses_on_reported_rows_is_told(tmp_path: Path, base: dict[str, Any]) -> None:
    class Told(Silent):
        lines: list[str] = []  # noqa: RUF012

        def note(self, line: str) -> None:
            self.lines.append(line)

    heldout = base["data"]["heldout"]
    file = asked(tmp_path, base, arms={"kd": {}}, grid=GRID, validation=heldout | {"limit": 3})
    comparison._note_grid(compare_spec(file), installed(), Told())
    assert Told.lines == [
        "3 of 8 held-out rows are also in validation, which chooses the grid points; "
        "this makes the reported figures optimistic"
    ]


GRID = {"training.learning_rate": [1e-3, 1e-2]}


def test_an_arm_that_lacks_a_seed_is_told() -> None:
    gap = {"mean": 0.5, "low": 0.1, "high": 0.9}
    arms = [{"arm": "kd", "seeds": [0, 1], "figures": {"teacher_kl": 1.0}}]
    arms += [
        {
            "arm": "a",
            "seeds": [1],
            "figures": {"teacher_kl": 1.5},
            "differences": {"teacher_kl": gap},
        }
    ]
    metric = {"name": "teacher_kl", "title": "KL", "format": ".3f", "better": "lower"}
    outcome = {"baseline": "kd", "seeds": [0, 1], "metrics": [metric], "arms": arms, "failures": {}}
    assert "a lacks seed 0: its figures are means over its other seeds" in shown(
        outcome, "teacher_kl"
    )


def test_drafters_are_compared_by_the_same_command(tmp_path: Path, base: dict[str, Any]) -> None:
    drafting = {
        "job": "train-drafter",
        "target": base["teacher"],
        "drafter": {"name": "medusa", "depth": 2},
        "data": base["data"] | {"responses": {"max_new_tokens": 6}},
        "training": base["training"] | {"epochs": 2},
    }
    measured = {"training": {"eval_every": 2}}
    arms = {
        "medusa": {},
        "fasteagle": {"drafter": {"name": "fasteagle", "depth": 3}, **measured},
    }
    file = asked(tmp_path, drafting, arms=arms, seeds=[0, 1], draws=20)
    assert [*JOBS["compare"].look_ahead(compare_spec(file))] == [*arms]
    outcome = compare(compare_spec(file)).read_json("comparison.json")
    assert [row["arm"] for row in outcome["arms"]] == list(arms)
    assert [each["name"] for each in outcome["metrics"]][:2] == ["tau", "tau_tree"]
    taus = []
    for seed in (0, 1):
        results = tmp_path / f"run/cells/fasteagle/seed-{seed}/results.json"
        taus.append(json.loads(results.read_text())["after"]["tau"])
    row = outcome["arms"][1]
    assert row["figures"]["tau"] == pytest.approx(sum(taus) / 2)
    gap = row["differences"]["tau"]
    assert gap["mean"] == pytest.approx(sum(taus) / 2 - outcome["arms"][0]["figures"]["tau"])
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert row["cost"]["tokens"] == outcome["arms"][0]["cost"]["tokens"], "the same budget"
    assert "tau of a chain" in shown(outcome, "tau")
    assert outcome["kept_by_these_rows"] == ["fasteagle"]
    assert "which makes their figures optimistic: fasteagle" in shown(outcome, "tau")
    once = (tmp_path / "run/responses/train.jsonl").read_bytes()
    cells = [file.read_bytes() for file in (tmp_path / "run").glob("cells/*/*/data/train.jsonl")]
    assert cells == 4 * [once], "generated once for all"
    assert "medusa - " in shown(outcome, "level_3"), "what only some arms have"


def test_an_arm_whose_drafter_is_not_trained_is_refused_before_a_cell_is(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    drafting = {
        "job": "train-drafter",
        "target": base["teacher"],
        "drafter": {"name": "medusa", "depth": 2},
        "data": base["data"] | {"responses": {"max_new_tokens": 6}},
        "training": base["training"],
    }
    file = asked(tmp_path, drafting, arms={"medusa": {}, "words": {"drafter": "ngram"}})
    for job in (compare, JOBS["compare"].look_ahead):
        with pytest.raises(UserError, match="arm 'words': drafter 'ngram' is not trainable"):
            job(compare_spec(file))
    assert not (tmp_path / "run").exists()
    tried = {"drafter": [drafting["drafter"], "ngram"]}
    rows = base["data"]["heldout"] | {"limit": 2}
    file = asked(tmp_path, drafting, arms={"kd": {}}, grid=tried, validation=rows)
    with pytest.raises(UserError, match="arm 'kd': drafter 'ngram' is not trainable") as found:
        compare(compare_spec(file))
    assert found.value.field == "grid.drafter.1"


MEDUSA, OTHERS = {"name": "medusa", "depth": 2}, {"name": "fasteagle", "depth": 2}


def test_arms_that_would_store_other_states_in_one_folder_are_refused_before_a_cell_is_trained(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    """Other layers, which only the target tells."""
    shared = {"folder": str(tmp_path / "states")}
    drafting = {
        "job": "train-drafter",
        "target": base["teacher"],
        "drafter": MEDUSA,
        "data": base["data"] | {"responses": {"by": "dataset"}, "hidden_states": shared},
        "training": base["training"] | {"steps": 1},
    }
    arms = {"two": {}, "three": {"drafter": {"depth": 3}}, "none": {"drafter": "ngram"}}
    refuse_other_states(compare_spec(asked(tmp_path, drafting, arms=arms)), installed())
    (tmp_path / "linked").symlink_to(base["teacher"]["model"])
    linked = {"one": {}, "same": {"target": {"model": str(tmp_path / "linked")}}}
    refuse_other_states(compare_spec(asked(tmp_path, drafting, arms=linked)), installed())
    del arms["none"]
    tried = {"grid": {"drafter": [MEDUSA, OTHERS]}}
    tried["validation"] = base["data"]["heldout"] | {"limit": 2}
    other = {"target": {"model": str(saved(tiny_model(seed=3), tmp_path / "other"))}}
    half = {"target": {"dtype": "bfloat16"}}
    for fields, both in (
        ({"arms": arms | {"deep": {"drafter": OTHERS}}}, "arms 'two' and 'deep' store .* layers"),
        ({"arms": {"two": {}}, **tried}, "two points of arm 'two' store hidden states"),
        ({"arms": {"one": {}, "other": other}}, "states of a different target in"),
        ({"arms": {"one": {}, "half": half}}, "states of a different dtype of the target in"),
    ):
        spec = compare_spec(asked(tmp_path, drafting, seeds=[0], **fields))
        for job in (compare, JOBS["compare"].look_ahead):
            with pytest.raises(UserError, match=both) as found:
                job(spec)
            assert found.value.field == "base.data.hidden_states.folder"
        assert not (tmp_path / "run").exists()


def test_arms_share_responses_though_their_teachers_round_differently(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    """The first cell generates them, as its teacher does; so all learn from the same tokens."""
    data = base["data"] | {"responses": {"by": "teacher", "max_new_tokens": 4}}
    arms = {"full": {}, "half": {"teacher": {"dtype": "bfloat16"}}}
    short = {"training": base["training"] | {"steps": 1}, "evaluation": {"samples": 0}}
    file = asked(tmp_path, base | {"data": data} | short, arms=arms, seeds=[0], draws=10)
    outcome = compare(compare_spec(file)).read_json("comparison.json")
    assert outcome["failures"] == {} and outcome["arms"][1]["differences"]
    once = (tmp_path / "run/responses/train.jsonl").read_bytes()
    cells = [file.read_bytes() for file in (tmp_path / "run").glob("cells/*/*/data/train.jsonl")]
    assert cells == 2 * [once]
    names = [tmp_path / f"run/cells/{arm}/seed-0/metrics.jsonl" for arm in arms]
    full, half = (json.loads(name.read_text().splitlines()[0])["loss"] for name in names)
    assert full != half, "each learns from its own teacher"


def test_a_figure_without_a_better_side_chooses_nothing() -> None:
    figures = {"tau": 1.0, "gate/speckd": 0.5}
    results = TrainingResults(after=figures, metrics=[Metric("tau", "tau", ".2f", "higher")])
    asked: Any = SimpleNamespace(choose_by="gate/speckd")
    cell: Any = SimpleNamespace(results=lambda: results)
    unmeasured = r"choose_by names 'gate/speckd', which was not measured\nuse one of: tau"
    with pytest.raises(UserError, match=unmeasured):
        comparison._refuse_unmeasured(asked, cell)


@pytest.mark.parametrize("values", [[None, 10], [[], ["speckd"]], ["b", "a"], [{"a": 1}, {}]])
def test_what_has_no_order_has_no_edge(values: list[Any]) -> None:
    grid = [{"fields": {"a.b": value}, "figures": {}} for value in values]
    arm = {"arm": "kd", "seeds": [], "grid": grid, "chosen": grid[0]["fields"]}
    metric = {"name": "a", "title": "a", "format": ".1f", "better": "lower"}
    outcome = {"metrics": [metric], "baseline": "kd", "seeds": [0], "kept_by_these_rows": []}
    said = shown(outcome | {"arms": [arm], "failures": {}}, "a")
    assert said.endswith(f"kd: a.b {values[0]}")


def test_responses_are_kept_where_the_spec_says(tmp_path: Path, base: dict[str, Any]) -> None:
    asked_for = {"by": "teacher", "max_new_tokens": 3, "folder": str(tmp_path / "kept")}
    data = base["data"] | {"responses": asked_for}
    file = asked(tmp_path, base | {"data": data}, arms={"kd": {}}, seeds=[0], draws=10)
    compare(compare_spec(file))
    assert (tmp_path / "kept" / "train.jsonl").exists()
    assert not (tmp_path / "run" / "responses").exists()


@pytest.mark.parametrize("field", ["--metric", "choose_by"])
def test_an_unknown_metric_is_refused_before_a_cell_is_trained(
    tmp_path: Path, base: dict[str, Any], kdcore: Callable[..., SimpleNamespace], field: str
) -> None:
    rows = base["data"]["heldout"] | {"limit": 3}
    grid = {"grid": {"method.tau": [1, 2]}, "validation": rows, "choose_by": "teacher_lk"}
    changes = grid if field == "choose_by" else {}
    file = asked(tmp_path, base, arms={"kd": {}}, **changes)
    options = ["--metric", "teacher_lk"] if field == "--metric" else []
    for command in ("compare", *(["check"] if not options else [])):
        said = kdcore(command, file, *options)
        assert said.returncode == 2
        assert f"{field}: unknown metric 'teacher_lk'" in said.stderr
        assert "did you mean 'teacher_kl'" in said.stderr
    assert not (tmp_path / "run").exists()
