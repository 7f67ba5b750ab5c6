"""The commands in the head of each example spec run, with models of no size and few rows."""

from __future__ import annotations

import re

import pytest

from tests.fixtures.pages import PAGES, ROOT
from tests.fixtures.reader import Reader

SPECS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    # which have tests of their own
    if not {"plugins", "recipes", "studies"} & {*path.parts}
}


def commands_of(text: str) -> list[str]:
    """The commands in the head of a spec, without the remarks beside them."""
    return re.findall(r"^#   (kdcore .*?)(?: {2,}.*)?$", text, re.MULTILINE)


COMMANDS = {spec: commands_of(text) for spec, text in SPECS.items()}


def _run_by(spec: str) -> str:
    """The spec with the longest list of commands that begins with those of this one."""
    own = COMMANDS[spec]
    longer = [other for other, lines in COMMANDS.items() if lines[: len(own)] == own]
    return max(longer, key=lambda other: len(COMMANDS[other]))


FEW = {
    "kdcore train-drafter examples/drafter.yaml": [
        "data.train.sources.0.limit=1",
        "data.train.sources.1.limit=1",
        "data.train.sources.2.limit=1",
        "data.heldout.sources.0.limit=1",
        "data.heldout.sources.1.limit=1",
    ],
    "kdcore bench examples/bench.yaml": [
        "'sets={alpaca: {name: chat, path: $KDCORE_DATA/bench/alpaca.jsonl}}'"
    ],
    **{
        f"kdcore compare examples/{name}.yaml --metric accuracy": [
            "'grid={training.learning_rate: [0.01]}'",
            "trials=1",
            "validation.limit=2",
            # `kdcore check` holds all ten arms to what they would do; two are trained
            "'arms={kd: {}, deepkd: {method: {splitters: [deepkd], momentum: deepkd}}}'",
        ]
        for name in ("digits/deepkd", "intents/deepkd_clinc150", "intents/deepkd_banking77")
    },
    "kdcore compare examples/gates/self_instruct_near.yaml": ["base.data.max_length=640"],
    "kdcore cache build examples/gates/self_instruct_near.yaml": ["base.data.max_length=640"],
    "kdcore check examples/drafter.yaml": ["drafter.vocabulary=64"],
    "kdcore check examples/combined/fasteagle_speckd.yaml": ["drafter.vocabulary=64"],
}
"""What is set where rows are not limited as elsewhere, or where a command asks for too much."""


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, marks=[pytest.mark.needs("public data")] * ("$KDCORE_DATA" in text))
        for spec, text in SPECS.items()
        if _run_by(spec) == spec
    ],
)
def test_the_commands_in_the_head_of_an_example_run(spec: str, reader: Reader) -> None:
    lines = [*COMMANDS[spec]]
    if "job: compare\n" in SPECS[spec]:
        lines.insert(-1, f"kdcore check {spec}")
    for line in lines:
        said = reader.types(" ".join([line, *(f"--set {each}" for each in FEW.get(line, []))]))
        assert said.code == 0, f"{line}\n{said.err}"


def test_the_head_of_each_example_has_a_command_of_its_own() -> None:
    for spec in SPECS:
        assert any(spec in line for line in COMMANDS[spec]), spec
        assert _run_by(_run_by(spec)) == _run_by(spec)


def test_no_example_and_no_page_points_out_of_the_repository() -> None:
    examples = [path for path in (ROOT / "examples").rglob("*") if path.suffix in (".yaml", ".md")]
    assert len(examples) > 15
    for file in {*examples, *PAGES, ROOT / "CONTRIBUTING.md"}:
        for path in re.findall(r"(?:\.\./)+[\w./-]*", file.read_text()):
            target = (file.parent / path).resolve()
            assert target.is_relative_to(ROOT), f"{file}: {path}"
            assert target.exists() or file.suffix == ".yaml", f"{file}: {path}"


def test_a_drafter_is_trained_by_deepkd_as_its_spec_says(reader: Reader) -> None:
    spec = "examples/combined/fasteagle_speckd.yaml"
    sets = re.findall(r"^#   (--set .*)$", SPECS[spec], re.MULTILINE)
    assert len(sets) == 2
    said = reader.types(" ".join(["kdcore train-drafter", spec, *sets]))
    assert said.code == 0, said.err
