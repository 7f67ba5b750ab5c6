"""The matcher of attention in a run: what it logs and saves, and what is refused before it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    FalconConfig,
    Lfm2Config,
    MambaConfig,
)

from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.models.loading.loaded import LoadedModel
from kdcore.models.matching.attention import refuse_unwatched
from kdcore.specs.distill import DistillSpec
from tests.fixtures.json_lines import write_lines
from tests.tiny.distill_specs import distill_spec, logged
from tests.tiny.tiny_chat_models import saved, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        saved(tiny_model("llama", seed=seed), folder / name)
    return folder


def asked(folder: Path, run: Path, **changes: Any) -> DistillSpec:
    given = {"teacher": {"model": str(folder / "teacher")}, "method": {"matchers": ["attention"]}}
    merged = {n: {**given.get(n, {}), **changes.get(n, {})} for n in given | changes}
    return distill_spec(run, folder / "student", **merged)


def test_a_resumed_run_goes_on_with_every_part(folder: Path, tmp_path: Path) -> None:
    method = {
        "gates": ["entropy"],
        "splitters": ["target_split"],
        "momentum": "per_term",
        "matchers": [{"name": "attention", "pairs": None}, "hidden"],
        "terms": {"task": 0.5},
    }
    training = {"steps": 4, "save_every": 2, "learning_rate": 1e-2, "probe_every": 2}
    plain = {"optimizer": "sgd", "momentum": 0.0, "clip": 0.0}
    spec = asked(folder, tmp_path, method=method, training=training | plain)
    report = preflight(spec)
    pairs = ", ".join(f"{n} with {n}" for n in range(1, report.models["student"].layers + 1))
    assert report.matched[0] == (
        f"matcher attention: attention of layers {pairs} (student with teacher)"
    )
    run = distill(spec)
    losses, distances = logged(run), logged(run, "term/attention")
    assert len(distances) == 4 and min(distances) > 0
    assert "gsnr/attention" in run.path("metrics.jsonl").read_text()
    student = load_file(run.path("model", "model.safetensors"))
    for left in ("checkpoint-4", "model"):
        shutil.rmtree(spec.run / left)
    (spec.run / "README.md").unlink()
    resumed = distill(spec, resume=True)
    assert logged(resumed) == losses
    again = load_file(resumed.path("model", "model.safetensors"))
    assert all(student[name].equal(again[name]) for name in student)


def test_packing_changes_no_loss(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "the mat?", "response": "the teacher sat " * n} for n in range(1, 5)]
    found = []
    for packing in (False, True):
        training = {"steps": 1, "batch_size": 4, "accumulation": 1, "packing": packing}
        spec = asked(folder, tmp_path / str(packing), training=training, data={"max_length": 128})
        write_lines(tmp_path / str(packing) / "rows.jsonl", rows)
        found.append(logged(distill(spec), "term/attention")[0])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "cause", "cure"),
    [
        ({"teacher": {"attention": "eager"}}, "sdpa, and the teacher has eager", "teacher.att"),
        (
            {"teacher": {"attention": "flash_attention_2"}},
            "the teacher has flash_attention_2",
            "set teacher.attention: sdpa",
        ),
        ({"student": {"attention": "eager"}}, "sdpa, and the student has eager", "student.att"),
        (
            {"data": {"teacher_prompt": "{prompt}!"}},
            "with data.teacher_prompt the teacher reads others",
            "remove data.teacher_prompt",
        ),
        (
            {"method": {"alignment": "spans", "splitters": ["uld"]}},
            "with method.alignment the teacher reads others",
            "remove method.alignment",
        ),
        (
            {
                "training": {
                    "trainer": {
                        "gradient_checkpointing": True,
                        "gradient_checkpointing_kwargs": {"use_reentrant": True},
                    }
                }
            },
            "gives no gradient to the attention that matcher 'attention' reads",
            "use_reentrant: false",
        ),
    ],
)
def test_what_a_spec_says_against_it_is_told_before_models_are_loaded(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    cause: str,
    cure: str,
) -> None:
    monkeypatch.setattr("kdcore.models.fit.pair.TeacherAndStudent.load", None)
    refused(asked(folder, tmp_path, **changes), cause, cure)


@pytest.mark.parametrize(
    ("pair", "cause"),
    [([0, 1], "names layer 0 of the student"), ([1, 9], "layer 9 of the teacher")],
)
def test_layers_that_a_model_does_not_have(
    folder: Path, tmp_path: Path, pair: list[int], cause: str
) -> None:
    matchers = [{"name": "attention", "pairs": [pair]}]
    refused(
        asked(folder, tmp_path, method={"matchers": matchers}),
        cause,
        "write pairs: [[STUDENT, TEACHER], ...] with 1 to 4",
    )


FAMILIES: dict[str, Any] = {
    "its layers do not have attention": MambaConfig(
        hidden_size=32, num_hidden_layers=3, vocab_size=290, state_size=4
    ),
    "it computes its attention in a way of its own": FalconConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, vocab_size=290
    ),
}


@pytest.mark.parametrize("cause", FAMILIES)
def test_a_teacher_whose_attention_nobody_hears(folder: Path, tmp_path: Path, cause: str) -> None:
    model = AutoModelForCausalLM.from_config(FAMILIES[cause])
    saved(LoadedModel(model, tiny_tokenizer(), "it", ""), tmp_path / "teacher")
    teacher = {"model": str(tmp_path / "teacher")}
    refused(asked(folder, tmp_path, teacher=teacher), cause, "remove the matcher")


def test_a_family_with_some_attention_is_compared_where_it_has_it() -> None:
    config = Lfm2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        vocab_size=290,
        layer_types=["conv", "full_attention"] * 2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    refuse_unwatched(model, "teacher", {2, 4})
    with pytest.raises(UserError, match="layer 3 does not have attention"):
        refuse_unwatched(model, "teacher", {2, 3})


def test_other_numbers_of_heads_are_compared_in_groups(folder: Path, tmp_path: Path) -> None:
    config: Any = tiny_model("llama").model.config
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 4
    other = AutoModelForCausalLM.from_config(config)
    saved(LoadedModel(other, tiny_tokenizer(), "it", ""), tmp_path / "teacher")
    teacher = {"model": str(tmp_path / "teacher")}
    spec = asked(folder, tmp_path, teacher=teacher)
    refused(spec, "have 2 heads and those of the teacher 4", "set heads: groups or heads: mean")
    method = {"matchers": [{"name": "attention", "heads": "groups"}]}
    run = distill(asked(folder, tmp_path / "groups", teacher=teacher, method=method))
    assert min(logged(run, "term/attention")) > 0


def refused(spec: DistillSpec, cause: str, cure: str) -> None:
    for job in (preflight, distill):
        with pytest.raises(UserError) as wrong:
            job(spec)
        assert cause in wrong.value.cause and cure in wrong.value.cure


def test_a_classifier_learns_the_attention_of_its_teacher(tmp_path: Path) -> None:
    labels = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    tokenizer = tiny_tokenizer()
    for name, layers in (("student", 1), ("teacher", 2)):
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=32,
            initializer_range=0.3,
            pad_token_id=tokenizer.pad_token_id,
            **labels,
        )
        model = AutoModelForSequenceClassification.from_config(config)
        saved(LoadedModel(model, tokenizer, "it", ""), tmp_path / name)
    rows = [f"the mat {'sat ' * n},{('no', 'yes')[n % 2]}" for n in range(8)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    spec = DistillSpec.model_validate(
        {
            "job": "distill",
            "run": tmp_path / "run",
            "teacher": {"model": str(tmp_path / "teacher")},
            "student": {"model": str(tmp_path / "student")},
            "data": {"train": {"name": "labelled_text", "path": str(tmp_path / "rows.csv")}},
            "method": {"gates": ["entropy"], "matchers": ["attention"], "terms": {"kd": 0}},
            "training": {"steps": 8, "batch_size": 8, "learning_rate": 1e-2},
        }
    )
    distances = logged(distill(spec), "term/attention")
    assert distances[-1] < distances[0]
