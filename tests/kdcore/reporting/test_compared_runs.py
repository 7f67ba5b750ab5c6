"""Finished runs compared by their stored rows, and the tables as text."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

import kdcore
from kdcore.errors import UserError
from kdcore.evaluation.bootstrap import paired_differences
from kdcore.reporting.compared_runs import compared
from kdcore.reporting.report_tables import Cell, Table
from kdcore.reporting.run_record import read_runs
from kdcore.reporting.table_text import Tables, as_text
from kdcore.runs.results import Measured
from kdcore_cli.main import run as command_line
from tests.kdcore.reporting import run_folders
from tests.kdcore.reporting.run_folders import HOSTILE, METRICS

KL = METRICS[:1]


def trained(
    folder: Path,
    sums: list[float],
    *,
    seed: int = 0,
    gate: str = "all",
    heldout: str = "rows.jsonl",
    digest: str = "t",
) -> Path:
    """A finished run whose teacher KL has these sums over rows of ten positions."""
    after = {"lengths": [10] * len(sums), "sums": {"teacher_kl": sums}, "scores": {}}
    figures = {"teacher_kl": sum(sums) / (10 * len(sums))}
    run_folders.write(
        folder,
        "distill",
        results_json={"before": {}, "after": figures, "metrics": KL, "samples": []},
        heldout_rows_json={"before": {}, "after": after},
        metrics_jsonl=[{"step": 2, "seconds": 1.5, "tokens": 100.0}],
    )
    facts = json.loads((folder / "run.json").read_text())
    facts["teacher"] = {"name": f"teacher {digest}", "digest": digest}
    (folder / "run.json").write_text(json.dumps(facts))
    spec: dict[str, Any] = {"job": "distill", "run": str(folder), "seed": seed}
    spec |= {"method": {"gates": [gate]}, "data": {"heldout": {"path": heldout}}}
    (folder / "spec.yaml").write_text(json.dumps(spec))
    return folder


def measured(sums: list[float]) -> Measured:
    return Measured([10] * len(sums), {"teacher_kl": sums})


def test_runs_that_differ_by_their_seed_are_one_arm(tmp_path: Path) -> None:
    kd = [[10.0, 20.0, 30.0], [12.0, 21.0, 33.0]]
    gated = [[8.0, 19.0, 31.0], [9.0, 18.0, 30.0]]
    folders = [
        trained(tmp_path / f"{gate}-{seed}", sums, seed=seed, gate=gate)
        for gate, arms in (("all", kd), ("speckd", gated))
        for seed, sums in enumerate(arms)
    ]
    found = compared(read_runs(folders))
    assert found.baseline == "all" and found.seeds == [0, 1]
    assert [(arm.arm, arm.seeds) for arm in found.arms] == [("all", [0, 1]), ("speckd", [0, 1])]
    base, other = found.arms
    assert base.figures["teacher_kl"] == pytest.approx((60 + 66) / 60)
    assert base.differences == {}
    expected = paired_differences([*map(measured, gated)], [*map(measured, kd)])
    assert other.differences == expected
    assert other.cost is not None and other.cost.seconds == 3.0 and other.cost.tokens == 200.0


def test_arms_whose_runs_share_one_name_keep_two(tmp_path: Path) -> None:
    names = {"kd-0": ("all", 0), "kd-1": ("all", 1), "kd_0": ("speckd", 0), "kd_1": ("speckd", 1)}
    folders = [
        trained(tmp_path / name, [10.0, 20.0], seed=seed, gate=gate)
        for name, (gate, seed) in names.items()
    ]
    assert [arm.arm for arm in compared(read_runs(folders)).arms] == ["kd-0", "kd_0"]
    cells = [
        trained(tmp_path / f"cells/{arm}/seed-{seed}", [10.0, 20.0], seed=seed, gate=arm)
        for arm in ("kd", "speckd")
        for seed in (0, 10)
    ]
    assert [arm.arm for arm in compared(read_runs(cells)).arms] == ["kd", "speckd"]


def test_runs_of_other_seeds_are_paired_by_row(tmp_path: Path) -> None:
    one = trained(tmp_path / "one", [10.0, 20.0], seed=0)
    two = trained(tmp_path / "two", [11.0, 21.0], seed=7, gate="speckd")
    found = compared(read_runs([one, two]))
    gap = found.arms[1].differences["teacher_kl"]
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.1, 0.1, 0.1))


def test_the_same_run_twice_is_two_arms(tmp_path: Path) -> None:
    folders = [trained(tmp_path / name, [10.0, 20.0]) for name in ("first", "again")]
    assert [arm.arm for arm in compared(read_runs(folders)).arms] == ["first", "again"]


@pytest.mark.parametrize(
    ("other", "cause"),
    [
        ({"heldout": "others.jsonl"}, r"one and two differ in data\.heldout, so their held-out"),
        ({"digest": "u"}, "one and two have different teachers: teacher t and teacher u"),
        ({"sums": [1.0, 2.0, 3.0]}, "two and one were measured on different held-out rows"),
    ],
)
def test_runs_that_were_not_measured_alike_are_refused(
    tmp_path: Path, other: dict[str, Any], cause: str
) -> None:
    one = trained(tmp_path / "one", [10.0, 20.0])
    two = trained(tmp_path / "two", gate="speckd", **{"sums": [10.0, 21.0]} | other)
    with pytest.raises(UserError, match=cause):
        compared(read_runs([one, two]))


def test_a_run_without_results_is_refused(tmp_path: Path) -> None:
    one = trained(tmp_path / "one", [10.0, 20.0])
    two = trained(tmp_path / "two", [10.0, 20.0], gate="speckd")
    (two / "results.json").unlink()
    with pytest.raises(UserError, match="the run two has no held-out results"):
        compared(read_runs([one, two]))


def test_the_command_shows_the_table_and_writes_it_as_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    trained(Path("kd"), [10.0, 20.0])
    trained(Path("speckd"), [5.0, 15.0], gate="speckd")
    assert command_line(["evaluate", "kd", "speckd"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"speckd +1\.000 +-0\.500 \[-0\.500, -0\.500\]", said)
    assert "each arm has one seed" in said
    assert max(map(len, said.splitlines())) <= 80
    assert command_line(["evaluate", "kd", "speckd", "--table", "csv"]) == 0
    header, *lines = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["arm", "figure", "mean", "seeds", "minus", "difference", "low", "high"]
    assert lines[0] == ["kd", "teacher_kl", "1.5", "0", "", "", "", ""]
    assert lines[1][:6] == ["speckd", "teacher_kl", "1.0", "0", "kd", "-0.5"]
    assert command_line(["evaluate", "kd", "speckd", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == "kd"
    assert command_line(["evaluate", "kd", "speckd", "--answers", "rouge_l"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert command_line(["evaluate", "kd", "speckd", "--metric", "teacher_lk"]) == 2
    assert "did you mean 'teacher_kl'?" in capsys.readouterr().err


def test_the_command_shows_again_what_a_comparison_or_a_benchmark_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for make in (run_folders.compared, run_folders.benched):
        folder = make(tmp_path / make.__name__)
        before = sorted(folder.iterdir())
        assert command_line(["evaluate", str(folder)]) == 0
        assert "minus kd" in (said := capsys.readouterr().out) or "tokens/s" in said
        assert command_line(["evaluate", str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)
        assert sorted(folder.iterdir()) == before


def test_what_is_markup_in_a_paper_is_escaped(tmp_path: Path) -> None:
    folder = run_folders.compared(tmp_path / "compared")
    latex = kdcore.table(folder, form="latex")
    assert r"\begin{tabular}{lrrrr}" in latex and latex.count(r"\bottomrule") == 1
    assert r"\textless{}b\textgreater{}x" in latex
    assert "$-$0.500 [$-$0.750, $-$0.250]" in latex
    assert all(
        line.startswith("%") for line in latex.partition("\\end{tabular}")[2].split("\n") if line
    )
    markdown = kdcore.table(folder)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    assert "-0.500 [-0.750, -0.250]" in markdown
    for said in (latex, markdown):
        assert "kd is the baseline; below a figure is its difference from the baseline's" in said
        assert "means over seeds 0, 1\n" in said
    assert set(re.findall(r"<\w+", markdown)) == {"<br"}
    lines = [*csv.DictReader(io.StringIO(kdcore.table(folder, form="csv")))]
    assert [line["arm"] for line in lines] == ["kd", HOSTILE, "failed"]
    assert lines[1]["difference"] == "-0.5" and lines[2]["mean"] == ""


def tabulars(latex: str) -> list[list[list[str]]]:
    """The cells of each tabular, read as LaTeX reads them; what LaTeX would refuse fails."""
    found = []
    text = re.sub(r"(?<!\\)%.*", "", latex)
    pattern = r"\\begin\{tabular\}\{(l?r*)\}\n(.*?)\\end\{tabular\}"
    for columns, body in re.findall(pattern, text, re.DOTALL):
        rules = re.findall(r"\\(?:top|mid|bottom)rule\n", body)
        assert rules == ["\\toprule\n", "\\midrule\n", "\\bottomrule\n"]
        lines = re.sub(r"\\(?:top|mid|bottom)rule\n", "", body).split("\\\\\n")
        assert lines.pop() == ""
        rows = [re.split(r"(?<!\\)&", line) for line in lines]
        assert {len(row) for row in rows} == {len(columns)}
        for cell in (cell for row in rows for cell in row):
            bare = re.sub(r"\\[%&$#_{}]|\$(?:-|\\times)\$|\\text\w+\{\}|^\{\}", "", cell)
            assert bare.isascii() and not set(bare) & set("\\&%$#_{}~^<>|"), cell
        assert not any(row[0].startswith(("[", "*")) for row in rows)
        found.append(rows)
    assert found and text.count(r"\begin{") == len(found)
    return found


def test_every_table_is_latex_that_compiles(tmp_path: Path) -> None:
    folder = run_folders.compared(tmp_path / "compared")
    heading, kd, hostile, below, failed = tabulars(kdcore.table(folder, form="latex"))[0]
    assert [row[0].strip() for row in (heading, kd, below, failed)] == ["arm", "kd", "", "failed"]
    assert below[-1].strip() == "$-$0.500 [$-$0.750, $-$0.250]", "below its figure"
    assert [row[-1].strip() for row in (kd, hostile)] == ["2.000", "1.500"]
    for make in (run_folders.distilled, run_folders.benched):
        folder = make(tmp_path / make.__name__)
        assert tabulars(kdcore.table(folder, form="latex"))
    odd = Table(["", "x"], [[Cell("[mine] *"), Cell("1 \\\\ 2~3^4")], [Cell("*"), Cell("5")]])
    [rows] = tabulars(as_text(Tables([odd], [], []), "latex"))
    assert [row[0].strip() for row in rows] == ["", "{}[mine] *", "{}*"]


def test_a_training_and_a_benchmark_have_tables_too(tmp_path: Path) -> None:
    training = run_folders.distilled(tmp_path / "distilled")
    lines = [*csv.DictReader(io.StringIO(kdcore.table(training, form="csv")))]
    assert lines[0]["figure"] == "teacher_kl"
    assert float(lines[0]["difference"]) == pytest.approx(-1.0)
    assert "teacher KL" in kdcore.table(training, form="latex")
    bench = run_folders.benched(tmp_path / "benched")
    lines = [*csv.DictReader(io.StringIO(kdcore.table(bench, form="csv")))]
    assert [line["speedup"] for line in lines] == ["1.25", "1.75"]
    assert r"$\times$ generate [95 \%]" in kdcore.table(bench, form="latex")
    with pytest.raises(UserError, match="unknown table format 'latx'"):
        kdcore.table(bench, form="latx")  # type: ignore[arg-type]


def test_a_table_may_have_a_choice_of_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = [
        {"name": name, "title": name, "format": ".1f", "better": "lower"}
        for name in ("teacher_kl", "tau")
    ]
    folder = run_folders.compared(tmp_path / "compared")
    file = folder / "comparison.json"
    written = json.loads(file.read_text())
    written["metrics"] = metrics
    for arm in written["arms"]:
        if "figures" in arm:
            arm["figures"]["tau"] = 2.0
    file.write_text(json.dumps(written))
    [both] = tabulars(kdcore.table(folder, form="latex"))
    [chosen] = tabulars(kdcore.table(folder, form="latex", metrics=["tau"]))
    assert kdcore.table(folder, metrics="tau") == kdcore.table(folder, metrics=["tau"])
    assert [cell.strip() for cell in both[0][-2:]] == ["teacher\\_kl", "tau"]
    assert both[0][-3].strip() == chosen[0][-2].strip() and chosen[0][-1].strip() == "tau"
    assert command_line(["evaluate", str(folder), "--metric", "tau", "--table", "csv"]) == 0
    lines = [*csv.DictReader(io.StringIO(capsys.readouterr().out))]
    assert {line["figure"] for line in lines} == {"tau"}
    with pytest.raises(UserError, match="unknown metric 'tua'") as wrong:
        kdcore.table(folder, metrics=["tua"])
    assert wrong.value.cure == "did you mean 'tau'?"
    training = run_folders.distilled(tmp_path / "distilled")
    with pytest.raises(UserError, match="the run distilled is none"):
        kdcore.table(training, metrics=["teacher_kl"])


@pytest.mark.parametrize("show", [kdcore.table, kdcore.report])
def test_no_run_is_a_mistake_of_the_caller(show: Any) -> None:
    with pytest.raises(UserError, match="no run is named"):
        show()


def test_an_interrupted_comparison_has_no_empty_table(tmp_path: Path) -> None:
    folder = run_folders.compared(tmp_path / "compared")
    (folder / "comparison.json").unlink()
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"status": "interrupted"}))
    with pytest.raises(UserError) as refused:
        kdcore.table(folder)
    assert refused.value.cause == "the run compared has no results; its status is 'interrupted'"
    assert refused.value.cure == "finish the run with resume=True"
