"""The demo's own spec, with the real teacher, cut short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.fixtures.pages import ROOT

SHORT = {
    "data.train.limit": 2,
    "data.heldout.limit": 2,
    "data.responses.max_new_tokens": 6,
    "training.steps": 2,
    "training.learning_rate": 1e-4,
    "training.batch_size": 2,
    "training.save_every": 100,
    "evaluation.samples": 1,
    "evaluation.sample_tokens": 4,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, dequantised: Path) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    sets = [word for name, value in SHORT.items() for word in ("--set", f"{name}={value}")]
    kdcore = Path(sys.executable).with_name("kdcore")
    done = subprocess.run(
        [kdcore, "distill", "examples/demo.yaml", "--out", folder, *sets],
        cwd=ROOT,
        env=os.environ | {"KDCORE_CACHE": str(dequantised)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "teacher KL" in done.stdout and "top-1 agreement" in done.stdout
    return folder


def test_a_student_of_the_real_teacher_comes_closer_to_it(demo: Path) -> None:
    results = json.loads((demo / "results.json").read_text())
    assert results["after"]["teacher_kl"] < results["before"]["teacher_kl"]
    assert results["after"]["perplexity"] < results["before"]["perplexity"]
    (sample,) = results["samples"]
    assert sample["teacher"] and sample["prompt"]


def test_plain_transformers_loads_the_student_and_generates(demo: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(demo / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    assert student.config.num_hidden_layers == 24
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell a child what the equator is."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = student.generate(**asked, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(written[0, asked["input_ids"].shape[1] :]).strip()
