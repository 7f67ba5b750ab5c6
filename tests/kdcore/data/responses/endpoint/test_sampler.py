"""A server samples what the student would, with weights that are at most so old."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcore.data.ranks import ALONE
from kdcore.data.responses.endpoint.sampler import ServedSampler
from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.models.loading.load import load_model
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore.specs.parts.on_policy import OnPolicySpec
from kdcore.training.trainer.trainer import DistillationTrainer
from tests.fixtures.apps.endpoint_app import served
from tests.fixtures.apps.sampling_app import SamplingEndpoint
from tests.tiny.distill_specs import distill_spec, logged
from tests.tiny.tiny_chat_models import saved, tiny_model

LORA = {"lora": {"r": 4, "alpha": 8.0}}
STEPS = 4
NOISE = 0.1


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for place, name in enumerate(("teacher", "student")):
        saved(tiny_model(seed=place), folder / name)
    return folder


@pytest.fixture
def server(models: Path) -> Iterator[SamplingEndpoint]:
    loaded = load_model(ModelSpec(model=str(models / "student")))
    with served(SamplingEndpoint(loaded)) as running:
        yield running


def spec_of(folder: Path, models: Path, sampler: Any, **changes: Any) -> DistillSpec:
    policy = {"probability": 1.0, "max_new_tokens": 6, "temperature": 0.0, "sampler": sampler}
    given: dict[str, Any] = {
        "teacher": {"model": str(models / "teacher")},
        "data": {"on_policy": policy},
        "training": {"steps": STEPS, "batch_size": 4, "accumulation": 1, "learning_rate": 0.03},
    }
    return distill_spec(folder, models / "student", **(given | changes))


def endpoint(server: SamplingEndpoint, **changes: Any) -> dict[str, Any]:
    return {"endpoint": server.url, "model": "tiny-chat", **changes}


def seeds(server: SamplingEndpoint) -> list[int]:
    """Those of the sampled responses, of which each has its own."""
    found = sorted(body["seed"] for body in server.asked if "logprobs" not in body)
    assert len(set(found)) == len(found) > STEPS
    return found


@pytest.mark.parametrize("student", [{}, LORA], ids=["whole", "adapters"])
def test_a_server_samples_what_the_student_would_with_weights_of_a_known_age(
    tmp_path: Path, models: Path, server: SamplingEndpoint, student: dict[str, Any]
) -> None:
    here = distill(spec_of(tmp_path / "here", models, None, student=student))
    there = distill(spec_of(tmp_path / "there", models, endpoint(server), student=student))
    assert logged(there) == pytest.approx(logged(here), rel=1e-4)
    assert len({round(loss, 4) for loss in logged(here)}) == STEPS
    assert logged(there, "on_policy/tokens") == logged(here, "on_policy/tokens")
    assert logged(there, "on_policy/lag") == [0.0] * STEPS
    each = ["load", "unload"] if student else ["reload", "reset"]
    assert sorted(server.commands) == sorted(each * STEPS)
    assert not server.adapters
    assert not (tmp_path / "there" / "run" / "sampler").exists()

    drawn = seeds(server)
    server.commands.clear()
    server.asked.clear()
    (tmp_path / "shared").mkdir()
    sampler = endpoint(server, staleness=2, folder=str(tmp_path / "shared"))
    lazy = distill(spec_of(tmp_path / "lazy", models, sampler, student=student))
    assert logged(lazy, "on_policy/lag") == [0.0, 1.0, 2.0, 0.0]
    assert server.commands.count(each[0]) == 2
    assert not list((tmp_path / "shared").iterdir())
    assert logged(lazy)[0] == pytest.approx(logged(here)[0], rel=1e-4)
    assert logged(lazy) != pytest.approx(logged(here), rel=1e-4)
    assert seeds(server) == drawn  # a run is the same again


@pytest.mark.parametrize("student", [{}, LORA], ids=["whole", "adapters"])
def test_what_a_killed_run_sent_is_removed_when_it_is_resumed(
    tmp_path: Path,
    models: Path,
    server: SamplingEndpoint,
    student: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = {"steps": STEPS, "batch_size": 4, "accumulation": 1, "learning_rate": 0.03}
    how: dict[str, Any] = {"student": student, "training": training | {"save_every": 1}}
    whole = distill(spec_of(tmp_path / "whole", models, endpoint(server), **how))
    server.model.model.load_state_dict(
        load_model(ModelSpec(model=str(models / "student"))).model.state_dict()
    )
    finish = DistillationTrainer._finish_step

    def die(trainer: DistillationTrainer) -> None:
        finish(trainer)
        if trainer.state.global_step == 2:
            raise RuntimeError("killed")

    spec = spec_of(tmp_path / "killed", models, endpoint(server), **how)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(DistillationTrainer, "_finish_step", die)
        patch.setattr(ServedSampler, "close", lambda sampler: None)
        distill(spec)
    left = tmp_path / "killed/run/sampler"
    assert len([*left.iterdir()]) == 1 and len(server.adapters) == len(student)
    resumed = distill(spec, resume=True)
    assert not left.exists() and not server.adapters
    assert logged(resumed) == pytest.approx(logged(whole), rel=1e-4)


def test_a_server_with_another_model_is_refused(
    tmp_path: Path, models: Path, server: SamplingEndpoint
) -> None:
    other: Any = load_model(ModelSpec(model=str(models / "teacher"))).model
    server.model.model.load_state_dict(other.state_dict())
    with pytest.raises(UserError, match="runs another model than the student") as wrong:
        distill(spec_of(tmp_path / "run", models, endpoint(server), student=LORA))
    assert wrong.value.cure == "serve the model of student.model"


def test_a_server_whose_model_is_almost_the_student_is_refused_and_rounding_is_not(
    tmp_path: Path, models: Path, server: SamplingEndpoint
) -> None:
    """Other by noise of a tenth of the weights' deviation, or by the rounding to bfloat16."""
    own: Any = server.model.model
    exact = {name: each.clone() for name, each in own.state_dict().items()}
    own.load_state_dict({name: each.bfloat16().float() for name, each in exact.items()})
    once = {"steps": 1, "batch_size": 4, "accumulation": 1}
    distill(spec_of(tmp_path / "rounded", models, endpoint(server), student=LORA, training=once))
    torch.manual_seed(0)
    own.load_state_dict(
        {n: each + NOISE * each.std() * torch.randn_like(each) for n, each in exact.items()}
    )
    with pytest.raises(UserError, match="runs another model than the student"):
        distill(spec_of(tmp_path / "run", models, endpoint(server), student=LORA, training=once))


