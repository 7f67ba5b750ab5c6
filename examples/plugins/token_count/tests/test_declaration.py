"""Tests of the job's declaration: the spec model, the code and the starter spec."""

from pathlib import Path

from kdcore.components.registry import installed
from kdcore.specs.reading.file import read_spec


def test_the_starter_is_a_spec_of_the_job(tmp_path: Path) -> None:
    """The spec that `kdcore init` writes is valid."""
    job = installed().job("count-tokens")
    for name, text in job.starter().items():
        (tmp_path / name).write_text(text)
    assert isinstance(read_spec(tmp_path / "count-tokens.yaml"), job.spec)
