"""Arms, controls, failures and resume of a comparison; each cell in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from kdcore.errors import UserError
from kdcore.spec_file import read_spec
from kdcore.specs import CompareSpec, changed
from tests.tiny_chat_models import saved, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("base")
    rows = [{"prompt": f"the mat of {n}?", "response": f"the teacher sat {n}"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "chat", "path": str(folder / "rows.jsonl")}
    return {
        "teacher": {"model": str(saved(tiny_model(), folder / "teacher"))},
        "student": {"layers": [0, 2]},
        "data": {"train": source, "heldout": source},
        "training": {"batch_size": 4, "learning_rate": 1e-2},
        "evaluation": {"samples": 0, "answers": ["rouge_l"], "answer_tokens": 4},
    }


def asked(folder: Path, base: dict[str, Any], **fields: Any) -> Path:
    spec = {"job": "compare", "run": str(folder / "run"), "base": base} | fields
    (folder / "compare.yaml").write_text(json.dumps(spec))  # JSON is YAML
    return folder / "compare.yaml"


def kdcore(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("kdcore"), *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_arms_controls_and_a_cell_that_fails(tmp_path: Path, base: dict[str, Any]) -> None:
    arms = {
        "kd": {},
        "speckd": {"method": {"gates": ["speckd"]}},
        "broken": {"student": {"layers": [0, 99]}},
    }
    file = asked(tmp_path, base, arms=arms, seeds=[3], controls=True, draws=50)
    checked = kdcore("check", file)
    assert checked.returncode == 2 and "arm 'broken'" in checked.stderr
    done = kdcore("compare", file, "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    rows = {row["arm"]: row for row in outcome["arms"]}
    gated = {"speckd", "speckd+random", "speckd+uniform", "speckd+inverted"}
    assert rows.keys() == {"kd", "broken", *gated}
    assert "99" in outcome["failures"]["broken, seed 3"] and "figures" not in rows["broken"]
    for arm in rows.keys() - {"broken"}:
        assert rows[arm]["cost"]["tokens"] == rows["kd"]["cost"]["tokens"], "the same budget"
        for figure in ("teacher_kl", "rouge_l"):
            gap = rows[arm]["differences"][figure]
            assert gap["low"] <= gap["mean"] <= gap["high"]
    assert rows["kd"]["differences"]["teacher_kl"]["mean"] == 0.0
    spec_of_control = (tmp_path / "run/cells/speckd+random/seed-3/spec.yaml").read_text()
    lines = (tmp_path / "run/cells/speckd/seed-3/metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line).get("acceptance/speckd") for line in lines]
    rates = [rate for rate in rates if rate is not None]
    assert f"rate: {sum(rates) / len(rates)}"[:10] in spec_of_control
    assert "minus kd" in (tmp_path / "run" / "comparison.html").read_text()

    before = (tmp_path / "run/cells/kd/seed-3/run.json").read_text()
    assert kdcore("compare", file).returncode == 2
    again = kdcore("compare", file, "--resume", "--metric", "rouge_l")
    assert again.returncode == 0, again.stderr
    assert "ROUGE-L" in again.stdout and "failed: broken, seed 3" in again.stdout
    assert (tmp_path / "run/cells/kd/seed-3/run.json").read_text() == before, "not run again"


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


def test_changes_replace_components_whole(base: dict[str, Any]) -> None:
    from kdcore.specs import DistillSpec

    begun = DistillSpec.model_validate(
        base | {"method": {"divergence": {"name": "skew_kl", "alpha": 0.2}, "tau": 2.0}}
    )
    spec = changed(begun, {"method": {"divergence": {"name": "jsd"}}})
    assert spec.method.divergence.name == "jsd" and spec.method.tau == 2.0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"arms": {}}, "at least one arm"),
        ({"baseline": "kv"}, "known: kd"),
        ({"seeds": [1, 1]}, "stands twice"),
        ({"arms": {"../x": {}}}, "pattern"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    base: dict[str, Any], fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        CompareSpec.model_validate({"job": "compare", "base": base, "arms": {"kd": {}}} | fields)
