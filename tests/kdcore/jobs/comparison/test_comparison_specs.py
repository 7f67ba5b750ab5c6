"""Mistakes in the spec of a comparison, and what its arms change."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
from pydantic import ValidationError

from kdcore.errors import Mistakes, UserError
from kdcore.jobs.comparison.cell_fields import VALIDATION, in_comparison
from kdcore.jobs.comparison.cells import cells_by_arm
from kdcore.specs.compare import CompareSpec
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.changes import changed, nested
from kdcore.specs.reading.file import read_spec
from tests.kdcore.jobs.comparison.comparisons import asked, compare_spec

RATES = {"grid": {"training.learning_rate": [1e-3, 1e-2]}}
OTHER = {"name": "chat", "path": "other.jsonl"}
FAST = {"learning_rate": 1.0}


def test_a_mistake_in_an_arm_is_told_by_its_line(tmp_path: Path, base: dict[str, Any]) -> None:
    text = (
        "job: compare\nbase:\n"
        + "".join(f"  {name}: {json.dumps(value)}\n" for name, value in base.items())
        + "arms:\n  kd: {}\n  odd:\n    method:\n      gates:\n        - {name: speckd, q: 3}\n"
    )
    (tmp_path / "compare.yaml").write_text(text)
    line = text.splitlines().index("        - {name: speckd, q: 3}") + 1
    with pytest.raises(UserError, match=rf"compare\.yaml:{line}: arms\.odd\.method\.gates\.0\.q"):
        read_spec(tmp_path / "compare.yaml")


def test_mistakes_in_a_base_and_in_a_grid_are_told_by_their_lines(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    """All of them, whichever job the base is of."""
    drafting = {
        "job": "train-drafter",
        "targt": base["teacher"],
        "data": base["data"],
        "drafter": "medusa",
        "training": {"steps": -1},
    }
    with pytest.raises(UserError) as found:
        read_spec(asked(tmp_path, drafting, arms={"kd": {}}))
    for said in (
        "base.targt: unknown key",
        "base.target: missing field",
        "base.training.steps: must",
    ):
        assert said in found.value.cause
    assert "did you mean 'target'" in found.value.cure
    text = f"job: compare\nbase: {json.dumps(base)}\narms: {{kd: {{}}}}\n"
    text += "validation: {name: chat, path: other.jsonl}\n"
    text += "grid:\n  training.learning_rate:\n    - 0.1\n    - -1\n"
    (tmp_path / "compare.yaml").write_text(text)
    said = r"yaml:8: grid\.training\.learning_rate\.1: must be greater"
    with pytest.raises(UserError, match=said):
        read_spec(tmp_path / "compare.yaml")


def test_paths_in_arms_and_grids_are_relative_to_the_spec(
    tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those in an item of a list and behind ``$KDCORE_DATA``, and whatever folder runs it."""
    monkeypatch.setenv("KDCORE_DATA", str(tmp_path / "public"))
    both = {"name": "several", "sources": [OTHER, OTHER]}
    file = asked(
        tmp_path,
        base | {"data": base["data"] | {"train": both}},
        arms={
            "one": {"data": {"train": {"sources": {"0": {**OTHER, "path": "one.jsonl"}}}}},
            "public": {"data": {"train": {**OTHER, "path": "$KDCORE_DATA/two.jsonl"}}},
        },
    )
    spec = compare_spec(file)
    monkeypatch.chdir("/")
    one, public = (changed(spec.base, arm) for arm in spec.arms.values())
    assert [each["path"] for each in one.data.train.dump()["sources"]] == [
        str(tmp_path / "one.jsonl"),
        str(tmp_path / "other.jsonl"),
    ]
    assert public.data.train.dump()["path"] == str(tmp_path / "public/two.jsonl")
    monkeypatch.chdir(tmp_path)
    grid = {"data.train.path": ["three.jsonl", "four.jsonl"], "training.learning_rate": [0.1]}
    read = compare_spec(asked(tmp_path, base, arms={"kd": {}}, grid=grid, validation=OTHER))
    there = [str(tmp_path / name) for name in ("three.jsonl", "four.jsonl")]
    assert read.grid == {**grid, "data.train.path": there}


