"""``kdcore report``: where the page goes, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.cli.conftest import Kdcore
from tests.kdcore.reporting import run_folders


def test_a_runs_page_is_in_its_folder_and_that_of_several_here(kdcore: Kdcore) -> None:
    one, two = (run_folders.distilled(Path("runs") / name) for name in ("a", "b"))
    said = kdcore("report", str(one))
    assert (said.code, said.err) == (0, "")
    assert said.out == f"page: {(one / 'report.html').resolve()}\n"
    assert "<title>a - kdcore report</title>" in (one / "report.html").read_text("utf-8")
    said = kdcore("report", str(one), str(two))
    assert said.out == f"page: {Path('report.html').resolve()}\n"
    assert kdcore("report", str(two), "--out", "mine.html").code == 0
    assert "<title>b - kdcore report</title>" in Path("mine.html").read_text("utf-8")
    assert sorted(os.listdir(two)) == sorted(set(os.listdir(one)) - {"report.html"})


def test_what_cannot_be_done_is_told_in_two_lines(kdcore: Kdcore) -> None:
    run = run_folders.distilled(Path("runs/good"))
    Path("runs/other").mkdir()
    Path("runs/other/run.json").write_text('{"name": "of another program"}')
    for arguments, cause, cure in (
        (["runs/other"], "runs/other is not a run folder", "name the folder of a run"),
        (["runs/goood"], "runs/goood does not exist", "'runs/good'"),
        ([str(run), "--out", "none/x.html"], "none/x.html cannot be written", "--out"),
        ([str(run), "--out", "runs"], "runs is not a regular file", "--out"),
        ([str(run), "--out", "runs", "--overwrite"], "runs is not a regular file", "--out"),
    ):
        said = kdcore("report", *arguments)
        assert (said.code, said.out) == (2, ""), arguments
        error, fix = said.err.splitlines()
        assert cause in error and cure in fix, said.err
    assert sorted(os.listdir()) == ["runs"]
    results = json.loads((run / "results.json").read_text())
    results["samples"][0]["before"] = "\ud83d"  # half a character
    (run / "results.json").write_text(json.dumps(results))
    assert kdcore("report", str(run), "--out", "half.html").code == 0
    (run / "results.json").write_text("{")
    said = kdcore("report", str(run))
    assert said.code == 2 and "results.json does not have the format that kdcore writes" in said.err
    (run / "spec.yaml").write_text('note: "\\ud83d"\n')
    said = kdcore("report", str(run))
    assert said.code == 2 and "spec.yaml:1: the character '\\ud83d' is not valid text" in said.err


def test_only_its_own_pages_are_replaced_unasked(kdcore: Kdcore) -> None:
    run = run_folders.distilled(Path("runs/a"))
    for content in ("", "my notes", "<!doctype html>\n<title>kdcore report</title>", "x" * 5000):
        Path("mine.html").write_text(content)
        said = kdcore("report", str(run), "--out", "mine.html")
        assert (said.code, said.out) == (2, "")
        error, cure = said.err.splitlines()
        assert "mine.html already exists" in error and "--overwrite" in cure
        assert Path("mine.html").read_text() == content
    assert kdcore("report", str(run), "--out", "mine.html", "--overwrite").code == 0
    other = run_folders.distilled(Path("runs/b"))
    assert kdcore("report", str(other), "--out", "mine.html").code == 0
    assert "<title>b - kdcore report</title>" in Path("mine.html").read_text("utf-8")
    assert sorted(os.listdir()) == ["mine.html", "runs"]
