"""What kdcore does with vLLM's API server: bench it, learn from its answers and its log-probs."""

from __future__ import annotations

import json
import shlex
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcore.errors import UserError
from kdcore.jobs.bench import MEASUREMENTS, bench
from kdcore.jobs.caches.build import build_cache
from kdcore.jobs.distill import distill
from kdcore.jobs.generate_data import FILE, generate_data
from kdcore.models.folder.files import weights_digest
from kdcore.specs.bench import BenchSpec
from kdcore.specs.generate_data import GenerateDataSpec
from kdcore.specs.parts.endpoint import EndpointSpec
from tests.engines.api_server import LIMITS, MODULE, ApiServer, serving
from tests.engines.served import NEW, PROMPTS, continued, counted, drafter_in, target_in
from tests.tiny.distill_specs import chats_in, distill_spec, logged
from tests.tiny.tiny_chat_models import CHATML, saved, tiny_model

K = 8
STEPS = 4
TAKES_WEIGHTS = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
HALF = "\N{REPLACEMENT CHARACTER}"
"""What the first bytes of a character decode to, which vLLM leaves out at the end of an answer."""
TEXTS = ["the mat of the teacher", "why?", "for the student", "so and so", "the cat sat"]
ROWS = [{"prompt": text, "response": "the student sat"} for text in TEXTS]
TRAINING = {"batch_size": len(ROWS), "accumulation": 1, "epochs": 4}
spec_of = partial(distill_spec, rows=ROWS, training=TRAINING)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    folder = tmp_path_factory.mktemp("served")
    target = target_in(folder / "a target")
    target = replace(target, digest=weights_digest(folder / "a target"))  # as a benchmark loads it
    exported = drafter_in(folder, target, "fasteagle", 60, vocabulary=90, features=(1, 2, 3))
    with serving(f"{exported.command} {LIMITS}") as address:  # the documented command
        yield ApiServer(address, target.name, target, exported)


@pytest.fixture(scope="module")
def plain(server: ApiServer) -> Iterator[ApiServer]:
    """A second server of the same target, which does not draft, and takes other weights."""
    model = f"--model {shlex.quote(server.model)} --enable-lora --max-lora-rank 8"
    with serving(f"python -m {MODULE} {model} {LIMITS}", **TAKES_WEIGHTS) as address:
        yield replace(server, address=address)


@pytest.fixture
def sampler(plain: ApiServer) -> Iterator[ApiServer]:
    """The plain server, which has its own weights again after the test."""
    yield plain
    call = {"method": "reload_weights", "kwargs": {"weights_path": plain.model}}
    for path, body in (("collective_rpc", call), ("reset_prefix_cache", {})):
        ask(f"{plain.address}/{path}", body)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(seed=1), tmp_path_factory.mktemp("student") / "student")