def test_paths_in_a_grid_are_resolved_beside_the_values_that_they_need(
    tmp_path: Path, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a source, say, that another field of the grid names, whichever stands first."""
    both = {"name": "several", "sources": [OTHER]}
    whole = base | {"data": base["data"] | {"train": both}}
    fields = {"data.train.name": ["chat"], "data.train.path": ["rows.jsonl", "other.jsonl"]}
    for grid in (fields, dict(reversed(fields.items()))):
        file = asked(tmp_path, whole, arms={"kd": {}}, grid=grid, validation=OTHER)
        monkeypatch.chdir("/")
        spec = compare_spec(file)
        made = [spec.at_point("kd", point).data.train.dump() for point in (0, 1)]
        there = [str(tmp_path / name) for name in fields["data.train.path"]]
        assert [each["path"] for each in made] == there
        assert spec.grid == {**grid, "data.train.path": there}


def test_changes_replace_components_whole(base: dict[str, Any]) -> None:

    begun = DistillSpec.model_validate(
        base | {"method": {"divergence": {"name": "skew_kl", "alpha": 0.2}, "tau": 2.0}}
    )
    spec = changed(begun, {"method": {"divergence": {"name": "jsd"}}})
    assert spec.method.divergence.name == "jsd" and spec.method.tau == 2.0


def test_a_grid_reaches_into_lists(tmp_path: Path, base: dict[str, Any]) -> None:
    gated = base | {"method": {"gates": ["entropy", {"name": "speckd", "k": 3, "beta": 0.5}]}}
    other = {"method": {"gates": ["confidence", "speckd"]}}
    arms = {"kd": {}, "other": other, "item": {"method": {"gates": {"0": "confidence"}}}}
    grid = {"method.gates.1.k": [1, 5], "training.learning_rate": [1e-3]}
    file = asked(tmp_path, gated, arms=arms, grid=grid, validation=OTHER)
    spec = compare_spec(file)
    made = {
        arm: [
            changed(changed(spec.base, changes), nested(point)).method.gates
            for point in spec.points_of(arm)
        ]
        for arm, changes in spec.arms.items()
    }
    for arm, first in (("kd", "entropy"), ("other", "confidence"), ("item", "confidence")):
        assert [[gate.name for gate in gates] for gates in made[arm]] == [[first, "speckd"]] * 2
        assert [gates[1].params.k for gates in made[arm]] == [1, 5]
    assert [gates[1].params.beta for gates in made["kd"]] == [0.5, 0.5]  # the rest stays
    for path, said in {
        "method.gates.2.k": "a list of 2 has no item '2'",
        "method.gates.x.k": "a list of 2 has no item 'x'",
        "method.gates.-1.k": "a list of 2 has no item '-1'",
        "method.gates.01.k": "a list of 2 has no item '01'",
        "method.gates.1.k": "must be greater",
        "method.gates.1.z": "unknown key",
    }.items():
        wrong = asked(tmp_path, gated, arms={"kd": {}}, grid={path: [-1]}, validation=OTHER)
        with pytest.raises(UserError, match=said):
            read_spec(wrong)


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        (["all", {"name": "speckd", "k": 3}], "arm 'b' sets method.gates.1.k, which the grid sets"),
        ({1: {"k": 3}}, "arm 'b' sets method.gates.1.k, which the grid sets"),
        (["all", {"name": "speckd", "beta": 3}], "beta"),
    ],
)
def test_an_arm_that_a_grid_does_not_suit_is_named(
    tmp_path: Path, base: dict[str, Any], gates: Any, said: str
) -> None:
    gated = base | {"method": {"gates": ["entropy", "speckd"]}}
    arms = {"a": {}, "b": {"method": {"gates": gates}}}
    file = asked(tmp_path, gated, arms=arms, grid={"method.gates.1.k": [1, 5]}, validation=OTHER)
    with pytest.raises(UserError, match=said):
        read_spec(file)


def test_a_grid_leaves_out_the_arms_that_lack_its_field(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    """Each takes the combinations of the fields that it has, each combination once."""
    gated = base | {"method": {"gates": ["entropy", "speckd"]}}
    none: dict[str, Any] = {"method": {"gates": []}}
    other = {"method": {"gates": ["all", "entropy"]}}
    arms = {"none": none, "gated": {}, "other": other}
    k = {"method.gates.1.k": [1, 5]}
    rates = {"training.learning_rate": [1e-3, 1e-2, 1e-1]}
    spec = compare_spec(asked(tmp_path, gated, arms=arms, grid=k | rates, validation=OTHER))
    assert spec.points_of("none") == spec.points_of("other")
    assert spec.points_of("none") == [{"training.learning_rate": r} for r in (1e-3, 1e-2, 1e-1)]
    assert len(spec.points_of("gated")) == 6
    spec = compare_spec(asked(tmp_path, gated, arms=arms, grid=k, validation=OTHER, trials=2))
    assert spec.points_of("none") == [{}] and spec.points_of("gated") == [
        {"method.gates.1.k": 1},
        {"method.gates.1.k": 5},
    ]
    assert cells_by_arm(spec) == {"none": 3, "gated": 4 + 3, "other": 3}
    for wrong, field, said in (
        (arms, "method.gates.1.kk", "grid.method.gates.1.kk: unknown key"),
        ({"none": none}, "method.gates.1.k", "a list of 0 has no item '1'"),
    ):
        file = asked(tmp_path, gated, arms=wrong, grid={field: [1]}, validation=OTHER)
        with pytest.raises(UserError, match=said):
            read_spec(file)


def test_a_parameter_of_a_component_that_the_grid_names(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    """Whichever stands first in the grid; and beside a component without it, it is refused."""
    fields = {"method.divergence.alpha": [0.1, 0.2], "method.divergence.name": ["skew_kl"]}
    for order in (fields, dict(reversed(fields.items()))):
        file = asked(tmp_path, base, arms={"kd": {}}, grid=order, validation=OTHER)
        spec = compare_spec(file)
        assert len(spec.points_of("kd")) == 2
        assert [*spec.grids["kd"]] == [*order], "in the grid's order"
        for names in (["skew_kl", "forward_kl"], ["forward_kl", "skew_kl"]):
            grid = order | {"method.divergence.name": names}
            file = asked(tmp_path, base, arms={"kd": {}}, grid=grid, validation=OTHER)
            said = "alpha.0: with method.divergence.name=.forward_kl.: unknown key"
            with pytest.raises(UserError, match=said):
                read_spec(file)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"arms": {}}, "arms is empty"),
        ({"baseline": "kv"}, "use one of: kd"),
        ({"seeds": [1, 1]}, "same seed twice"),
        ({"arms": {"../x": {}}}, "invalid name"),
        ({"arms": {"kd": {"seed": 3}}}, "seed cannot be set here"),
        (
            {"arms": {"kd": {"data": {"heldout": {"name": "chat"}}}}},
            "only on the same held-out rows",
        ),
        ({"grid": {"run": ["a", "b"]}}, "run cannot be set here"),
        ({"grid": {"training.learning_rate": []}}, "at least 1"),
        (
            {"grid": {"training.lr": [1], "training.lr.start": [1]}},
            "which is part of it, have values",
        ),
        (RATES, "set validation"),
        (RATES | {"validation": OTHER, "arms": {"kd": {"training": FAST}}}, "remove one of them"),
        ({"choose_by": "accuracy"}, "set grid"),
        ({"trials": 2}, "set grid"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    base: dict[str, Any], fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        CompareSpec.model_validate({"job": "compare", "base": base, "arms": {"kd": {}}} | fields)


@pytest.mark.parametrize(
    ("field", "value", "refused"),
    [
        ("data.responses.max_new_tokens", 7, True),
        ("data.responses.temperature", 1.0, True),
        ("data.responses.by", "dataset", True),
        ("teacher.revision", "other", True),
        ("data.responses.batch_size", 7, False),
        ("data.responses.folder", "own", False),
        ("teacher.dtype", "bfloat16", False),
    ],
)
@pytest.mark.parametrize("place", ["arms.b", "grid"])
def test_arms_have_the_same_responses_to_held_out_prompts(
    tmp_path: Path, base: dict[str, Any], field: str, value: Any, refused: bool, place: str
) -> None:
    """What decides them is refused with its line, also where the points of a grid set it."""
    base = base | {"data": base["data"] | {"responses": {"by": "teacher"}}}
    head = f"job: compare\nbase: {json.dumps(base)}\narms:\n  a: {{}}\n"
    last = f"  b: {json.dumps(nested({field: value}))}\n"
    if place == "grid":
        head += f"validation: {json.dumps(OTHER)}\ngrid:\n  method.tau: [1]\n"
        last = f"  {field}: [{json.dumps(value)}]\n"
    file = tmp_path / "compare.yaml"
    file.write_text(head + last)
    if not refused:
        assert cells_by_arm(compare_spec(file)).keys() == {"a"} | {"b"} & {place[-1]}
        return
    with pytest.raises(UserError) as found:
        read_spec(file)
    line = head.count("\n") + 1
    field += ".0" if place == "grid" else ""
    assert found.value.cause.startswith(f"{file}:{line}: {place}.{field}: this also decides")
    whose = "base" if place == "arms.b" else "arm 'a'"
    assert (
        f"({json.dumps(value)}, but " in found.value.cause and f" in {whose})" in found.value.cause
    )
    assert "kdcore generate-data" in found.value.cure


def test_teachers_are_compared_on_rows_that_have_responses(
    tmp_path: Path, base: dict[str, Any]
) -> None:
    """As the message says where each would answer itself."""
    teachers = {"a": {"teacher": {"model": "./a"}}, "b": {"teacher": {"model": "./b"}}}
    answering = base | {"data": base["data"] | {"responses": {"by": "teacher"}}}
    with pytest.raises(UserError, match=r"\(\"./a\", but \".*teacher\" in base\)") as found:
        read_spec(asked(tmp_path, answering, arms=teachers))
    assert "set base.data.responses.by: dataset, name rows" in found.value.cure
    assert compare_spec(asked(tmp_path, base, arms=teachers))
    own = {"a": {"data": {"responses": {"by": "teacher"}}}}
    with pytest.raises(UserError, match=r"\(\"teacher\", but \"dataset\" in base\)") as found:
        read_spec(asked(tmp_path, base, arms=own))
    assert "set base.data.responses.by" not in found.value.cure


ARMS = """\
arms:
  kd: {}
  packed: {training: {packing: true}}
  kept: {training: {keep_best: perplexity}}
validation: {name: chat, path: other.jsonl}
grid:
"""


@pytest.mark.parametrize(
    ("grid", "line", "said"),
    [
        ("training.batch_size:\n  - 4\n  - many", 3, "training.batch_size.1: must be an integer"),
        ("training.betas:\n  - [0.1, 0.2]\n  - [0.1, 2]", 3, "training.betas.1.1: must be less"),
        (
            "method.divergence:\n  - forward_kl\n  - {name: skew_kl, alpa: 1}",
            3,
            "method.divergence.1.alpa: unknown key",
        ),
        (
            "training.group_by_length:\n  - false\n  - true",
            3,
            "training.group_by_length.1: arm 'packed': packing leaves nothing for",
        ),
        (
            "training.eval_every:\n  - 2\n  - null",
            3,
            "training.eval_every.1: arm 'kept': training.keep_best reads the evaluations",
        ),
        (
            "training.schedule:\n  - multi_step\n  - cosine\ntraining.milestones: [[0.5], []]",
            2,
            "training.schedule.0: with training.milestones=[]: schedule=multi_step and milestones",
        ),
        ("method.gates.3.k:\n  - 1", 1, "method.gates.3.k: a list of 1 has no item '3'"),
        ("method.gatez:\n  - 1", 1, "method.gatez: unknown key"),
        (
            "method.gates:\n  - [{name: speckd, kk: 1}]\n  - [{name: speckd, kj: 2}]",
            2,
            "method.gates.0.0.kk: unknown key",
        ),
        ("data.heldout.path:\n  - a", 2, "data.heldout.path.0: data.heldout cannot be set here"),
        ("data:\n  - {heldout: {path: a}}", 2, "data.0: data.heldout cannot be set here"),
        (
            "method.tau: [1]\ntraining.packing: [true]",
            2,
            "training.packing: arm 'packed' sets training.packing, which the grid sets too",
        ),
    ],
)
def test_a_mistake_in_a_grid_has_the_line_of_its_value(
    tmp_path: Path, base: dict[str, Any], grid: str, line: int, said: str
) -> None:
    """Also where no value is the field that is wrong; and with what else makes it wrong."""
    training = base["training"] | {"eval_every": 2}
    whole = base | {"method": {"gates": ["speckd"]}, "training": training}
    head = f"job: compare\nbase: {json.dumps(whole)}\n{ARMS}"
    file = tmp_path / "compare.yaml"
    file.write_text(head + indent(grid, "  "))
    with pytest.raises(UserError) as found:
        read_spec(file)
    place = head.count("\n") + line
    assert found.value.cause.startswith(f"{file}:{place}: grid.{said}"), found.value.cause


@pytest.mark.parametrize(
    ("grid", "cure"),
    [
        ({"method.tua": [1]}, "did you mean 'tau'?"),
        ({"method": [{"tua": 1}]}, "did you mean 'tau'?"),
        ({"method.gates": [[{"name": "speckd", "kk": 1}]]}, "did you mean 'k'?"),
        ({"method.packing": [True]}, "'packing' belongs at grid.training.packing"),
        (
            {"method.divergence.name": ["skew_kl", "jsd"], "method.divergence.alpha": [0.1]},
            "'alpha' belongs at grid.student.lora.alpha",
        ),
        ({"training.batch_size": [1.5]}, "change it; batch_size: "),
    ],
)
def test_a_mistake_in_a_grid_has_the_cure_of_its_field(
    tmp_path: Path, base: dict[str, Any], grid: dict[str, Any], cure: str
) -> None:
    """By the name of the field in the spec of a cell, and not by the path or index in the grid."""
    with pytest.raises(UserError) as found:
        read_spec(asked(tmp_path, base, arms={"kd": {}}, grid=grid, validation=OTHER))
    assert found.value.cure.startswith(cure)


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ("arms:\n  kd:\n    method: {tau: 1}\n    seed: 1", "4: arms.kd.seed: seed cannot be"),
        (
            "arms:\n  kd:\n    method:\n      tau: 1\n      gates:\n        0: all",
            "6: arms.kd.method.gates.0: a list of 0 has no item",
        ),
        (
            "grid:\n  method:\n    tau: [1]\narms: {kd: {}}",
            "2: grid.method: must be a list of values, not a mapping",
        ),
        ("arms: {kd: {}}\nbaseline: kv", "2: baseline 'kv' does not name an arm"),
        ("arms: {kd: {}}\nseeds:\n  - 1\n  - 1", "4: seeds.1: seeds contains"),
        ("arms: {kd: {}}\ntrials: 2", "2: trials has no effect"),
        ("arms: {kd: {}}\ntrials: 2\ngrid: {method.tau: [1]}", "3: grid: a grid needs rows"),
        ("seeds: [1]\narms: {}", "2: arms is empty"),
    ],
)
def test_a_mistake_in_a_comparison_has_its_line(
    tmp_path: Path, base: dict[str, Any], fields: str, place: str
) -> None:
    file = tmp_path / "compare.yaml"
    file.write_text(f"{fields}\njob: compare\nbase: {json.dumps(base)}\n")
    with pytest.raises(UserError) as found:
        read_spec(file)
    assert found.value.cause.startswith(f"{file}:{place}"), found.value.cause


def test_a_grid_of_too_many_points_is_refused_before_any_is_made(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcore.specs.grid.points", lambda grid: pytest.fail("made"))
    values = list(range(100))
    grid = {f"training.{field}": values for field in ("steps", "warmup", "eval_every", "clip")}
    with pytest.raises(ValidationError, match="the grid has 100,000,000 combinations"):
        CompareSpec.model_validate(
            {"job": "compare", "base": base, "arms": {"a": {}}} | {"grid": grid}
        )


def test_a_field_of_a_cell_is_that_of_the_comparison(base: dict[str, Any]) -> None:
    """Also inside of what is set whole; and a cause does not repeat the cell's field."""
    arm: dict[str, Any] = {"student": {"layers": [1]}, "data": {"train": {"name": "digits"}}}
    grid = {"grid": {"method.tau": [1, 2]}, "validation": OTHER}
    spec = CompareSpec.model_validate({"job": "compare", "base": base, "arms": {"a": arm}} | grid)
    of_cells = {
        "method.tau": "grid.method.tau.1",
        "data.heldout.path": "validation.path",
        "data.heldout": "validation",
        "data.train.path": "arms.a.data.train.path",
        "student.layers": "arms.a.student.layers",
        "student.model": "base.student.model",
        "data.validation": "base.data.validation",
        "data": "arms.a.data",  # and not validation, which is but a part of it
        "training": "base.training",
        "": "",
    }
    for field, place in of_cells.items():
        mistake = UserError(f"{field}: torn" if field else "torn", "cure", field)
        found = in_comparison(mistake, spec, "a", 1, VALIDATION, "arm 'a'")
        assert (found.cause, found.field) == ("arm 'a': torn", place)


def test_a_mistake_around_a_value_of_the_grid_is_not_of_the_value(base: dict[str, Any]) -> None:
    """Whatever its words quote; it says what the grid sets inside. All mistakes are kept."""
    grid = {"teacher.model": ["./a", "./b"], "data.max_length": [1, 64]}
    fields = {"arms": {"a": {}}, "grid": grid, "validation": OTHER}
    spec = CompareSpec.model_validate({"job": "compare", "base": base} | fields)
    of_cell = [
        UserError("rows.jsonl:1 has no prompt", "add one", "data"),
        UserError("'./b' is not a folder", "name one", "teacher"),
        UserError("raise 1", "to 2", "data.max_length"),
        UserError("no code", "review it", "teacher.model.code"),
    ]
    told = in_comparison(Mistakes(of_cell, 5), spec, "a", 2, called="arm 'a'")
    assert isinstance(told, Mistakes) and told.further == 5
    assert [(each.field, each.cause) for each in told.found] == [
        ("base.data", "arm 'a': with data.max_length=1: rows.jsonl:1 has no prompt"),
        ("base.teacher", "arm 'a': with teacher.model=\"./b\": './b' is not a folder"),
        ("grid.data.max_length.0", "arm 'a': raise 1"),
        ("grid.teacher.model.1.code", "arm 'a': no code"),
    ]


def test_an_assignment_reaches_a_value_of_a_grid(tmp_path: Path, base: dict[str, Any]) -> None:
    """By the field that messages name."""
    grid = {"grid": {"method.tau": [1, 2]}, "validation": OTHER}
    file = asked(tmp_path, base, arms={"a": {}}, **grid)
    read: Any = read_spec(file, ["grid.method.tau.1=4"])
    assert read.grid == {"method.tau": [1, 4]}
    with pytest.raises(UserError, match=r"^--set grid.method.tau.1=x: grid.method.tau.1: must be"):
        read_spec(file, ["grid.method.tau.1=x"])
