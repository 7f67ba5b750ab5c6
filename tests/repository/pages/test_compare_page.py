"""The Python of docs/howto/compare.md runs, on a comparison and on runs of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kdcore
from kdcore.specs.reading import plain_yaml
from tests.fixtures.json_lines import write_lines
from tests.fixtures.pages import BLOCKS
from tests.tiny.distill_specs import CHATS
from tests.tiny.tiny_chat_models import saved, tiny_model


def test_the_page_measures_a_pilot_and_writes_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(Path("rows.jsonl"), CHATS)
    source = {"name": "chat", "path": "rows.jsonl"}
    base: dict[str, Any] = {
        "job": "distill",
        "teacher": {"model": str(saved(tiny_model(), tmp_path / "teacher"))},
        "student": {"layers": [0, 2]},
        "data": {"train": source, "heldout": source | {"limit": 4}},
        "training": {"batch_size": 4, "learning_rate": 1e-2, "steps": 1},
        "evaluation": {"samples": 0},
    }
    methods: dict[str, Any] = {"kd": {}, "speckd": {"method": {"gates": ["speckd"]}}}
    for arm, method in methods.items():
        kdcore.run(base | method, f"run=runs/{arm}")
        for seed in (0, 1):
            kdcore.run(base | method, f"run=runs/pilot/cells/{arm}/seed-{seed}", f"seed={seed}")
    study = {"job": "compare", "run": "runs/compare", "seeds": [0], "base": base, "arms": methods}
    Path("compare.yaml").write_text(plain_yaml.dump(study))

    blocks = [b for b in BLOCKS if b.page.name == "compare.md" and b.language == "python"]
    power, pilot, tables = blocks
    exec(power.text, {})  # noqa: S102
    told = [line.split(" # ")[1] for line in power.text.splitlines() if line.startswith("print")]
    for said, line in zip(told, capsys.readouterr().out.splitlines(), strict=True):
        assert f"{float(line):.3f}" == said.strip().split(":")[0]
    exec(pilot.text, {})  # noqa: S102
    assert capsys.readouterr().out.startswith("Spread(rows=")
    exec(tables.text, {})  # noqa: S102
    assert capsys.readouterr().out.count(r"\begin{tabular}") == 2
