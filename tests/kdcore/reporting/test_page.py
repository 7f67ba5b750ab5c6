"""What a page says, and what a real browser makes of it."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcore.errors import UserError
from kdcore.reporting.curves import POINTS, thinned
from kdcore.reporting.page import report
from tests.fixtures.browser import Browser, chromium
from tests.kdcore.reporting import run_folders

EARLY = {"nodes": [{"text": "a", "parent": 0, "accepted": True}], "emitted": []}
PLOT = r'<figcaption>([^<]*)</figcaption>\s*(?:<div class="plot"[^>]*><script[^>]*>(.*?)</script>)?'


def plots(page: str) -> dict[str, Any]:
    """Title -> figure, or None where a sentence stands for it."""
    return {title: json.loads(drawn) if drawn else None for title, drawn in re.findall(PLOT, page)}


def legends(page: str) -> list[list[str]]:
    """The entries of each legend on the page."""
    found = re.findall(r'<div class="legend">(.*?)</div>', page, re.DOTALL)
    names = [re.findall(r"</svg>([^<]*)</button>", each) for each in found]
    return [[html.unescape(name) for name in legend] for legend in names]


def shown(page: str) -> str:
    """The text between the tags, before the page's own scripts."""
    body = page[page.index("<body>") : page.index('<div id="tip"')]
    return " ".join(re.sub(r"<script.*?</script>|<[^>]*>", " ", body, flags=re.DOTALL).split())


def test_a_distill_run_has_its_table_its_curves_and_its_tokens(tmp_path: Path) -> None:
    page = report([run_folders.distilled(tmp_path / "run")])
    text = shown(page)
    assert "run distill done 4 8.0 400" in text  # steps, seconds, tokens: means a step, times steps
    assert "teacher KL 2.050 1.050 -1.000 [-1.000, -1.000]" in text
    assert "top-1 agreement 25.0% 75.0%" in text
    drawn = plots(page)
    loss = {each["name"]: each for each in drawn["Loss and its terms"]["data"]}
    assert list(loss) == ["loss", html.escape("term/" + run_folders.HOSTILE), "term/kd"]
    assert loss["term/kd"]["x"] == [1, 2, 3, 4] and loss["term/kd"]["y"] == [2, 1, 2 / 3, 0.5]
    (rate,) = drawn["Acceptance rate of each gate"]["data"]
    assert rate["y"] == [0.25, 0.5, 0.75, 1.0]
    layout = drawn["Acceptance rate of each gate"]["layout"]
    assert layout["yaxis"]["rangemode"] == "tozero", "a small change looks small"
    (kl,) = drawn["Held-out teacher KL (nats/token)"]["data"]
    assert (kl["x"], kl["y"]) == ([0, 2], [2.05, 1.5])  # 0 is before the training
    assert drawn["Held-out perplexity"] is None
    assert drawn["Gradient signal-to-noise ratio of each term"]["data"][0]["name"] == "kd"
    assert drawn["L2 norm of each momentum buffer"]["data"][0]["name"] == "tcg"
    assert legends(page)[1:] == [["speckd"], ["kd"], ["tcg"], ["agreement"]]  # the title says one
    assert page.count('class="token refused"') == 1 and page.count('class="token"') == 2
    assert "kdcore 1.2.3" in text


def test_a_run_that_logged_its_layers_has_their_curves(tmp_path: Path) -> None:
    title = "Gradient signal-to-noise ratio of each layer"
    run = run_folders.distilled(tmp_path / "run")
    assert title not in report([run])
    layers = {f"gsnr_layer/kd/model.layers.{n}": 0.5 for n in (0, 1, 10)}
    with (run / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, **layers}) + "\n")
    lines = plots(report([run]))[title]["data"]
    assert [line["name"] for line in lines] == [f"kd/model.layers.{n}" for n in (0, 1, 10)]


def test_a_run_that_measured_once_has_one_column_and_no_change(tmp_path: Path) -> None:
    once = run_folders.distilled(tmp_path / "once")
    for name, kept in (("results.json", {}), ("heldout_rows.json", {"before": {}})):
        written = json.loads((once / name).read_text()) | {"before": {}} | kept
        (once / name).write_text(json.dumps(written))
    page = report([once])
    text = "held-out after teacher KL 1.050 top-1 agreement 75.0% Measured after the training."
    assert text in shown(page) and "bootstrap" not in shown(page)
    assert not re.search('<td class="(better|worse)', page)
    (kl,) = plots(page)["Held-out teacher KL (nats/token)"]["data"]
    assert kl["x"] == [2], "nothing at step 0"
    both = shown(report([once, run_folders.distilled(tmp_path / "both")]))
    assert "held-out run before after change [95 %] teacher KL once - 1.050" in both
    assert "teacher KL both 2.050 1.050 -1.000" in both
    assert "Measured before and after the training." in both


