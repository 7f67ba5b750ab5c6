"""Every job that reads a spec says where in the file a mistake of models or data is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import kdcore as library
from kdcore.components import registry
from kdcore.components.registry import Registry
from kdcore.errors import UserError
from tests.cli.conftest import Kdcore
from tests.fixtures.json_lines import write_lines
from tests.tiny.distill_specs import CHATS
from tests.tiny.tiny_chat_models import saved, tiny_model

DISTILL = """\
job: distill
teacher: {model: teacher}
student: {model: teacher, layers: [0]}
data:
  train: {name: chat, path: rows.jsonl}
  heldout: {name: chat, path: rows.jsonl}
training: {steps: 1}
"""
SPECS = {
    "distill": DISTILL,
    "train-drafter": """\
job: train-drafter
target: {model: teacher}
drafter: {name: medusa, depth: 1}
data:
  train: {name: chat, path: rows.jsonl}
""",
    "generate-data": """\
job: generate-data
teacher: {model: teacher}
source: {name: chat, path: rows.jsonl}
""",
    "bench": """\
job: bench
target: {model: teacher}
sets:
  chats: {name: chat, path: rows.jsonl}
methods:
  n: {drafter: {name: ngram}}
""",
    "evaluate": """\
job: evaluate
model: {model: teacher}
heldout: {name: chat, path: rows.jsonl}
""",
    "compare": """\
job: compare
base:
  teacher: {model: teacher}
  student: {model: teacher, layers: [0]}
  data:
    train: {name: chat, path: rows.jsonl}
    heldout: {name: chat, path: rows.jsonl}
arms:
  own:
    data: {train: {name: chat, path: rows.jsonl}}
""",
}


@pytest.fixture
def installed() -> Registry:
    """The real one."""
    return registry.installed()


@pytest.fixture
def written(kdcore: Kdcore, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Writes a spec, with one text in it replaced, beside a model and rows of two shapes."""
    saved(tiny_model(), Path("teacher"))
    capsys.readouterr()  # transformers' progress
    write_lines(Path("rows.jsonl"), CHATS)
    write_lines(Path("thread.jsonl"), [{"thread": [{"who": "a", "says": "b"}]}])

    def write(job: str, old: str = "", new: str = "") -> str:
        assert old in SPECS[job]
        Path("spec.yaml").write_text(SPECS[job].replace(old, new, 1))
        return "spec.yaml"

    return write


MODEL = ("model: teacher", "model: ./none")
ROWS = ("path: rows.jsonl", "path: thread.jsonl")
FILE = ("path: rows.jsonl", "path: none.jsonl")
UNKNOWN = ("path: rows.jsonl", "path: rows.jsonl, prompt: question")
PLACED = [
    (("distill",), *MODEL, "2: teacher"),
    (("distill",), "layers: [0]", "layers: [7]", "3: student"),
    (("distill",), *ROWS, "5: data.train"),
    (("distill",), *FILE, "5: data.train"),
    (("distill",), *UNKNOWN, "5: data.train"),
    (("train-drafter",), *MODEL, "2: target"),
    (("train-drafter",), *ROWS, "5: data.train"),
    (("train-drafter",), "name: medusa, depth: 1", "name: ngram", "3: drafter"),
    (("generate-data",), *MODEL, "2: teacher"),
    (("generate-data",), *ROWS, "3: source"),
    (("bench",), *MODEL, "2: target"),
    (("bench",), *ROWS, "4: sets.chats"),
    (("bench",), "drafter: {name: ngram}", "folder: none", "6: methods.n"),
    (("bench",), "{name: ngram}}", "{name: ngram}, tree: {name: chain}}", "6: methods.n"),
    (("evaluate",), *MODEL, "2: model"),
    (("evaluate",), *ROWS, "3: heldout"),
    (("cache", "build", "--out", "cache"), *MODEL, "2: teacher"),
    (("cache", "build", "--out", "cache"), *ROWS, "5: data.train"),
]


@pytest.mark.parametrize(("words", "old", "new", "place"), PLACED)
def test_a_mistake_has_its_line(
    kdcore: Kdcore,
    written: Callable[..., str],
    words: tuple[str, ...],
    old: str,
    new: str,
    place: str,
) -> None:
    job = "distill" if words[0] == "cache" else words[0]
    spec = written(job, old, new)
    said = kdcore(*words[:2], spec, *words[2:])
    assert said.code == 2, said.err
    (line,) = (line for line in said.err.splitlines() if line.startswith("error: "))
    assert line.startswith(f"error: spec.yaml:{place}"), said.err
    if job != "evaluate" and words[0] != "cache":
        assert f"spec.yaml:{place}" in kdcore("check", spec).err


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("path: rows.jsonl", "path: none.jsonl", "6: base.data.train: arm 'own': "),
        (*MODEL, "3: base.teacher: arm 'own': "),
        ("{train: {name: chat, path: rows.jsonl}}", "{train: {name: chat, path: none.jsonl}}",
         "10: arms.own.data.train: arm 'own': "),
    ],
)  # fmt: skip
def test_check_says_which_line_of_a_comparison_is_wrong(
    kdcore: Kdcore, written: Callable[..., str], old: str, new: str, place: str
) -> None:
    spec = written("compare", old, new)
    if place.startswith("6"):  # else the arm has rows of its own
        text = Path(spec).read_text().replace("data: {train: {name: chat, path: rows.jsonl}}", "{}")
        Path(spec).write_text(text.replace("own:\n    {}", "own: {}"))
    said = kdcore("check", spec)
    assert said.code == 2, said.err
    assert said.err.startswith(f"error: spec.yaml:{place}"), said.err


