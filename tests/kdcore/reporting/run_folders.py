"""Run folders as kdcore writes them, whose text would be markup if nobody escaped it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = "<b>x</b></script><script>document.title='taken'</script><img src=x onerror=throw(1)>"


def write(folder: Path, job: str, *, status: str = "done", **files: Any) -> Path:
    """A folder with these files; underscores in their names stand for the dot."""
    folder.mkdir(parents=True)
    facts = {"status": status, "versions": {"kdcore": "1.2.3", HOSTILE: HOSTILE}}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "spec.yaml").write_text(f"job: {job}\nnote: {json.dumps(HOSTILE)}\n")
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        lines = content if ending == "jsonl" else [content]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{stem}.{ending}").write_text(text)
    return folder


METRICS = [
    {"name": "teacher_kl", "title": "teacher KL", "format": ".3f", "better": "lower"},
    {"name": "agreement", "title": "top-1 agreement", "format": ".1%", "better": "higher"},
]
CHOICES = [(" mat", 0.625), (HOSTILE, 0.25), ("\n", 0.125)]
TOKENS = [
    {
        "text": text,
        "accepted": accepted,
        "weight": weight,
        "weights": {"speckd": weight, HOSTILE: 1.0},
        "student": CHOICES,
        "teacher": CHOICES[::-1],
    }
    for text, accepted, weight in ((" the", 1.0, 1.0), (HOSTILE, 0.5, 0.55), (" sat", 0.0, 0.1))
]


def distilled(folder: Path, *, shift: float = 0.0) -> Path:
    """A finished distill run of 4 steps."""
    steps = [
        {
            "step": step,
            "loss": 2.0 / step + shift,
            "term/kd": 2.0 / step,
            "acceptance/speckd": 0.25 * step,
            "gsnr/kd": 0.5,
            "momentum_norm/tcg": 1.0,
            f"term/{HOSTILE}": 1.0,
            "seconds": 2.0,
            "tokens": 100.0,
        }
        for step in range(1, 5)
    ]
    steps.insert(2, {"step": 2, "eval_teacher_kl": 1.5, "eval_agreement": 0.5})
    rows = {
        side: {"lengths": [10, 10], "sums": {"teacher_kl": [10 * kl, 10 * kl + 1]}, "scores": {}}
        for side, kl in (("before", 2.0), ("after", 1.0))
    }
    return write(
        folder,
        "distill",
        metrics_jsonl=steps,
        results_json={
            "before": {"teacher_kl": 2.05, "agreement": 0.25},
            "after": {"teacher_kl": 1.05, "agreement": 0.75},
            "metrics": METRICS,
            "samples": [{"prompt": HOSTILE, "teacher": "a", "before": "b", "after": HOSTILE}],
        },
        heldout_rows_json=rows,
        token_gates_json=[{"id": HOSTILE, "prompt": HOSTILE, "tokens": TOKENS}],
    )


def drafting(folder: Path) -> Path:
    """A train-drafter run that was interrupted after a replay was written by hand."""
    nodes = [
        {"text": " the", "parent": -1, "accepted": True},
        {"text": HOSTILE, "parent": -1, "accepted": False},
        {"text": " mat", "parent": 0, "accepted": True},
        {"text": " hat", "parent": 0, "accepted": False},
    ]
    rounds = [
        {"nodes": nodes, "emitted": [" the", " mat", HOSTILE]},
        {"nodes": [], "emitted": [" end"]},
    ]
    steps: list[dict[str, Any]] = [{"step": 1, "loss": 3.0}]
    for step in (1, 2):
        levels = {f"eval_level_{level}": 1 / level for level in range(1, 12)}
        steps.append({"step": step, "eval_tau": 1.0 + step, "eval_tau_tree": 2.0 + step} | levels)
    return write(
        folder,
        "train-drafter",
        status="interrupted",
        metrics_jsonl=steps,
        before_json={"figures": {"tau": 1.0, "level_1": 0.125}, "rows": {}},
        replay_json=[{"method": HOSTILE, "prompt": HOSTILE, "rounds": rounds}],
    )


def benched(folder: Path, batches: int = 2) -> Path:
    rows = [
        {
            "method": name,
            "temperature": 0.0,
            "batch_size": 1,
            "tokens_per_second": 10.0 * speed,
            "speedup": {
                "generate": {
                    "sets": {"maths": speed, HOSTILE: speed + 0.5},
                    "mean": speed + 0.25,
                    "low": speed if batches > 1 else None,
                    "high": speed + 0.75 if batches > 1 else None,
                }
            },
            "identical": 1.0,
            "tau": speed,
            "draft_ms": 1.0,
            "verify_ms": 2.0,
            "acceptance": [0.5, 0.25],
        }
        for name, speed in (("generate", 1.0), (HOSTILE, 1.5))
    ]
    outcome = {"target": HOSTILE, "sets": ["maths", HOSTILE], "rows": rows}
    return write(folder, "bench", bench_json=outcome, replay_json=[])


def compared(folder: Path) -> Path:
    gap = {"teacher_kl": {"mean": -0.5, "low": -0.75, "high": -0.25}}
    cost = {"seconds": 7.5, "tokens": 1000.0, "peak_memory": 2.0**31}
    arms = [
        {
            "arm": "kd",
            "seeds": [0],
            "figures": {"teacher_kl": 2.0},
            "cost": cost,
            "differences": gap,
        }
        | {"grid": [{"fields": {"lr": 0.1}}, {"fields": {"lr": 0.2}}], "chosen": {"lr": 0.1}},
        {"arm": HOSTILE, "seeds": [0], "figures": {"teacher_kl": 1.5}, "differences": gap},
        {"arm": "failed", "seeds": []},
    ]
    outcome = {
        "baseline": "kd",
        "seeds": [0, 1],
        "metrics": METRICS[:1],
        "arms": arms,
        "failures": {"failed, seed 0": HOSTILE},
        "kept_by_these_rows": ["kd"],
        "chosen_by": {"metric": METRICS[0], "rows": {"name": HOSTILE}, "seeds": [2]},
    }
    return write(folder, "compare", comparison_json=outcome)
