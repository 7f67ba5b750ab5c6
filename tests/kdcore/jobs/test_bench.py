"""A benchmark counts for all methods alike, resumes, and adds up as by hand."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from kdcore.components.registry import installed
from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.model import generated_message
from kdcore.data.templates.mask import prompt_ids
from kdcore.decoding import build
from kdcore.decoding.drafters.files import drafter_choice, save_drafter
from kdcore.errors import UserError
from kdcore.evaluation.speed.bench_outcome import Measurement, outcome
from kdcore.jobs.bench import MEASUREMENTS, _agreed, bench
from kdcore.models.assembly import Assembly
from kdcore.models.loading.load import load_model
from kdcore.reporting.page import report
from kdcore.reporting.report_tables import bench_table, turns_table
from kdcore.reporting.table_text import as_text, tables_of
from kdcore.runs.comparison_results import BenchResults, BenchRow, Speedup
from kdcore.runs.inputs import OtherInput
from kdcore.specs.bench import BenchSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore_baselines.decoders.transformers_generate import Generate
from kdcore_cli.terminal.bench_table import show_bench
from tests.fixtures.json_lines import write_lines
from tests.tiny.tiny_chat_models import saved, tiny_model


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(), tmp_path_factory.mktemp("target"))


def spec_of(folder: Path, target: Path, **changes: Any) -> BenchSpec:
    sets = {}
    for name, count in (("mats", 3), ("teachers", 2)):
        rows = [{"turns": [f"the {name} {n} sat", "and then?"]} for n in range(count)]
        write_lines(folder / f"{name}.jsonl", rows)
        sets[name] = {"name": "chat", "path": folder / f"{name}.jsonl"}
    asked: dict[str, Any] = {
        "job": "bench",
        "run": folder / "run",
        "target": {"model": str(target)},
        "methods": {"copies": {"drafter": "ngram"}},
        "baselines": ["generate", "prompt_lookup"],
        "sets": sets,
        "max_new_tokens": 12,
        "turns": 1,
    }
    return BenchSpec.model_validate(asked | changes)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / MEASUREMENTS).read_text().splitlines()]


def test_every_method_decodes_every_batch_to_the_same_tokens(tmp_path: Path, target: Path) -> None:
    run = bench(spec_of(tmp_path, target, batch_sizes=[1, 2]))
    found = lines(run.folder)
    assert len(found) == 4 * (3 + 2) + 4 * (2 + 1)
    assert {row["turn"] for row in found} == {1} and not run.path("answers.json").exists()
    by_cell: dict[Any, set[int]] = {}
    for row in found:
        cell = (row["task_set"], row["turn"], row["batch"], row["batch_size"])
        by_cell.setdefault(cell, set()).add(row["tokens"])
        assert row["identical"] == 1.0, row
    assert all(len(tokens) == 1 for tokens in by_cell.values())
    rows = {(r["method"], r["batch_size"]): r for r in run.read_json("bench.json")["rows"]}
    methods = ("generate", "prompt_lookup", "plain", "copies")
    assert set(rows) == {(method, size) for size in (1, 2) for method in methods}
    assert rows["plain", 1]["tau"] == 1.0 and rows["plain", 1]["acceptance"] == []
    assert rows["generate", 1]["speedup"]["generate"]["mean"] == 1.0
    (replay,) = json.loads(run.path("replay.json").read_text())
    assert replay["method"] == "copies" and "the mats 0 sat" in replay["prompt"]
    assert sum(len(one["emitted"]) for one in replay["rounds"]) <= 12
    assert "Decoding speed of" in report([run.folder])
    assert rows["copies", 2]["tau"] >= 1.0 and rows["copies", 2]["draft_ms"] > 0


class Prompts:
    """The prompts that transformers' `generate` decodes, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[list[int]] = []
        plain = Generate.decode

        def decode(baseline: Generate, prompts: Any, seed: int) -> Any:
            self.seen += map(list, prompts)
            return plain(baseline, prompts, seed)

        monkeypatch.setattr(Generate, "decode", decode)


