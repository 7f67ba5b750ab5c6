"""The studies are ready: each resolves as `kdcore check` does, without a training of its arms."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml

from tests.fixtures.pages import ROOT
from tests.fixtures.reader import Reader
from tests.repository.examples.test_examples import commands_of

STUDIES = ROOT / "examples/studies"
FEW_TOKENS = [f"arms.{arm}.drafter.vocabulary=64" for arm in ("eagle3", "medusa", "p_eagle")]
SETS = {
    "drafters.yaml": [
        "base.drafter.vocabulary=64",
        *FEW_TOKENS,
        "arms.dflash.drafter.vocabulary=64",
    ]
}
"""What is set where the tiny model has fewer tokens."""


@pytest.fixture
def own_tokenizer(reader: Reader) -> None:
    """That of the student of `cross_tokenizer.yaml`, from a script in the head of the spec."""
    head = (STUDIES / "cross_tokenizer.yaml").read_text()
    (line,) = re.findall(r"^#   python (.*)$", head, re.MULTILINE)
    subprocess.run([sys.executable, *line.split()], check=True)


@pytest.mark.needs("public data")
@pytest.mark.usefixtures("own_tokenizer")
@pytest.mark.parametrize(
    "names",
    [
        ["speckd_off_policy.yaml", "speckd_on_policy.yaml"],
        ["cross_tokenizer_student.yaml", "cross_tokenizer.yaml"],
        [*SETS],
    ],
    ids=["speckd", "cross_tokenizer", "drafters"],
)
def test_studies_resolve(names: list[str], reader: Reader) -> None:
    """Those with the same student in one test: it is trained once, as their pages say."""
    lines: list[str] = []
    for name in names:
        spec = f"examples/studies/{name}"
        commands = commands_of((ROOT / spec).read_text())
        assert commands[-1].partition(" --")[0].endswith(".yaml")
        lines += [line for line in commands if not line.startswith(("kdcore compare", "kdcore b"))]
        lines += [f"kdcore check {spec} " + " ".join(f"--set {e}" for e in SETS.get(name, []))]
    for line in dict.fromkeys(lines):
        said = reader.types(line)
        assert said.code == 0, f"{line}\n{said.err}"


def test_the_speeds_are_those_of_the_drafters_that_were_trained() -> None:
    trained = yaml.safe_load((STUDIES / "drafters.yaml").read_text())
    measured = yaml.safe_load((STUDIES / "drafters_speed.yaml").read_text())
    folders = {name: each.get("folder") for name, each in measured["methods"].items()}
    cells = f"../../{trained['run']}/cells"
    of = {arm: f"{cells}/{arm}/seed-0/drafter" for arm in trained["arms"]}
    assert {name: folder for name, folder in folders.items() if folder} == of
    assert folders.keys() - of.keys() == {"self_speculative", "suffix", "ngram"}


def test_the_page_names_each_study() -> None:
    page = (STUDIES / "README.md").read_text()
    for spec in STUDIES.glob("*.yaml"):
        assert f"`{spec.name}`" in page
        head = spec.read_text().partition("\njob:")[0]
        assert re.search(r"^#   kdcore ", head, re.MULTILINE), spec.name