def ask(url: str, body: dict[str, Any]) -> Any:
    """What a server responds to a request."""
    told = json.dumps(body).encode()
    request = urllib.request.Request(url, told, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_the_printed_command_serves(server: ApiServer) -> None:
    question = {
        "model": server.model,
        "prompt": PROMPTS[1],
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = ask(f"{server.address}/v1/completions", question)
    assert answer["choices"][0]["token_ids"] == continued(server.target, PROMPTS[1], 12)


def test_a_bench_of_two_servers_counts_the_drafts_as_the_loop_does_by_the_servers_rule(
    server: ApiServer, plain: ApiServer, tmp_path: Path
) -> None:
    """The rule: rounds from the second new token on, and the last round whole."""
    spec = BenchSpec.model_validate(
        {
            "job": "bench",
            "run": str(tmp_path / "run"),
            "target": {"model": server.target.name},
            "methods": {"ours": {"folder": str(server.exported.folder.parent / "ours")}},
            "servers": {"alone": plain.endpoint, "vllm": server.endpoint},
            "sets": {"mine": chats_in(tmp_path, ROWS)},
            "max_new_tokens": NEW,
        }
    )
    run = bench(spec)
    rows = {row["method"]: row for row in run.read_json("bench.json")["rows"]}
    assert [rows[name]["identical"] for name in ("alone", "vllm", "ours")] == [1.0] * 3
    assert rows["alone"]["tau"] is None
    assert rows["alone"]["tokens_per_second"] > 0
    lines = map(json.loads, (run.folder / MEASUREMENTS).read_text().splitlines())
    measured = [line for line in lines if line["method"] == "vllm"]
    assert len(measured) == len(TEXTS)
    texts = answers_of(server, tmp_path)
    rounds, accepted = counted(server.target, server.exported, texts)
    assert sum(line["rounds"] for line in measured) == rounds
    assert rows["vllm"]["tau"] == pytest.approx(1 + sum(accepted) / rounds)
    reached = [rounds, *accepted]
    expected = [b / a for a, b in pairwise(reached) if b]
    assert rows["vllm"]["acceptance"] == pytest.approx(expected)
    assert rows["vllm"]["tau"] == pytest.approx(rows["ours"]["tau"], rel=0.25)  # nearly the same


def answers_of(server: ApiServer, folder: Path) -> list[tuple[list[int], list[int]]]:
    """The prompts of the benchmark, and what transformers generates up to an end token."""
    from kdcore.data.conversation import Conversation, Message
    from kdcore.data.templates.mask import prompt_ids

    found = []
    for text in TEXTS:
        prompt = prompt_ids(Conversation(text, (Message("user", text),)), server.target.tokenizer)
        new = continued(server.target, prompt, NEW)
        ends = [place for place, token in enumerate(new) if token == 2]
        found.append((prompt, new[: ends[0] + 1] if ends else new))
    return found


def test_generated_data_is_the_models_own(server: ApiServer, tmp_path: Path) -> None:
    texts = []
    for name, teacher in (("far", server.endpoint), ("near", {"model": server.target.name})):
        spec = GenerateDataSpec.model_validate(
            {
                "job": "generate-data",
                "run": str(tmp_path / name),
                "teacher": teacher,
                "source": chats_in(tmp_path, ROWS),
                "responses": {"max_new_tokens": 16},
            }
        )
        lines = generate_data(spec).path(FILE).read_text().splitlines()
        texts.append(
            {
                row["id"]: [(m["role"], m["content"].rstrip(HALF)) for m in row["messages"]]
                for row in map(json.loads, lines)
            }
        )
    far, near = texts
    assert len(far) > len(TEXTS) // 2  # an endpoint leaves out what decodes to no text
    assert far == {name: near[name] for name in far}


def test_a_cache_and_a_served_teacher_teach_the_same(
    server: ApiServer, student: Path, tmp_path: Path
) -> None:
    plain = spec_of(tmp_path / "far", student)
    endpoint = EndpointSpec.model_validate(server.endpoint)
    far = build_cache(plain, tmp_path / "far-cache", endpoint=endpoint, k=K)
    teacher = {"model": server.target.name}
    near = build_cache(
        spec_of(tmp_path / "near", student, teacher=teacher), tmp_path / "near-cache", k=K
    )
    assert (far.rows, far.positions) == (near.rows, near.positions)
    keys = list(near._places.keys)
    found, expected = (each.logits(keys, torch.device("cpu")) for each in (far, near))
    assert torch.equal(found.ids.sort(-1).values, expected.ids.sort(-1).values)
    assert torch.allclose(found.logp.abs(), expected.logp.abs(), atol=1e-2)
    with pytest.raises(UserError, match="does not return the log-probs of 32 tokens") as wrong:
        build_cache(plain, tmp_path / "wide", endpoint=endpoint, k=32)
    assert wrong.value.cure.startswith("lower --k to 20, or let the server return more (vLLM: ")

    data = {"teacher_cache": str(tmp_path / "far-cache")}
    cached = distill(spec_of(tmp_path / "far", student, data=data))
    live = distill(spec_of(tmp_path / "live", student, teacher={**server.endpoint, "k": K}))
    assert logged(live) == pytest.approx(logged(cached), rel=1e-3)  # vLLM's batches round otherwise
    assert logged(live)[-1] < logged(live)[0]


def test_a_served_teacher_in_a_mixture_is_the_cache_from_its_server(
    server: ApiServer, student: Path, tmp_path: Path
) -> None:
    """Beside a teacher on this machine; some rows name one of the two, the others have both."""
    rows = [
        row | ({"teacher": name} if name else {})
        for row, name in zip(ROWS, ("far", "near", "", "far", ""), strict=True)
    ]
    endpoint = EndpointSpec.model_validate(server.endpoint)
    build_cache(spec_of(tmp_path / "plain", student), tmp_path / "cache", endpoint=endpoint, k=K)
    near = {"model": str(saved(tiny_model(seed=2), tmp_path / "near"))}

    def trained(name: str, far: dict[str, Any]) -> list[float]:
        teachers = {"far": far, "near": near}
        return logged(distill(distill_spec(tmp_path / name, student, rows=rows, teachers=teachers)))

    served = trained("served", {**server.endpoint, "k": K})
    assert served == pytest.approx(trained("cached", {"cache": str(tmp_path / "cache")}), rel=1e-3)
    assert served != pytest.approx(trained("near", near), rel=1e-3)


def test_a_served_teacher_scores_the_students_own_responses(
    server: ApiServer, student: Path, tmp_path: Path
) -> None:
    """As a teacher on this machine whose other classes are lumped together, nearly."""
    sampled = {"on_policy": {"probability": 1.0, "max_new_tokens": 6}}
    far = distill(
        spec_of(tmp_path / "far", student, teacher={**server.endpoint, "k": 20}, data=sampled)
    )
    near = distill(
        spec_of(tmp_path / "near", student, teacher={"model": server.target.name}, data=sampled)
    )
    assert logged(far)[0] == pytest.approx(logged(near)[0], rel=0.05)


def test_another_template_is_refused(server: ApiServer, student: Path, tmp_path: Path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text(CHATML.replace("You are helpful", "You are careful"))
    spec = spec_of(
        tmp_path / "run",
        student,
        teacher=server.endpoint,
        student={"template": str(template)},
    )
    with pytest.raises(UserError, match="renders chats by another template"):
        distill(spec)


@pytest.mark.parametrize(
    "student", [{}, {"lora": {"r": 4, "alpha": 16.0}}], ids=["whole", "adapters"]
)
def test_a_server_samples_what_the_student_would(
    student: dict[str, Any], sampler: ApiServer, tmp_path: Path
) -> None:
    """Greedily, while its weights change; with its first weights it would sample otherwise."""
    teacher = str(saved(tiny_model(seed=1), tmp_path / "teacher"))

    def trained(name: str, server: Any) -> Any:
        policy = {"probability": 1.0, "max_new_tokens": 12, "temperature": 0.0, "sampler": server}
        return distill(
            spec_of(
                tmp_path / name,
                sampler.target.name,
                teacher={"model": teacher},
                student=student,
                data={"on_policy": policy},
                training={"steps": STEPS, "learning_rate": 0.01},
            )
        )

    here, there = trained("here", None), trained("there", sampler.endpoint)
    assert logged(there) == pytest.approx(logged(here), rel=1e-3)
    stale = trained("stale", {**sampler.endpoint, "staleness": STEPS})
    assert logged(stale) != pytest.approx(logged(here), rel=1e-3)


def test_a_sampler_of_another_model_is_refused(
    sampler: ApiServer, student: Path, tmp_path: Path
) -> None:
    spec = spec_of(
        tmp_path,
        student,
        teacher={"model": sampler.target.name},
        student={"lora": {"r": 4}},
        data={"on_policy": {"probability": 1.0, "sampler": sampler.endpoint}},
    )
    with pytest.raises(UserError, match="runs another model than the student"):
        distill(spec)
