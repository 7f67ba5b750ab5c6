"""What is declared is there: the model of the spec, the code, the spec to begin from."""

from pathlib import Path

from kdcore.method.registry import installed
from kdcore.specs.reading.file import read_spec


def test_the_starter_is_a_spec_of_the_job(tmp_path: Path) -> None:
    """As `kdcore init` writes it."""
    job = installed().job("count-tokens")
    for name, text in job.starter().items():
        (tmp_path / name).write_text(text)
    assert isinstance(read_spec(tmp_path / "count-tokens.yaml"), job.spec)