def test_when_a_run_began_is_told_to_the_minute(tmp_path: Path) -> None:
    run = run_folders.distilled(tmp_path / "run")
    for written, told in (("2026-11-27T09:12:22+0000", "2026-11-27 09:12"), ("today", "today")):
        facts = json.loads((run / "run.json").read_text()) | {"started": written}
        (run / "run.json").write_text(json.dumps(facts))
        assert f"started run distill done 4 8.0 400 {told}" in shown(report([run]))


def test_what_a_run_has_not_is_said(tmp_path: Path) -> None:
    run = run_folders.write(tmp_path / "run", "distill", status="running")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "lo')
    page = report([run])
    assert all(figure is None for figure in plots(page).values())
    text = shown(page)
    for said in (
        "run has not finished; its status is 'running'",
        "The run has not measured held-out rows",
        "The run has not logged a step yet.",
        "The run has not logged gradient signal-to-noise ratios: set training.probe_every.",
        "The run did not measure during training: set training.eval_every.",
        "The run has not stored gate weights",
    ):
        assert said in text
    for job, said in (
        ("bench", "a benchmark without results yet"),
        ("compare", "a comparison without results yet"),
        ("train-drafter", "The run has not stored a replay"),
        ("generate-data", "generate-data done"),
    ):
        assert said in shown(report([run_folders.write(tmp_path / job, job)])), job


def test_a_drafter_has_its_levels_in_order_and_its_decode(tmp_path: Path) -> None:
    page = report([run_folders.drafting(tmp_path / "run")])
    drawn = plots(page)
    levels = [each["name"] for each in drawn["Held-out accuracy of each level"]["data"]]
    assert levels == [f"level_{level}" for level in range(1, 12)]
    tau, tree = drawn["Held-out tau (tokens per verification)"]["data"]
    assert (tau["y"], tree["y"]) == ([1.0, 2.0, 3.0], [3.0, 4.0])
    assert "2.00 tokens per verification" in page
    assert page.count('<g class="kept">') == 2 and page.count('<g class="refused">') == 2
    assert "The method did not propose a token in this round." in page
    text = shown(page)
    assert "held-out before tau 1 level_1 0.125 Measured before the training." in text


def test_a_benchmark_has_bars_and_a_comparison_its_grid(tmp_path: Path) -> None:
    page = report([run_folders.benched(tmp_path / "b"), run_folders.compared(tmp_path / "c")])
    drawn = plots(page)
    title = "Speed-up over generate on each task set: temperature 0, batch size 1"
    assert [bar["y"] for bar in drawn[title]["data"]] == [[1.0, 1.5, 1.25], [1.5, 2.0, 1.75]]
    assert drawn[title]["data"][0]["error_y"]["array"] == [None, None, 0.5]
    fastest, plain = drawn["Mean speed-up over generate: temperature 0, batch size 1"]["data"]
    assert (fastest["x"], plain["x"]) == ([1.75], [1.25])
    assert plain["error_x"]["array"] == [0.5]
    (gaps,) = drawn["teacher KL: difference from kd"]["data"]
    assert (gaps["x"], gaps["error_x"]["array"]) == ([-0.5], [0.25])
    said = shown(page)
    assert '<td class="better">1.500<br><small>-0.500 [-0.750, -0.250]</small></td>' in page
    assert "0 1 15.0 1.75 [1.50, 2.25] 1.50 100% 1.0 2.0 50% 25%" in said
    assert "arm seconds tokens memory teacher KL kd 7.5 1,000 2.0 GiB 2.000" in said
    assert (
        "which makes their figures optimistic: kd" in said
        and "kd: lr 0.1 (the edge of the grid)" in said
    )


def test_a_benchmark_of_one_batch_has_no_interval(tmp_path: Path) -> None:
    page = report([run_folders.benched(tmp_path / "run", batches=1)])
    assert "0 1 15.0 1.75 1.50 100% 1.0 2.0 50% 25%" in shown(page)
    means, bars, against_tau, _ = plots(page).values()
    assert means["data"][0]["error_x"]["array"] == [None]
    assert bars["data"][0]["error_y"]["array"] == [None, None, None]
    assert against_tau["data"][1]["error_y"]["array"] == [None]


