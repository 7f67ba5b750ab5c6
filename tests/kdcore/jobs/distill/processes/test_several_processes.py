"""Two processes (gloo) reach the weights of one: DDP with one and two streams, FSDP2 with one."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    set_seed,
)

from kdcore.jobs.distill import distill
from kdcore.models.fit.pair import TeacherAndStudent
from kdcore.models.loading.adapters import with_adapters
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec, LoraSpec
from tests.fixtures.processes.forked import in_two_processes
from tests.fixtures.processes.two_processes import (
    Labels,
    map_students,
    padded_logits,
    run_sharded,
    run_with_a_sharded_teacher,
    source_of,
    train,
)
from tests.kdcore.models.loading.test_adapters import randomised
from tests.kdcore.training.trainer.test_trainer import DEEPKD, trainer
from tests.tiny.distill_specs import chats_in
from tests.tiny.tiny_chat_models import saved, tiny_model

SPECKD: dict[str, Any] = {"gates": ["speckd"]}
FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


PROBED = [f"gsnr/{term}" for term in ("task", "target", "non_target")]
GREEDY = {"policy": "interleaved", "top_k": 3, "probability": 0.6, "temperature": 0.0}
SAMPLED = {"on_policy": GREEDY, "optim": "sgd"}
"""Without chance, what a row's response is does not depend on who samples it. Plain descent,
here and below, since adamw makes as much of a gradient that is all rounding as of any."""
DESCENT = {"batch_size": 1, "save_every": 2, "optimizer": "sgd", "momentum": 0, "clip": 0}
SEVERAL_MOMENTA: dict[str, Any] = {
    "splitters": ["deepkd"],
    "momentum": "deepkd",
    "terms": {"task": 1},
}


def short_spec(folder: Path, **fields: Any) -> dict[str, Any]:
    """A spec whose run, ``alone``, distils a tiny teacher into two of its layers on eight rows."""
    teacher = saved(tiny_model(), folder / "teacher")
    rows = [{"prompt": f"the mat {n}?", "response": f"the teacher {n}"} for n in range(8)]
    source = chats_in(folder, rows)
    return {
        "job": "distill",
        "run": str(folder / "alone"),
        "teacher": {"model": str(teacher)},
        "student": {"model": "teacher", "layers": [0, 2]},
        "data": {"train": source, "heldout": source},
        "evaluation": {"samples": 1, "sample_tokens": 3},
        **fields,
    }


def words(folder: Path, spec: dict[str, Any], name: str) -> list[str]:
    """The command that runs a spec, which it writes, in the run folder of a name."""
    (folder / "spec.yaml").write_text(json.dumps(spec))  # JSON is YAML
    return ["distill", str(folder / "spec.yaml"), "--out", str(folder / name)]


def killed_and_resumed(folder: Path, command: list[str]) -> None:
    """Run a command in two processes, which are killed in the third step, and resume it."""
    in_two_processes(folder, run_sharded, command, 3, ends=-signal.SIGKILL)
    killed = Path(command[-1])
    assert Run(killed).status == "running"
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-2"]
    in_two_processes(folder, run_sharded, [*command, "--resume"])


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (SPECKD, {}),
        (DEEPKD | SPECKD, {"probe": [2, 3]}),
        ({"gates": [{"name": "se_kd_queue", "fraction": 0.5}]}, {"optim": "sgd"}),
        (SPECKD, FSDP2),
        (DEEPKD | SPECKD | {"momentum": {"name": "deepkd", "clip": 0.5}}, FSDP2),
        (SPECKD, SAMPLED),
    ],
    ids=[
        "one stream",
        "two streams, probed",
        "scores that a gate remembers",
        "one stream, sharded",
        "two streams, clipped, sharded",
        "on policy",
    ],
)
def test_two_processes_reach_the_weights_of_one(
    tmp_path: Path, method: dict[str, Any], arguments: dict[str, Any]
) -> None:
    in_two_processes(tmp_path, train, tmp_path, method, arguments)
    same = {name: given for name, given in arguments.items() if not name.startswith("fsdp")}
    alone = trainer(tmp_path / "alone", method, per_device_train_batch_size=12, **same)
    alone.train()
    logged = json.loads((tmp_path / "log.json").read_text())
    for ours, theirs in zip(logged[:-1], alone.state.log_history[:-1], strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds", *PROBED}:  # a probe's batches are a process's
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
    together = load_file(tmp_path / "weights")
    for name, value in alone.model.named_parameters():
        torch.testing.assert_close(together[name], value.detach(), rtol=1e-4, atol=1e-6)


def test_the_command_line_shards_the_teacher_over_two_processes(tmp_path: Path) -> None:
    spec = short_spec(tmp_path, training={"batch_size": 4, "save_every": 1})
    spec["student"]["model"] = spec["teacher"]["model"]
    alone = distill(DistillSpec.model_validate(spec))
    spec["teacher"]["device"], spec["training"]["batch_size"] = "sharded", 2
    said = in_two_processes(tmp_path, run_with_a_sharded_teacher, words(tmp_path, spec, "run"))
    assert "".join(said).count("student:") == 1
    together, whole = (losses(Path(folder)) for folder in (tmp_path / "run", alone.folder))
    assert together.keys() == {1, 2}
    assert together == pytest.approx(whole, rel=1e-4)
    ours, theirs = (
        Run(folder).read_json("results.json") for folder in (tmp_path / "run", alone.folder)
    )
    assert ours["samples"] == theirs["samples"]
    assert ours["after"] == pytest.approx(theirs["after"], rel=1e-3)


def test_a_sharded_run_that_was_killed_resumes_on_the_command_line(tmp_path: Path) -> None:
    """Of a student with several momenta, measured before and after as one process does."""
    spec = short_spec(tmp_path, method=SEVERAL_MOMENTA, training=DESCENT | {"batch_size": 2})
    spec["evaluation"]["before"] = True
    alone = distill(DistillSpec.model_validate(spec))
    spec["training"] = DESCENT | {"trainer": FSDP2}
    in_two_processes(tmp_path, run_sharded, words(tmp_path, spec, "whole"))
    killed_and_resumed(tmp_path, words(tmp_path, spec, "killed"))
    weights = [load_file(tmp_path / f"{n}/model/model.safetensors") for n in ("whole", "killed")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    results = [Run(tmp_path / n).read_json("results.json") for n in ("whole", "killed", "alone")]
    assert results[0] == results[1]
    assert results[0]["before"] == pytest.approx(results[2]["before"], rel=1e-6)
    assert results[0]["after"] == pytest.approx(results[2]["after"], rel=1e-3)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole") == pytest.approx(losses(alone.folder), rel=1e-4)
    assert not [*tmp_path.glob("*/student-at-start*")]


@pytest.mark.parametrize(
    ("targets", "method"),
    [
        ("all-linear", {}),
        (
            ["embed_tokens", "v_proj"],  # of embeddings that share their weights with the head
            SEVERAL_MOMENTA,
        ),
    ],
    ids=["one momentum", "tied, several momenta"],
)
def test_adapters_on_a_sharded_student_are_those_of_one_process(
    tmp_path: Path, targets: Any, method: dict[str, Any]
) -> None:
    """To the bit where the run was killed and resumed, which is tried with several momenta."""
    training = DESCENT | {"learning_rate": 1e-2}
    spec = short_spec(tmp_path, method=method, training=training | {"batch_size": 2})
    spec["student"]["lora"] = {"r": 2, "targets": targets}
    alone = distill(DistillSpec.model_validate(spec))
    spec["training"] = training | {"trainer": FSDP2}
    in_two_processes(tmp_path, run_sharded, words(tmp_path, spec, "whole"))
    again = "killed" if method else "whole"
    if method:
        killed_and_resumed(tmp_path, words(tmp_path, spec, again))
    checkpoint = load_file(tmp_path / "whole/checkpoint-4/weights-0-of-2.safetensors")
    assert checkpoint and all("lora_" in name for name in checkpoint), "the rest does not change"
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        whole, killed, one = (load_file(tmp_path / n / file) for n in ("whole", again, "alone"))
        assert whole.keys() == killed.keys() == one.keys()
        for name, value in whole.items():
            assert torch.equal(value, killed[name]), name
            torch.testing.assert_close(value, one[name], rtol=1e-3, atol=5e-5)
    configs = [
        json.loads((tmp_path / n / "model/config.json").read_text()) for n in ("whole", "alone")
    ]
    assert configs[0] == configs[1]
    results = [Run(tmp_path / n).read_json("results.json") for n in ("whole", again, "alone")]
    assert results[0] == results[1]
    for when in ("before", "after"):
        assert results[0][when] == pytest.approx(results[2][when], rel=1e-3)
    assert results[0]["samples"] == results[2]["samples"]
    assert losses(tmp_path / "whole") == pytest.approx(losses(alone.folder), rel=1e-4)


def test_no_process_holds_a_student_whole_that_is_to_be_sharded(tmp_path: Path) -> None:
    """Not even one whose files have another dtype; its weights are those of a process alone."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    large = LlamaConfig(vocab_size=300, num_attention_heads=4, **shape)
    tied = LlamaConfig(vocab_size=300, num_attention_heads=4, tie_word_embeddings=True, **shape)
    folders = {"large": large, "tied": tied}
    for name, config in folders.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        saved(LoadedModel(model, tiny_model().tokenizer, name, ""), tmp_path / name)
    adapted = randomised(with_adapters(model, LoraSpec(r=2, targets=["embed_tokens", "v_proj"])))
    adapted.save_pretrained(tmp_path / "trained")  # of tied weights, which it unties
    classifying = LlamaConfig(
        **large.to_dict() | {"id2label": dict(enumerate(Labels.classes)), "pad_token_id": None}
    )
    judge = AutoModelForSequenceClassification.from_config(classifying)
    saved(LoadedModel(judge, tiny_model().tokenizer, "judge", ""), tmp_path / "judge")
    made = {"model_type": "llama", "num_attention_heads": 4, **shape}
    students: dict[str, Any] = {
        "pretrained": {"model": str(tmp_path / "large")},
        "tied-weights": {"model": str(tmp_path / "tied")},
        "cut": {"model": "teacher", "layers": [*range(6)]},
        "new": {"model": "new", "config": made},
        "adapter": {"model": str(tmp_path / "tied"), "adapter": str(tmp_path / "trained")},
        "lora-tied": {"model": str(tmp_path / "tied"), "lora": {"targets": ["embed_tokens"]}},
        "classifier": {"model": "teacher", "layers": [0, 1, 2]},
        "classifier-new-head": {"model": str(tmp_path / "large")},
    }
    asked = {
        name: {
            "job": "distill",
            "run": str(tmp_path / "run"),
            "teacher": {
                "model": str(tmp_path / ("judge" if "classifier" in name else "large")),
                "dtype": "bfloat16",
            },
            "student": student,
            "data": {"train": {"name": "chat", "path": "rows.jsonl"}},
        }
        for name, student in students.items()
    }
    in_two_processes(tmp_path, map_students, tmp_path, asked)
    both = [json.loads((tmp_path / f"mapped-{n}.json").read_text()) for n in range(2)]
    for name in students:
        one, other = (each[name] for each in both)
        assert one["facts"] == other["facts"] and one["random"] == other["random"]
        assert one["tied"] is other["tied"] is ("tied" in name)
        assert "classifier" not in name or one["padding"] is not None
        assert other["memory"] < other["whole"] / 4, (name, one, other)
        spec = DistillSpec.model_validate(asked[name])
        set_seed(spec.seed)
        alone: Any = TeacherAndStudent.load(spec, {"train": source_of(name)}).student.model
        assert one["padding"] == other["padding"] == alone.config.pad_token_id
        wanted = dict(alone.named_parameters()) | dict(alone.named_buffers())
        wanted["logits"] = padded_logits(alone)
        for number in range(2):
            mapped = load_file(tmp_path / f"{name}-{number}")
            assert mapped.keys() == wanted.keys()
            assert all(torch.equal(mapped[key], value) for key, value in wanted.items())


def losses(run: Path) -> dict[int, float]:
    """Step -> loss of the training."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "grad_norm" in line}
