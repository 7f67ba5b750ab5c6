"""The commands in the head of each example spec run, with models of no size and few rows."""

from __future__ import annotations

import re

import pytest

from tests.fixtures.pages import PAGES, ROOT
from tests.fixtures.reader import Reader

SPECS = [
    pytest.param(
        str(path.relative_to(ROOT)),
        marks=[pytest.mark.needs("public data")] if "$KDCORE_DATA" in path.read_text() else [],
    )
    for path in sorted((ROOT / "examples").rglob("*.yaml"))
    # which have tests of their own
    if not {"plugins", "recipes"} & {*path.parts}
]

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


def commands(spec: str) -> list[str]:
    return re.findall(r"^#   (kdcore .*?)(?: {2,}.*)?$", (ROOT / spec).read_text(), re.MULTILINE)


@pytest.mark.parametrize("spec", SPECS)
def test_the_commands_in_the_head_of_an_example_run(spec: str, reader: Reader) -> None:
    lines = commands(spec)
    assert any(spec in line for line in lines)
    if "job: compare\n" in (ROOT / spec).read_text():
        lines.insert(-1, f"kdcore check {spec}")
    for line in lines:
        said = reader.types(" ".join([line, *(f"--set {each}" for each in FEW.get(line, []))]))
        assert said.code == 0, f"{line}\n{said.err}"


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
    sets = re.findall(r"^#   (--set .*)$", (ROOT / spec).read_text(), re.MULTILINE)
    assert len(sets) == 2
    said = reader.types(" ".join(["kdcore train-drafter", spec, *sets]))
    assert said.code == 0, said.err
