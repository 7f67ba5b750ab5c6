"""Training on sampled responses: when, on which rows, and from the command's spec to the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.specs.distill import DistillSpec
from kdcore.specs.train_drafter import DraftDataSpec
from tests.fixtures.json_lines import write_lines
from tests.kdcore.jobs.distill.test_distill import classifier_of
from tests.kdcore.training.trainer.test_trainer import DEEPKD, Watched, trainer, weights
from tests.tiny.distill_specs import CHATS
from tests.tiny.tiny_chat_models import saved, tiny_model

KEYS = ("on_policy/rows", "on_policy/tokens", "on_policy/replaced")


def steps(made: Any) -> list[dict[str, float]]:
    return [line for line in made.state.log_history if "loss" in line]


def test_at_probability_0_the_run_is_the_one_without_it(tmp_path: Path) -> None:
    without, never = (
        trainer(tmp_path, DEEPKD),
        trainer(tmp_path, DEEPKD, on_policy={"probability": 0}),
    )
    without.train()
    never.train()
    assert all(torch.equal(value, weights(never)[name]) for name, value in weights(without).items())
    assert all(line[key] == 0 for line in steps(never) for key in KEYS)


SKEW, SKEW_REVERSE = "skew_kl", {"name": "skew_reverse_kl", "detached": True}


@pytest.mark.parametrize("others", [{"gates": ["speckd"]}, DEEPKD | {"gates": ["entropy"]}])
@pytest.mark.parametrize(("probability", "used"), [(0.0, SKEW), (1.0, SKEW_REVERSE)])
def test_sampled_responses_have_a_divergence_of_their_own(
    tmp_path: Path, others: dict[str, Any], probability: float, used: Any
) -> None:
    """DistiLLM-2: skew KL on what the teacher wrote, skew reverse KL on what the student did."""
    both = others | {"divergence": SKEW, "sampled_divergence": SKEW_REVERSE}
    given = {"on_policy": {"probability": probability}, "max_steps": 3}
    made, one = (
        trainer(tmp_path, method, **given) for method in (both, others | {"divergence": used})
    )
    other = trainer(tmp_path, others | {"divergence": "total_variation"}, **given)
    for each in (made, one, other):
        each.train()
    assert all(torch.equal(value, weights(made)[name]) for name, value in weights(one).items())
    assert any(not torch.equal(v, weights(made)[name]) for name, v in weights(other).items())


@pytest.mark.parametrize("method", [{"sampled_divergence": "reverse_kl"}, {"advantage": "minillm"}])
def test_a_method_for_responses_that_nobody_samples_is_refused(method: dict[str, Any]) -> None:
    asked: dict[str, Any] = {
        "teacher": {"model": "some/model"},
        "student": {"layers": [0]},
        "data": {"train": {"name": "chat", "path": "rows.jsonl"}},
        "method": method,
    }
    with pytest.raises(ValidationError, match=r"set data\.on_policy"):
        DistillSpec.model_validate(asked)
    asked["data"]["on_policy"] = {}
    DistillSpec.model_validate(asked)


@pytest.mark.parametrize(
    ("on_policy", "cause"),
    [
        ({"policy": "interleaved"}, "support data.on_policy.policy interleaved"),
        ({"temperature": 0.7}, "support data.on_policy.temperature 0.7"),
        ({"top_p": 0.9}, "support data.on_policy.top_p 0.9"),
        (
            {"sampler": {"endpoint": "http://a/v1", "model": "a", "staleness": 1}},
            "support data.on_policy.sampler.staleness 1",
        ),
        ({"policy": "mixed", "top_p": 0.9}, "mixed does not support top_p 0.9"),
    ],
)
def test_samples_of_another_distribution_are_refused(on_policy: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValidationError, match=cause):
        DistillSpec.model_validate(
            {
                "teacher": {"model": "some/model"},
                "student": {"model": "smaller/model"},
                "data": {"train": {"name": "chat", "path": "rows.jsonl"}, "on_policy": on_policy},
                "method": {"advantage": "minillm"},
            }
        )


MINILLM = {"divergence": "reverse_kl", "advantage": "minillm"}


@pytest.mark.parametrize(
    ("policy", "method"), [("student", {}), ("interleaved", {}), ("mixed", MINILLM)]
)
def test_accumulation_samples_what_one_large_batch_samples(
    tmp_path: Path, policy: str, method: dict[str, Any]
) -> None:
    sampled = {"policy": policy, "probability": 1.0, "top_k": 3}
    whole, split = (
        trainer(tmp_path, method, on_policy=sampled, optim="sgd", **sizes)
        for sizes in (
            {"per_device_train_batch_size": 12},
            {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3},
        )
    )
    whole.train()
    split.train()
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(split)[name], rtol=1e-4, atol=1e-6)
    for large, small in zip(steps(whole), steps(split), strict=True):
        assert large["loss"] == pytest.approx(small["loss"], rel=1e-4)
        assert [large[key] for key in KEYS] == [small[key] for key in KEYS]
        assert large["on_policy/rows"] == 12
        assert (large["on_policy/replaced"] > 0) == (policy == "interleaved")


def test_a_step_is_all_sampled_or_not_at_all_and_its_time_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, {}, on_policy={"probability": 0.5}, max_steps=12)
    clock = iter(range(10_000))
    monkeypatch.setattr(
        "kdcore.training.trainer.trainer.time.perf_counter", lambda: float(next(clock))
    )
    made.train()
    assert {line["on_policy/rows"] for line in steps(made)} == {0, 4}
    assert {line["seconds"] for line in steps(made)} == {2.0}  # of sampling, and of learning


def test_the_student_samples_as_it_is_now(tmp_path: Path) -> None:
    made = trainer(tmp_path, {}, on_policy={"probability": 1.0, "temperature": 0.0}, max_steps=9)
    read: list[tuple[Any, Any]] = []
    inner = made.view

    def watched(model: Any, batch: Any) -> Any:
        with torch.no_grad():
            told = model.eval()(**batch.inputs, use_cache=False).logits.argmax(-1)
        model.train()
        read.append((batch.labels[batch.mask], told[batch.mask]))
        return inner(model, batch, 0.0)

    made.view = Watched(watched, inner.reference)
    made.train()
    assert len(read) == 9
    assert all(torch.equal(labels, likeliest) for labels, likeliest in read)
    assert len({tuple(labels.tolist()) for labels, _ in read}) > 3  # not the same at every step


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(extra=3), tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def asked(tmp_path: Path, teacher: Path) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    write_lines(path, CHATS)
    return {
        "run": tmp_path / "run",
        "teacher": {"model": str(teacher)},
        "student": {"layers": [0, 2]},
        "data": {
            "train": {"name": "chat", "path": path},
            "on_policy": {"policy": "interleaved", "probability": 1.0, "max_new_tokens": 6},
        },
        "training": {"batch_size": 2, "accumulation": 2, "learning_rate": 1e-2},
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "student": {"layers": [0, 2], "lora": {"r": 2, "dropout": 0.3}},
            "training": {"batch_size": 2, "precision": "bf16"},
        },
    ],
    ids=["all weights", "adapters, bf16"],
)
def test_a_run_trains_on_sampled_responses(asked: dict[str, Any], changes: dict[str, Any]) -> None:
    spec = DistillSpec.model_validate(asked | changes)
    told = preflight(spec)
    assert told.seconds["sampling"] > 0
    run = distill(spec)
    assert run.path("model", "model.safetensors").exists()
    lines = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert len(logged) == told.steps
    assert sum(line["on_policy/rows"] for line in logged) == 9
    assert all(0 < line["on_policy/replaced"] <= line["on_policy/tokens"] for line in logged)
    assert all(line["on_policy/tokens"] <= 6 * line["on_policy/rows"] for line in logged)


def test_the_check_counts_the_longest_responses(asked: dict[str, Any]) -> None:
    half = asked["data"] | {"on_policy": {"probability": 0.5, "max_new_tokens": 50}}
    off = asked["data"] | {"on_policy": None}
    sampled, without = (
        preflight(DistillSpec.model_validate(asked | {"data": data})) for data in (half, off)
    )
    assert without.seconds["sampling"] == 0 < sampled.seconds["sampling"]
    more = sampled.memory["activations"] / without.memory["activations"]
    assert more == pytest.approx((without.train.longest + 50) / without.train.longest)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"teacher": None, "student": {"model": "x"}}, "interleaved needs a teacher"),
        (
            {"data": {"teacher_cache": "somewhere"}},
            "teacher_cache and on_policy cannot be combined",
        ),
        ({"data": {"on_policy": {"probability": 1.5}}}, "less than or equal to 1"),
    ],
)
def test_what_cannot_be_is_refused_by_the_spec(
    asked: dict[str, Any], changes: dict[str, Any], cause: str
) -> None:
    data = asked["data"] | changes.pop("data", {})
    with pytest.raises(ValidationError, match=cause):
        DistillSpec.model_validate(asked | changes | {"data": data})


def test_a_drafter_is_trained_on_whole_responses() -> None:
    with pytest.raises(ValidationError, match="on_policy"):
        DraftDataSpec.model_validate({"train": {"name": "digits"}, "on_policy": {}})


def test_a_classifier_writes_no_responses(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nthe mat,a\nthe teacher,b\n")
    spec = DistillSpec.model_validate(
        asked
        | {
            "teacher": {"model": str(classifier_of(["a", "b"], tmp_path / "classifier"))},
            "data": {
                "train": {"name": "labelled_text", "path": tmp_path / "rows.csv"},
                "on_policy": {},
            },
        }
    )
    for carry_out in (preflight, distill):
        with pytest.raises(
            UserError, match=r"data\.on_policy requires a model that generates text"
        ):
            carry_out(spec)