def test_a_benchmark_shows_speed_against_tau_and_acceptance_by_level(tmp_path: Path) -> None:
    drawn = plots(report([run_folders.benched(tmp_path / "run")]))
    setting = "temperature 0, batch size 1"
    line, first, second = drawn[f"Speed-up against tau: {setting}"]["data"]
    assert line["x"] == line["y"] == [1, 1.5]
    assert (first["x"], first["y"]) == ([1.0], [1.25]) and (second["x"], second["y"]) == (
        [1.5],
        [1.75],
    )
    assert second["error_y"]["array"] == [0.5] and second["error_y"]["arrayminus"] == [0.25]
    levels = drawn[f"Acceptance rate of each level: {setting}"]["data"]
    assert [(each["x"], each["y"]) for each in levels] == [([1, 2], [0.5, 0.25])] * 2


def test_a_benchmark_without_drafts_has_speeds_alone(tmp_path: Path) -> None:
    run = run_folders.benched(tmp_path / "run")
    outcome = json.loads((run / "bench.json").read_text())
    outcome["rows"] = [row | {"tau": None, "acceptance": []} for row in outcome["rows"]]
    (run / "bench.json").write_text(json.dumps(outcome))
    assert len(plots(report([run]))) == 2


def test_a_replay_shows_where_in_the_response_drafts_are_accepted(tmp_path: Path) -> None:
    drawn = plots(report([run_folders.drafting(tmp_path / "run")]))
    (line,) = drawn["Tokens of each verification"]["data"]
    assert (line["x"], line["y"]) == ([0, 3], [3, 1])


def test_a_gate_is_drawn_beside_its_controls(tmp_path: Path) -> None:
    run = run_folders.compared(tmp_path / "run")
    outcome = json.loads((run / "comparison.json").read_text())
    gap = {"teacher_kl": {"mean": 0.25, "low": -0.25, "high": 0.5}}
    outcome["arms"][1] |= {"arm": "gated", "controls": {"random": gap, "uniform": gap}}
    (run / "comparison.json").write_text(json.dumps(outcome))
    (drawn,) = plots(report([run]))["teacher KL: gates and their controls"]["data"]
    assert drawn["y"] == ["gated minus gated+random", "gated minus gated+uniform"]
    assert (drawn["x"], drawn["error_x"]["arrayminus"]) == ([0.25, 0.25], [0.5, 0.5])


def test_several_runs_are_told_apart(tmp_path: Path) -> None:
    one = run_folders.distilled(tmp_path / "one" / "seed-0")
    two = run_folders.distilled(tmp_path / "two" / "seed-0", shift=1.0)
    page = report([one, two, one])
    lines = plots(page)["Loss and its terms"]["data"]
    names = [each["name"] for each in lines if each["name"].endswith("loss")]
    assert names == ["one: loss", "two: loss"]  # they have their last folder's name in common
    assert legends(page)[0] == ["one", "two"]  # once, for all plots
    assert legends(page)[1:] == [["loss", "term/" + run_folders.HOSTILE, "term/kd"]]
    (first, second) = (each["line"]["color"] for each in lines if each["name"].endswith("loss"))
    assert first != second
    assert "teacher KL one 2.050 1.050" in shown(page)


def test_many_runs_have_colours_of_their_own_and_a_title_of_a_line(tmp_path: Path) -> None:
    runs = [run_folders.distilled(tmp_path / f"arm{n}" / "seed-0") for n in range(12)]
    page = report(runs)
    assert "<title>arm0, arm1, arm2 and 9 more - kdcore report</title>" in page
    assert legends(page)[0] == [f"arm{n}" for n in range(12)]
    rates = plots(page)["Acceptance rate of each gate"]
    assert len({each["line"]["color"] for each in rates["data"]}) == 12
    assert rates["layout"]["hovermode"] == "closest"  # a box of twelve would hide the plot


def test_what_is_no_number_leaves_every_plot_to_be_read(tmp_path: Path) -> None:
    run = run_folders.compared(tmp_path / "run")
    outcome = json.loads((run / "comparison.json").read_text())
    outcome["arms"][1]["differences"]["teacher_kl"]["mean"] = math.nan
    (run / "comparison.json").write_text(json.dumps(outcome))
    drawn = [each for _, each in re.findall(PLOT, report([run]))]
    assert drawn and not any("NaN" in each for each in drawn)  # a browser's JSON has none