@pytest.mark.parametrize(
    ("student", "setting"),
    [({}, "VLLM_SERVER_DEV_MODE=1"), (LORA, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")],
    ids=["whole", "adapters"],
)
def test_a_server_that_takes_no_weights_is_refused_with_the_setting(
    tmp_path: Path, models: Path, server: SamplingEndpoint, student: dict[str, Any], setting: str
) -> None:
    with served(SamplingEndpoint(server.model, takes=False)) as fixed:
        spec = spec_of(tmp_path / "run", models, endpoint(fixed), student=student)
        with pytest.raises(UserError, match="cannot take the student's weights") as wrong:
            distill(spec)
    assert wrong.value.cure.startswith(f"start vLLM's server with {setting}")


def test_a_server_that_refuses_the_adapters_says_why(
    tmp_path: Path, models: Path, server: SamplingEndpoint
) -> None:
    server.refuses = "LoRA rank 4 is greater than max_lora_rank 2."
    with pytest.raises(UserError, match="greater than max_lora_rank 2") as wrong:
        distill(spec_of(tmp_path / "run", models, endpoint(server), student=LORA))
    assert wrong.value.cure.startswith(
        "check the server's log; the server needs VLLM_ALLOW_RUNTIME_LORA"
    )
    assert not list((tmp_path / "run" / "run").glob("sampler/*"))


def test_a_server_that_others_use_is_refused(
    tmp_path: Path, models: Path, server: SamplingEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcore.data.responses.endpoint.sampler._IDLE", 0.3)
    server.busy = 100
    with pytest.raises(UserError, match="answers other requests") as wrong:
        distill(spec_of(tmp_path / "run", models, endpoint(server)))
    assert wrong.value.cure == "use a server that nobody else uses"


@pytest.mark.parametrize("said", [[], {"choices": 3}, "x"])
@pytest.mark.parametrize("of", ["a reset", "a first token", "a log-prob"])
def test_a_server_that_speaks_otherwise_is_refused(
    tmp_path: Path, server: SamplingEndpoint, of: str, said: Any
) -> None:
    """Whatever part of its responses is of another form."""
    policy = {"max_new_tokens": 4, "sampler": endpoint(server)}
    if of == "a reset":
        server.resets = said
    else:
        token = {"token_ids": [3] if of == "a log-prob" else said, "logprobs": said}
        server.instead = lambda text: {"choices": [token]}
    sampler = ServedSampler(
        OnPolicySpec.model_validate(policy), tmp_path / "weights", len(server.model.tokenizer),
        every=True, plain=dict, ranks=ALONE,
    )  # fmt: skip
    with closing(sampler), pytest.raises(UserError, match="does not respond like an OpenAI"):
        draws = torch.Generator().manual_seed(0)
        sampler.responses(server.model.model, [[3, 4]], [4], [2], step=0, generator=draws)


THERE = {"endpoint": "http://localhost:1/v1", "model": "m"}


@pytest.mark.parametrize(
    ("student", "policy", "cause"),
    [
        ({"model": "teacher", "layers": [0]}, {}, "exists only after its training"),
        ({**LORA, "adapter": "./a"}, {}, "without student.adapter"),
        ({}, {"policy": "interleaved"}, "interleaved from two"),
        ({}, {"sampler": {**THERE, "staleness": -1}}, "greater than or equal to 0"),
    ],
)
def test_what_a_server_cannot_sample_is_refused(
    tmp_path: Path, models: Path, student: dict[str, Any], policy: dict[str, Any], cause: str
) -> None:
    asked = {"on_policy": {"sampler": THERE, **policy}}
    with pytest.raises(ValueError, match=cause):
        spec_of(tmp_path, models, None, student=student, data=asked)


def test_a_check_names_the_server_and_asks_it_nothing(
    tmp_path: Path, models: Path, server: SamplingEndpoint
) -> None:
    report = preflight(spec_of(tmp_path, models, endpoint(server, staleness=3)))
    assert report.sampler == f"tiny-chat at {server.url}, with weights at most 3 steps old"
    assert report.seconds["sampling"] == 0
    assert not server.asked
    assert not server.commands
