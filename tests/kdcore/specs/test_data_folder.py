"""A path may begin with ``$KDCORE_DATA``, and with nothing else of the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcore.errors import UserError
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.specs.reading.file import read_spec
from tests.tiny.toy_components import registry

SPEC = """\
job: distill
teacher: {model: some/teacher}
student: {layers: [0, 1]}
data:
  train: {name: jsonl, path: PATH}
  heldout: {name: jsonl, path: PATH}
"""


def read(folder: Path, path: str) -> DistillSpec:
    (folder / "spec.yaml").write_text(SPEC.replace("PATH", f'"{path}"'))
    spec = read_spec(folder / "spec.yaml", registry=registry())
    assert isinstance(spec, DistillSpec)
    return spec


def path_of(spec: DistillSpec) -> Path:
    path: Path = spec.data.train.params.path  # type: ignore[attr-defined]
    return path


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCORE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["$KDCORE_DATA", "${KDCORE_DATA}"])
def test_the_variable_names_the_folder(data: Path, tmp_path: Path, name: str) -> None:
    assert path_of(read(tmp_path, f"{name}/train/rows.jsonl")) == data / "train" / "rows.jsonl"
    assert path_of(read(tmp_path, name)) == data


def test_a_relative_folder_counts_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "specs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCORE_DATA", "../beside")
    found = path_of(read(tmp_path / "specs", "$KDCORE_DATA/rows.jsonl"))
    assert found == tmp_path.parent / "beside" / "rows.jsonl"


@pytest.mark.parametrize(
    "path",
    ["$HOME/rows", "${HOME}/rows", "$KDCORE_DATABASE/rows", "rows/$KDCORE_DATA", "~/rows"],
)
def test_nothing_else_is_expanded(data: Path, tmp_path: Path, path: str) -> None:
    assert path_of(read(tmp_path, path)) == tmp_path / path


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_each_line_is_named_and_one_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv("KDCORE_DATA", raising=False)
    else:
        monkeypatch.setenv("KDCORE_DATA", value)
    with pytest.raises(UserError) as raised:
        read(tmp_path, "$KDCORE_DATA/rows.jsonl")
    assert raised.value.cause.splitlines() == [
        f"{tmp_path}/spec.yaml:{line}: data.{rows}.path: the environment variable KDCORE_DATA is "
        "not set"
        for line, rows in ((5, "train"), (6, "heldout"))
    ]
    assert raised.value.cure == (
        "export KDCORE_DATA=FOLDER, the folder of the public data sets (examples/README.md says "
        "how to fetch them)"
    )


def test_a_run_keeps_the_path_and_refuses_another_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = read(tmp_path, "$KDCORE_DATA/rows.jsonl")
    run = Run.open(tmp_path / "run", spec, registry())
    with run.closed_after():
        pass
    monkeypatch.delenv("KDCORE_DATA")
    # the run's own spec needs no variable
    again = read_spec(tmp_path / "run" / "spec.yaml", registry=registry())
    assert isinstance(again, DistillSpec) and path_of(again) == data / "rows.jsonl"
    with Run.open(tmp_path / "run", again, registry(), resume=True).closed_after():
        pass
    monkeypatch.setenv("KDCORE_DATA", str(tmp_path / "other"))
    other = read(tmp_path, "$KDCORE_DATA/rows.jsonl")
    with pytest.raises(
        UserError, match=r"different spec; changed: data\.heldout\.path, data\.train\.path"
    ):
        Run.open(tmp_path / "run", other, registry(), resume=True)