def test_a_long_run_is_thinned_to_what_a_plot_can_show(tmp_path: Path) -> None:
    run = run_folders.distilled(tmp_path / "run")
    spike, steps = 43_210, 100_000
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            wave = math.sin(step / 7) / 3
            line = {"loss": 99.0 if step == spike else wave, "term/kd": wave, "acceptance/g": wave}
            line |= {f"gsnr/{name}": wave for name in "abc"}
            file.write(json.dumps({"step": step, **line, "seconds": 1.0, "tokens": 1.0}) + "\n")
    page = report([run])
    assert len(page.encode()) < 6e6
    assert "run distill done 100,000" in shown(page)
    assert (
        len(
            re.findall(
                r"The plot shows at most [\d,]+ of up to 100,000 points per line", shown(page)
            )
        )
        == 3
    )
    for title, lines in (("Loss and its terms", 2), ("Acceptance rate of each gate", 1)):
        drawn = plots(page)[title]["data"]
        assert len(drawn) == lines
        assert all(POINTS // lines * 0.9 < len(each["x"]) <= POINTS // lines for each in drawn)
        for each in drawn:
            assert (each["x"][0], each["x"][-1]) == (1, steps)
            assert each["x"] == sorted(set(each["x"])) and min(each["y"]) < -0.33
    loss = plots(page)["Loss and its terms"]["data"][0]
    assert dict(zip(loss["x"], loss["y"], strict=True))[spike] == 99.0


@pytest.mark.parametrize("count", [1, 3, 4, 5, 7, 100, 101])
@pytest.mark.parametrize("limit", [4, 5, 100])
def test_no_line_is_thinned_below_its_extremes(count: int, limit: int) -> None:
    points = [(step, math.cos(step * step)) for step in range(count)]
    kept = thinned(points, limit)
    assert len(kept) <= limit and set(kept) <= set(points) and list(kept) == sorted(kept)
    assert kept[0] == points[0] and kept[-1] == points[-1]
    for find in (min, max):
        assert find(y for _, y in kept) == find(y for _, y in points)
    assert count > limit or list(kept) == points


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("results.json", '{"before": {"a": "much"}}', "before.a"),
        ("token_gates.json", "[{}]", "0.id"),
        ("replay.json", "{", ""),
        ("replay.json", json.dumps([{"method": "m", "prompt": "", "rounds": [EARLY]}]), "rounds"),
        ("before.json", '{"figures": {"tau": "much"}}', "figures.tau"),
        ("bench.json", '{"target": "t", "rows": 3}', "rows"),
        ("heldout_rows.json", '{"before": {"lengths": 3}, "after": {"lengths": 3}}', "lengths"),
        ("metrics.jsonl", "[" * 100_000, None),
    ],
)
def test_a_file_that_is_not_ours_is_named(
    tmp_path: Path, name: str, content: str, where: str | None
) -> None:
    run = run_folders.distilled(tmp_path / "run")
    (run / name).write_text(content)
    if where is None:
        report([run])
    else:
        refused = f"{name} does not have the format that kdcore writes.*{where}"
        with pytest.raises(UserError, match=refused):
            report([run])