@pytest.mark.parametrize(
    ("grid", "place"),
    [
        (
            "data.train.path: [none.jsonl, rows.jsonl]",
            "6: base.data.train: arm 'own': with data.train.path=",
        ),
        ("data.train: [{name: chat, path: none.jsonl}]", "14: grid.data.train.0: arm 'own': /"),
        ("student.layers: [[7], [0]]", "14: grid.student.layers.0: arm 'own': layers [7] do"),
    ],
)
def test_check_says_which_value_of_a_grid_is_wrong(
    kdcore: Kdcore, written: Callable[..., str], grid: str, place: str
) -> None:
    spec = written("compare", "    data: {train: {name: chat, path: rows.jsonl}}\n", "    {}\n")
    write_lines(Path("other.jsonl"), CHATS[:2])
    text = Path(spec).read_text() + "validation: {name: chat, path: other.jsonl}\n"
    Path(spec).write_text(f"{text}grid:\n  training.steps: [1]\n  {grid}\n")
    said = kdcore("check", spec)
    assert said.code == 2, said.err
    assert said.err.startswith(f"error: spec.yaml:{place}"), said.err


def test_check_says_that_the_rows_of_validation_are_wrong(
    kdcore: Kdcore, written: Callable[..., str]
) -> None:
    spec = written("compare", "    data: {train: {name: chat, path: rows.jsonl}}\n", "    {}\n")
    text = Path(spec).read_text() + "grid: {training.steps: [1]}\n"
    Path(spec).write_text(text + "validation: {name: chat, path: none.jsonl}\n")
    said = kdcore("check", spec)
    assert said.code == 2 and said.err.startswith("error: spec.yaml:12: validation: "), said.err


def test_a_conversation_that_the_template_rejects_has_its_line(
    kdcore: Kdcore, written: Callable[..., str]
) -> None:
    Path("no.jinja").write_text("{{ raise_exception('not so') }}")
    spec = written("generate-data", "{model: teacher}", "{model: teacher, template: no.jinja}")
    said = kdcore("generate-data", spec)
    assert said.code == 2 and "\nerror: spec.yaml:3: source: rows.jsonl:1" in said.err, said.err


def test_a_run_folders_own_spec_is_read_before_it_is_replaced(
    kdcore: Kdcore, written: Callable[..., str]
) -> None:
    spec = written("generate-data", *MODEL)
    assert kdcore("generate-data", spec, "--set", "run=run").code == 2
    copy = Path("run/spec.yaml")
    copy.write_text("# mine\n" * 3 + copy.read_text())
    line = 1 + copy.read_text().splitlines().index("teacher:")
    again = kdcore("generate-data", str(copy), "--resume")
    assert again.err.startswith(f"error: run/spec.yaml:{line}: teacher: "), again.err
    assert not copy.read_text().startswith("# mine"), "it was replaced"


def test_a_spec_from_a_pipe_is_read_once(kdcore: Kdcore, written: Callable[..., str]) -> None:
    """As of ``kdcore check <(...)``."""
    text = Path(written("distill", *MODEL)).read_text()
    for command in ("check", "distill"):
        reads, writes = os.pipe()
        os.write(writes, text.encode())
        os.close(writes)
        said = kdcore(command, f"/dev/fd/{reads}", "--set", f"run={Path('run').resolve()}")
        os.close(reads)
        assert said.code == 2 and "'./none' is not a folder" in said.err, said.err


def test_a_mistake_in_an_assignment_and_in_python_has_its_place(
    kdcore: Kdcore, written: Callable[..., str]
) -> None:
    spec = written("distill")
    said = kdcore("distill", spec, "--set", "teacher={model: ./none}")
    assert "error: --set teacher={model: ./none}: teacher: " in said.err
    with pytest.raises(UserError, match=r"^the override teacher={model: none}: teacher: "):
        library.run(spec, "teacher={model: none}", "run=other")
    with pytest.raises(UserError, match=r"^spec.yaml:2: teacher: "):
        library.run(written("distill", *MODEL), "run=third")