def test_methods_with_one_engine_and_the_same_hidden_states_share_it(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine may hold a copy of the weights: as many as methods would not fit."""
    asked = []

    def bound(target: Any, layers: tuple[int, ...], *rest: Any) -> None:
        asked.append(layers)

    monkeypatch.setattr(build, "bound_engine", bound)
    eagle = {"name": "eagle3", "features": [0, 1, 2], "depth": 2}
    methods = {"copies": "ngram", "suffixes": "suffix", "eagle": eagle, "again": eagle}
    drafting = {name: {"drafter": drafter} for name, drafter in methods.items()}
    settings = {"batch_sizes": [1, 2], "temperatures": [0.0, 1.0]}
    bench(spec_of(tmp_path, target, methods=drafting, baselines=[], **settings))
    assert asked == [(), (0, 1, 2)], "for all settings and for the replays"


def test_a_later_turn_follows_the_target_s_own_answer(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the prompts of every method, and with the same answer after a kill."""
    asking = {"baselines": ["generate"], "methods": {}, "temperatures": [0.0, 1.0], "limit": 1}
    spec = spec_of(tmp_path, target, turns=None, **asking)
    decoded = Prompts(monkeypatch)
    run = bench(spec)
    loaded = load_model(ModelSpec(model=str(target)))

    def asked(name: str, *answers: list[int]) -> list[int]:
        said = [Message("user", f"the {name} 0 sat")]
        for answer in answers:
            said += [generated_message(answer, loaded), Message("user", "and then?")]
        return prompt_ids(Conversation("x", tuple(said)), loaded.tokenizer)

    first = [asked(name) for name in ("mats", "teachers")]
    model: Any = loaded.model
    ends = [2, loaded.tokenizer.eos_token_id]
    answers = [
        model.generate(torch.tensor([ids]), max_new_tokens=12, eos_token_id=ends)[0, len(ids) :]
        for ids in first
    ]
    own = [answer.tolist() for answer in answers]
    assert json.loads(run.path("answers.json").read_text()) == own
    second = [asked(name, answer) for name, answer in zip(("mats", "teachers"), own, strict=True)]
    warm = first[:1]
    assert decoded.seen == 2 * [*warm, *first, *second]
    assert [row["turn"] for row in lines(run.folder)] == 2 * ([1] * 4 + [2] * 4)

    whole = (run.folder / MEASUREMENTS).read_text().splitlines(keepends=True)
    (run.folder / "bench.json").unlink()
    (run.folder / MEASUREMENTS).write_text("".join(whole[: 8 + 4]))
    planted = [[5, 6, 7], own[1]]
    run.path("answers.json").write_text(json.dumps(planted))
    decoded.seen.clear()
    bench(spec, resume=True)
    assert decoded.seen == [*warm, asked("mats", [5, 6, 7]), second[1]]

    rows = (tmp_path / "mats.jsonl").read_text()
    (tmp_path / "mats.jsonl").write_text(rows.replace("and then?", "and now?", 1))
    with pytest.raises(OtherInput, match=r"the prompts of sets\.mats changed"):
        bench(spec, resume=True)


def test_a_target_without_an_end_token_is_measured(tmp_path: Path) -> None:
    endless = tiny_model()
    for config in (endless.model.config, endless.model.generation_config):
        config.eos_token_id = None
    endless.tokenizer.eos_token = None
    folder = saved(endless, tmp_path / "endless")
    run = bench(spec_of(tmp_path, folder, batch_sizes=[1, 2]))
    assert {row["identical"] for row in lines(run.folder)} == {1.0}
    assert {row["tokens"] / row["batch_size"] for row in lines(run.folder)} <= {12.0, 6.0}


def test_sampling_is_measured_without_a_claim_of_equality(tmp_path: Path, target: Path) -> None:
    run = bench(spec_of(tmp_path, target, temperatures=[1.0], baselines=["generate"]))
    assert {row["identical"] for row in lines(run.folder)} == {None}


def test_a_killed_benchmark_goes_on_with_the_batches_that_lack(
    tmp_path: Path, target: Path
) -> None:
    spec = spec_of(tmp_path, target)
    run = bench(spec)
    whole = (run.folder / MEASUREMENTS).read_text().splitlines(keepends=True)
    (run.folder / "bench.json").unlink()
    (run.folder / MEASUREMENTS).write_text("".join(whole[:6]) + whole[6][:20])
    bench(spec, resume=True)
    again = (run.folder / MEASUREMENTS).read_text().splitlines(keepends=True)
    assert again[:4] == whole[:4]  # a whole batch is kept, the broken one is done again
    assert len(again) == len(whole)
    assert run.read_json("bench.json")["rows"]


def test_a_benchmark_of_other_prompts_or_another_drafter_is_not_gone_on_with(
    tmp_path: Path, target: Path
) -> None:
    (tmp_path / "drafter").mkdir()
    loaded = load_model(ModelSpec(model=str(target)))
    choice = drafter_choice({"name": "medusa", "depth": 1}, installed(), "", "")
    drafter = Assembly(installed()).build(choice)
    drafter.bind(loaded.model, loaded.tokenizer)
    save_drafter(tmp_path / "drafter", drafter, choice, loaded, installed())
    asked = {"methods": {"heads": {"folder": tmp_path / "drafter"}}, "baselines": []}
    spec = spec_of(tmp_path, target, **asked)
    run = bench(spec)
    done = (run.folder / MEASUREMENTS).read_text()
    (tmp_path / "mats.jsonl").write_text('{"turns": ["another mat"]}\n')
    with pytest.raises(OtherInput, match=r"the prompts of sets\.mats changed"):
        bench(spec, resume=True)
    spec = spec_of(tmp_path, target, **asked)
    with torch.no_grad():
        next(iter(drafter.parameters())).add_(1.0)
    save_drafter(tmp_path / "drafter", drafter, choice, loaded, installed())
    with pytest.raises(OtherInput, match="the drafter of heads changed"):
        bench(spec, resume=True)
    assert (run.folder / MEASUREMENTS).read_text() == done
    assert bench(spec, overwrite=True).read_json("bench.json")["rows"]


def test_an_overwriting_that_cannot_be_done_harms_nothing(tmp_path: Path, target: Path) -> None:
    run = bench(spec_of(tmp_path, target))
    done = (run.folder / MEASUREMENTS).read_text()
    with pytest.raises(UserError, match="folder 'nowhere' does not exist"):
        bench(spec_of(tmp_path, Path("./nowhere")), overwrite=True)
    assert (run.folder / MEASUREMENTS).read_text() == done


def test_the_figures_by_hand() -> None:
    def measured(batch: int, method: str, seconds: float, **rest: Any) -> Measurement:
        return Measurement(1, 0.0, 1, "a", 1, batch, method, seconds, 12, identical=1.0, **rest)

    spec = BenchSpec.model_validate(
        {
            "job": "bench",
            "target": {"model": "any"},
            "methods": {
                "fast": {"drafter": "ngram"},
                "rested": {"drafter": "ngram", "pauses": True},
            },
            "sets": {"a": {"name": "chat", "path": "a.jsonl"}},
        }
    )
    done = []
    for batch, seconds in enumerate((1.0, 2.0, 4.0)):
        plain = measured(batch, "plain", 4.0, rounds=12, draft=0.0, verify=3.6, accepted={0: 12})
        done += [measured(batch, "generate", 4.0), plain]
        rounds: dict[str, Any] = {
            "rounds": 5,
            "draft": 0.5,
            "verify": 1.0,
            "accepted": {0: 1, 1: 1, 2: 3},
        }
        done.append(measured(batch, "fast", seconds, **rounds))
        rested = rounds | {"rounds": 10, "accepted": {0: 6, 1: 1, 2: 3}, "undrafted": 5}
        rested["emitted"] = 17
        done.append(measured(batch, "rested", seconds, **rested))
    (row,) = [r for r in outcome(spec, done).rows if r.method == "fast"]
    speedup = row.speedup["generate"]
    assert speedup.sets == {"a": 2.0} and speedup.low is not None and speedup.high is not None
    assert speedup.low >= 1.0 and speedup.high <= 4.0
    assert row.tau == pytest.approx(36 / 15)
    ended = [replace(m, emitted=11) for m in done]  # a drafted end has no bonus token after it
    (early,) = [r for r in outcome(spec, ended).rows if r.method == "fast"]
    assert early.tau == pytest.approx(33 / 15) and early.acceptance == row.acceptance
    assert row.acceptance == pytest.approx([0.8, 0.75])
    assert (row.draft_ms, row.verify_ms) == (100.0, 200.0)
    assert row.predicted == pytest.approx(2.4 * 300 / (100 + 200))
    assert row.undrafted == 0.0
    (rested,) = [r for r in outcome(spec, done).rows if r.method == "rested"]
    assert rested.undrafted == 0.5 and rested.tau == pytest.approx(51 / 30)
    assert rested.acceptance == row.acceptance, "the rounds without drafts reach no level"
    (shown,) = [r for r in bench_table([row, rested]).rows if r[0].text == "rested"]
    assert "50%" in [cell.text for cell in shown]

    (alone,) = [r for r in outcome(spec, done[:4]).rows if r.method == "fast"]
    assert _agreed([1, 2, 9, 4], [1, 2, 3, 4]) == 0.5 and _agreed([1, 2], [1, 2, 3, 4]) == 0.5
    assert _agreed([1, 2, 3], [1, 2, 3]) == 1.0
    own = Speedup({"a": 4.0}, 4.0, None, None)
    assert alone.speedup["generate"] == own  # one batch says nothing of how far others vary

    assert row.turns == [] and turns_table([row]) is None
    second = [replace(each, turn=2, seconds=2 * each.seconds) for each in done[:4]]
    found = outcome(spec, done + second)
    (row,) = [r for r in found.rows if r.method == "fast"]
    assert [(t.turn, t.tokens_per_second) for t in row.turns] == [(1, 6.0), (2, 6.0)]
    assert row.turns[1].speedup["generate"] == own and row.turns[1].tau == pytest.approx(12 / 5)
    shown = turns_table(found.rows)
    assert shown is not None and len(shown.rows) == 8
    assert [cell.text for cell in shown.rows[-1]][4:7] == ["2", "6.0", "4.00"]
    lines = list(csv.DictReader(as_text(tables_of(found), "csv").splitlines()))
    assert [line["turn"] for line in lines if line["method"] == "fast"][-2:] == ["2", "2"]


def test_a_narrow_terminal_keeps_the_names_of_methods_whole() -> None:
    over = {name: Speedup({"a": 1.0}, 1.0, 0.9, 1.1) for name in ("generate", "plain", "vllm")}
    row = BenchRow("vllm-fasteagle", 0.0, 1, 1234.5, over, 0.5, 2.5, [0.5], agreed=0.75)
    said = io.StringIO()
    show_bench(Console(file=said, width=80), BenchResults(target="any", rows=[row]))
    lines = said.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert any(line.startswith("vllm-fasteagle ") for line in lines)
    assert any(line.count("[0.90, 1.10]") == 3 for line in lines)


def test_transformers_assisted_generation_is_a_baseline(tmp_path: Path, target: Path) -> None:
    small = {"name": "assisted", "model": str(saved(tiny_model(seed=3), tmp_path / "assistant"))}
    spec = spec_of(tmp_path, target, baselines=[small], batch_sizes=[2], methods={})
    run = bench(spec)
    of = {(row["method"], row["batch_size"], row["identical"]) for row in lines(run.folder)}
    assert of == {("assisted", 2, 1.0), ("plain", 2, 1.0)}
    other = tiny_model(seed=3)
    other.tokenizer.add_tokens(["another"])
    saved(other, tmp_path / "assistant")
    with pytest.raises(UserError, match="different tokenizers"):
        bench(spec, overwrite=True)


def test_a_baseline_of_another_model_is_not_gone_on_with(tmp_path: Path, target: Path) -> None:
    small = {"name": "assisted", "model": str(saved(tiny_model(seed=3), tmp_path / "assistant"))}
    spec = spec_of(tmp_path, target, baselines={"mine": small}, methods={}, limit=1)
    bench(spec)
    saved(tiny_model(seed=4), tmp_path / "assistant")
    with pytest.raises(OtherInput, match="the model of mine changed"):
        bench(spec, resume=True)


def test_each_number_of_threads_is_measured(tmp_path: Path, target: Path) -> None:
    before = torch.get_num_threads()
    asked = {"baselines": {"lookup": {"name": "prompt_lookup", "tokens": 3}}, "limit": 1}
    run = bench(spec_of(tmp_path, target, threads=[2, 1], **asked))
    assert torch.get_num_threads() == before
    found = [(row["threads"], row["method"]) for row in run.read_json("bench.json")["rows"]]
    assert found == [(n, name) for n in (2, 1) for name in ("lookup", "plain", "copies")]
    assert all(row["cpu"] > 0 for row in lines(run.folder))
    (first, *_) = run.read_json("bench.json")["rows"]
    assert first["cpu_ms"] > 0 and set(first["cpu_speedup"]) == {"lookup", "plain"}
    text = report([run.folder])
    assert "threads 2" in text and "CPU × lookup" in text


def test_a_prompt_that_leaves_no_room_is_named(tmp_path: Path, target: Path) -> None:
    with pytest.raises(UserError, match=r"sets.mats: mats.jsonl:1 has \d+ tokens"):
        bench(spec_of(tmp_path, target, max_new_tokens=500))


@pytest.mark.parametrize(
    ("method", "cause"),
    [
        ({"drafter": "ngram", "verifier": "greedy"}, "does not sample"),
        ({"drafter": "medusa", "verifier": "chain_sampling"}, "the tree Backbone branches"),
    ],
)
def test_a_verifier_that_does_not_suit_is_refused_before_the_target_is_loaded(
    tmp_path: Path,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: dict[str, Any],
    cause: str,
) -> None:
    monkeypatch.setattr("kdcore.jobs.bench.load_model", lambda spec: pytest.fail("loaded"))
    spec = spec_of(tmp_path, target, temperatures=[0.0, 1.0], methods={"mine": method})
    with pytest.raises(UserError, match=cause):
        bench(spec)


def test_a_name_that_is_taken_is_refused(tmp_path: Path, target: Path) -> None:
    with pytest.raises(ValueError, match="'plain' is reserved"):
        spec_of(tmp_path, target, methods={"plain": {"drafter": "ngram"}})
    with pytest.raises(ValueError, match="'copies' names a method and a baseline"):
        spec_of(tmp_path, target, baselines={"copies": "generate"})
    with pytest.raises(ValueError, match="contains prompt_lookup twice"):
        spec_of(tmp_path, target, baselines=["prompt_lookup", {"name": "prompt_lookup"}])


@pytest.mark.parametrize(
    "twice", [{"threads": [1, 1]}, {"temperatures": [0, 0.0]}, {"batch_sizes": [2, 2]}]
)
def test_nothing_is_measured_twice(tmp_path: Path, target: Path, twice: dict[str, Any]) -> None:
    """A resumed run would take what stands there twice for what a kill had left."""
    with pytest.raises(ValueError, match=f"{next(iter(twice))} contains the same value twice"):
        spec_of(tmp_path, target, **twice)


def test_a_temperature_next_to_0_is_measured(tmp_path: Path, target: Path) -> None:
    assert lines(bench(spec_of(tmp_path, target, temperatures=[1e-320])).folder)