def test_a_spec_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    run = run_folders.distilled(tmp_path / "run")
    (run / "spec.yaml").write_text("[" * 3000)
    with pytest.raises(UserError, match=r"spec\.yaml:1: nested too deeply"):
        report([run])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    run_folders.distilled(tmp_path / "good")
    with pytest.raises(UserError, match="goood does not exist") as wrong:
        report([tmp_path / "goood"])
    assert "good'" in wrong.value.cure
    for content in ('{"versions": ["kdcore"]}', '{"versions": "kdcore"}', "[" * 100_000):
        (tmp_path / "good" / "run.json").write_text(content)
        with pytest.raises(UserError, match=r"good(/run\.json is damaged| is not a run folder)"):
            report([tmp_path / "good"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of runs of every job."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        run_folders.distilled(folder / "a"),
        run_folders.distilled(folder / "b", shift=1.0),
        run_folders.drafting(folder / "drafter"),
        run_folders.benched(folder / "bench"),
        run_folders.compared(folder / "compare"),
    ]
    page = folder / "report.html"
    page.write_text(report(runs), "utf-8")
    return page


@pytest.mark.needs("chromium")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_a_browser_draws_it_and_complains_of_nothing(
    browser: Browser, everything: Path, width: int, dark: bool
) -> None:
    browser.open(everything, width=width, dark=dark)
    assert browser.evaluate("document.title").startswith("a, b, drafter")  # and nobody's script ran
    assert browser.evaluate("document.querySelectorAll('img, section b:not(.said b)').length") == 0
    plots, drawn = browser.evaluate(
        "[document.querySelectorAll('.plot').length, document.querySelectorAll('.plot .main-svg')"
        ".length && [...document.querySelectorAll('.plot')].filter(e => e.querySelector('svg'))"
        ".length]"
    )
    assert plots == drawn > 0
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    asked = "getComputedStyle(document.querySelector('.plot .main-svg')).background"
    ground = browser.evaluate(asked)
    assert ("rgb(20, 23, 27)" in ground) == dark
    assert browser.complaints == []
    assert browser.requests == [everything.as_uri()]


@pytest.mark.needs("chromium")
def test_pointing_at_a_token_tells_what_both_models_thought(
    browser: Browser, everything: Path
) -> None:
    browser.open(everything)
    browser.point_at(".token.refused")
    assert not browser.evaluate("document.querySelector('#tip').hidden")
    told = browser.evaluate("document.querySelector('#tip').innerText").split("\n")
    assert told[0] == "·sat"
    assert [cell.strip() for cell in told[2].split("\t")] == ["·mat", "62.5 %", "↵", "12.5 %"]
    assert told[-1] == f"weight 0.100: speckd 0.100 × {run_folders.HOSTILE} 1.000"
    box = browser.evaluate("(({left, right, top}) => [left, right, top])"
                           "(document.querySelector('#tip').getBoundingClientRect())")  # fmt: skip
    assert box[0] >= 0 and box[1] <= 1200 and box[2] >= 0
    assert browser.complaints == []


@pytest.mark.needs("chromium")
def test_the_rounds_of_a_decode_are_stepped_through(browser: Browser, everything: Path) -> None:
    browser.open(everything)
    seen = "[...document.querySelectorAll('.replay .round')].map(e => !e.hidden)"
    assert browser.evaluate(seen) == [True, False]
    step = (
        "(e => { e.value = 2; e.dispatchEvent(new Event('input', {bubbles: true})) })"
        "(document.querySelector('.replay input'))"
    )
    browser.evaluate(step)
    assert browser.evaluate(seen) == [False, True]
    assert browser.evaluate("document.querySelector('.replay output').value") == "2 of 2"


@pytest.mark.needs("chromium")
def test_a_legend_takes_no_room_of_a_plot_and_hides_what_it_speaks_of(
    browser: Browser, tmp_path: Path
) -> None:
    runs = [run_folders.distilled(tmp_path / f"{'arm' * 20}{n}" / "seed-0") for n in range(12)]
    file = tmp_path / "page.html"
    file.write_text(report(runs), "utf-8")
    browser.open(file, width=700)
    rooms = browser.evaluate("[...document.querySelectorAll('.plot .nsewdrag')]"
                             ".map(e => e.getBoundingClientRect().height)")  # fmt: skip
    assert min(rooms) > 200
    seen = (
        "[...document.querySelectorAll('.plot')].slice(0, 2)"
        ".map(p => p.data.map(line => line.visible ?? true))"
    )
    loss, rate = browser.evaluate(seen)
    assert all(loss) and all(rate)
    browser.evaluate("document.querySelector('#curves > .legend button').click()")
    browser.evaluate("document.querySelector('figure .legend button').click()")  # of the losses
    loss, rate = browser.evaluate(seen)
    assert rate == [False] + [True] * 11
    assert loss == [False] * 3 + [False, True, True] * 11
    browser.evaluate("document.querySelector('#curves > .legend button').click()")
    loss, rate = browser.evaluate(seen)
    assert all(rate) and loss == [False, True, True] * 12
    browser.point_at("#curves > .legend button:nth-child(2)")
    strengths = "document.querySelectorAll('.plot')[1].data.map(line => line.opacity)"
    assert browser.evaluate(strengths) == [0.12, 1] + [0.12] * 10
    assert browser.complaints == []


@pytest.mark.needs("chromium")
@pytest.mark.parametrize("made", [run_folders.benched, run_folders.compared])
def test_pointing_at_an_outcome_tells_its_numbers(
    browser: Browser, tmp_path: Path, made: Any
) -> None:
    file = tmp_path / "page.html"
    file.write_text(report([made(tmp_path / "run")]), "utf-8")
    browser.open(file)
    hover = "Plotly.Fx.hover(document.querySelector('.plot'), [{curveNumber: 0, pointNumber: 0}])"
    browser.evaluate(hover)
    told = browser.evaluate("document.querySelector('.hoverlayer').textContent")
    assert ("1.75×" if made is run_folders.benched else "[-0.750, -0.250]") in told
    assert browser.complaints == []
    assert browser.requests == [file.as_uri()]
