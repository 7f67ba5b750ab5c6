"""A server in a benchmark: the same prompts and tokens, and the server's own count of drafts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcore.errors import UserError
from kdcore.jobs.bench import MEASUREMENTS, bench
from kdcore.models.loading.load import load_model
from kdcore.runs.progress import Silent
from kdcore.specs.bench import BenchSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore_cli.terminal.bench_table import show_bench
from tests.fixtures.apps.endpoint_app import Endpoint, served
from tests.fixtures.json_lines import write_lines
from tests.tiny.tiny_chat_models import saved, tiny_model


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(), tmp_path_factory.mktemp("target"))


@pytest.fixture
def server(target: Path) -> Iterator[Endpoint]:
    with served(Endpoint(load_model(ModelSpec(model=str(target))))) as running:
        yield running


def spec_of(folder: Path, target: Path, **changes: Any) -> BenchSpec:
    rows = [{"turns": [f"the mat {n} sat"]} for n in range(3)]
    write_lines(folder / "rows.jsonl", rows)
    asked: dict[str, Any] = {
        "job": "bench",
        "run": folder / "run",
        "target": {"model": str(target)},
        "baselines": [],
        "sets": {"mats": {"name": "chat", "path": folder / "rows.jsonl"}},
        "max_new_tokens": 8,
    }
    return BenchSpec.model_validate(asked | changes)


def named(server: Endpoint) -> dict[str, Any]:
    return {"endpoint": server.url, "model": "tiny-chat"}


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def test_with_and_without_drafting(
    tmp_path: Path, target: Path, server: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    server.drafts = (0, [])
    with served(Endpoint(server.model, drafts=(4, [3, 1]))) as drafting:
        servers = {"alone": named(server), "drafts": named(drafting)}
        run = bench(spec_of(tmp_path, target, servers=servers))
    rows = {row["method"]: row for row in run.read_json("bench.json")["rows"]}
    assert list(rows) == ["plain", "alone", "drafts"]
    assert [rows[name]["identical"] for name in rows] == [1.0, 1.0, 1.0]
    assert (rows["alone"]["tau"], rows["alone"]["acceptance"]) == (None, [])
    assert rows["drafts"]["tau"] == 1 + 4 / 4  # accepted tokens / drafts
    assert rows["drafts"]["acceptance"] == pytest.approx([3 / 4, 1 / 3])
    assert "draft_ms" not in rows["drafts"] or rows["drafts"]["draft_ms"] is None
    assert rows["drafts"]["predicted"] is None
    assert set(rows["drafts"]["speedup"]) == {"plain", "alone"}
    lines = (run.folder / MEASUREMENTS).read_text().splitlines()
    measured = [json.loads(line) for line in lines]
    tokens = {(row["batch"], row["tokens"]) for row in measured}
    assert len(tokens) == 3  # all methods emit as many
    for row in (row for row in measured if row["method"] == "drafts"):
        assert (row["rounds"], row["accepted"]) == (4, {"0": 1, "1": 2, "2": 1})
    from rich.console import Console

    from kdcore.runs.comparison_results import BENCH_RESULTS

    found = run.read(BENCH_RESULTS)
    assert found is not None
    show_bench(Console(width=100), found)
    assert "× alone [95 %]" in capsys.readouterr().out


def test_a_server_without_metrics_or_tokens_is_measured_by_its_speed(
    tmp_path: Path, target: Path, server: Endpoint
) -> None:
    server.returns_ids, server.pause = False, 0.3
    notes = Notes()
    spec = spec_of(tmp_path, target, servers={"other": named(server)}, batch_sizes=[2])
    run = bench(spec, progress=notes)
    (row,) = [r for r in run.read_json("bench.json")["rows"] if r["method"] == "other"]
    assert row["tokens_per_second"] > 0
    assert (row["tau"], row["identical"]) == (None, None)
    assert [line for line in notes.lines if line.startswith("servers.other")] == [
        f"servers.other: {server.url} does not publish metrics, so its speed is measured without "
        "its acceptance"
    ]
    assert server.most == 2  # a batch's prompts are sent at once


def test_counts_that_shrink_or_mean_nothing(tmp_path: Path, target: Path, server: Endpoint) -> None:
    """A server that was restarted drafted an unknown number; another one is none of vLLM's."""
    server.drafts = (-4, [-3])
    run = bench(spec_of(tmp_path, target, servers={"other": named(server)}, limit=1))
    (row,) = [r for r in run.read_json("bench.json")["rows"] if r["method"] == "other"]
    assert (row["tau"], row["acceptance"]) == (None, [])
    server.counts = {'drafts_total{position="1",': 10**400}
    with pytest.raises(UserError, match="does not respond like an OpenAI-compatible endpoint"):
        bench(spec_of(tmp_path, target, servers={"other": named(server)}), overwrite=True)


def test_a_server_that_is_not_there_is_told_before_the_target_loads(tmp_path: Path) -> None:
    servers = {"none": {"endpoint": "http://127.0.0.1:9/v1", "model": "m"}}
    with pytest.raises(UserError, match=r"cannot reach http://127\.0\.0\.1:9/v1") as wrong:
        bench(spec_of(tmp_path, tmp_path / "no-target", servers=servers))
    assert "\n" not in wrong.value.cause + wrong.value.cure


def test_a_name_stands_for_one_of_both(tmp_path: Path, target: Path) -> None:
    servers = {"copies": {"endpoint": "http://127.0.0.1:9/v1", "model": "m"}}
    with pytest.raises(ValueError, match="'copies' names a method and a server"):
        spec_of(tmp_path, target, servers=servers, methods={"copies": {"drafter": "ngram"}})
    with pytest.raises(ValueError, match="the method name 'plain' is reserved"):
        spec_of(tmp_path, target, servers={"plain": servers["copies"]})
