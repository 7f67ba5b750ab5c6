"""From a spec to a drafter folder, and from the folder to a drafter that proposes."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcore.decoding.drafters.files import load_drafter
from kdcore.errors import Mistakes, UserError
from kdcore.evaluation.drafts import HeldOutDrafts
from kdcore.jobs.preflight.train_drafter import preflight_drafter
from kdcore.jobs.train_drafter import train_drafter
from kdcore.models.loading.load import load_model
from kdcore.reporting.page import report
from kdcore.runs.folder import Run
from kdcore.runs.progress import Silent
from kdcore.specs.parts.fields import ModelSpec
from kdcore.specs.train_drafter import TrainDrafterSpec
from kdcore.training.trainer import checkpoint as checkpoint_state
from tests.fixtures.json_lines import write_lines
from tests.fixtures.processes.forked import KDCORE, Begun
from tests.tiny.distill_specs import CHATS
from tests.tiny.toy_drafter import registry

REGISTRY = registry()


class Notes(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


def spec_of(folder: Path, target: Path, **changes: Any) -> TrainDrafterSpec:
    path = folder / "rows.jsonl"
    write_lines(path, CHATS)
    source = {"name": "chat", "path": path}
    asked: dict[str, Any] = {
        "job": "train-drafter",
        "run": folder / "run",
        "target": {"model": str(target)},
        "drafter": {"name": "matrices", "vocabulary": 40},
        "data": {
            "train": source,
            "heldout": {**source, "limit": 4},
            "responses": {"max_new_tokens": 12},
        },
        "training": {"batch_size": 4, "epochs": 24, "learning_rate": 3e-2, "save_every": 6},
    }
    return TrainDrafterSpec.model_validate(asked | changes, context={"registry": REGISTRY})


def test_a_run_leaves_a_drafter_that_learned_and_proposes(tmp_path: Path, target: Path) -> None:
    run = train_drafter(spec_of(tmp_path, target), registry=REGISTRY)
    results = run.read_json("results.json")
    assert results["after"]["level_1"] > results["before"]["level_1"] + 0.1
    assert results["after"]["tau"] > results["before"]["tau"]
    steps = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    assert steps[-2]["term/kd"] < steps[0]["term/kd"] / 2
    assert "acceptance/discount" in steps[0]

    loaded = load_model(ModelSpec.model_validate({"model": str(target)}))
    drafter: Any = load_drafter(run.path("drafter"), loaded, REGISTRY)
    assert (drafter.depth, len(drafter.vocabulary), drafter.training) == (3, 40, False)
    stored = load_file(run.path("drafter", "drafter.safetensors"))
    assert set(stored) == set(drafter.state_dict())
    assert "matrices" in run.path("drafter", "README.md").read_text()
    (replay,) = json.loads(run.path("replay.json").read_text())
    assert replay["method"] == "matrices" and "the mat of 0?" in replay["prompt"]
    assert any(node["accepted"] for one in replay["rounds"] for node in one["nodes"])
    assert "tokens per verification" in report([run.folder])


def test_of_two_that_begin_at_once_one_goes_on_and_the_other_is_refused(
    tmp_path: Path, target: Path
) -> None:
    """The one that holds the folder waits for its rows until the other has ended."""
    os.mkfifo(tmp_path / "rows.jsonl")
    spec = {
        "job": "train-drafter",
        "run": str(tmp_path / "run"),
        "target": {"model": str(target)},
        "drafter": {"name": "medusa", "depth": 1},
        "data": {"train": {"name": "chat", "path": str(tmp_path / "rows.jsonl")}},
        "training": {"steps": 1},
    }
    (tmp_path / "drafter.yaml").write_text(json.dumps(spec))
    both = [Begun("-c", KDCORE, "train-drafter", tmp_path / "drafter.yaml") for _ in range(2)]
    ended = wait([each.process.sentinel for each in both])
    both.sort(key=lambda each: each.process.sentinel not in ended)
    write_to_reader(
        tmp_path / "rows.jsonl",
        json.dumps({"prompt": "the mat?", "response": "the teacher sat"}),
        both[1].process.sentinel,
    )
    refused, done = (each.ended() for each in both)
    assert (refused.returncode, refused.stderr) == (
        2,
        f"error: another process is writing {tmp_path / 'run'}\n"
        "  fix: wait until it ends, or choose another run folder (--out)\n",
    )
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / "run").read_json("run.json")["status"] == "done"
    assert (tmp_path / "run" / "drafter" / "drafter.safetensors").exists()


def write_to_reader(pipe: Path, line: str, sentinel: int) -> None:
    """Write a line into a named pipe as soon as a process reads it, if the process lives on."""
    while not wait([sentinel], timeout=0.05):
        with suppress(OSError):  # nobody reads it yet
            place = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            os.write(place, f"{line}\n".encode())
            os.close(place)
            return


def choosing(folder: Path, target: Path, **data: Any) -> TrainDrafterSpec:
    spec = spec_of(folder, target)
    source = {"name": "chat", "path": folder / "rows.jsonl"}
    asked = spec.model_dump(mode="json")["data"] | {
        "train": source,
        "heldout": source | {"limit": 4},
    }
    training = {"batch_size": 4, "epochs": 4, "learning_rate": 3e-2, "eval_every": 2}
    return spec_of(folder, target, data=asked | data, training=training)


def test_the_best_is_chosen_on_validation_rows_and_reported_on_others(
    tmp_path: Path, target: Path
) -> None:
    others = tmp_path / "others.jsonl"
    asked = [{"prompt": f"the teacher of {n}?", "response": f"the mat {n}"} for n in range(3)]
    write_lines(others, asked)
    notes = Notes()
    spec = choosing(tmp_path, target, validation={"name": "chat", "path": others})
    run = train_drafter(spec, registry=REGISTRY, progress=notes)
    results = run.read_json("results.json")
    assert results["kept_by"] == "tau on data.validation"
    assert results["kept_by_these_rows"] is False
    assert not any("which makes its figures optimistic" in line for line in notes.lines)
    assert "the best checkpoint by tau on data.validation" in run.path("README.md").read_text()
    steps = [json.loads(line) for line in run.path("metrics.jsonl").read_text().splitlines()]
    tried = [step["eval_tau"] for step in steps if "eval_tau" in step]
    kept = checkpoint_state.read(run.path("best.safetensors"))[1]
    assert kept["figures"]["tau"] >= max(tried)
    rows = json.loads(run.path("heldout_rows.json").read_text())
    assert len(rows["after"]["lengths"]) == len(rows["before"]["lengths"]) == 4
    assert len(kept["rows"]["lengths"]) == 3


def test_a_drafter_is_saved_before_it_is_judged(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> Any:
        raise MemoryError("while it is measured")

    spec = spec_of(tmp_path, target)
    spec = spec.model_copy(
        update={"evaluation": spec.evaluation.model_copy(update={"before": False})}
    )
    monkeypatch.setattr(HeldOutDrafts, "measure", fails)
    with pytest.raises(MemoryError):
        train_drafter(spec, registry=REGISTRY)
    assert (tmp_path / "run" / "drafter" / "drafter.safetensors").exists()


def test_choosing_on_the_reported_rows_is_told(tmp_path: Path, target: Path) -> None:
    notes = Notes()
    run = train_drafter(choosing(tmp_path, target), registry=REGISTRY, progress=notes)
    results = run.read_json("results.json")
    assert results["kept_by"] == "tau on data.heldout, the rows that are reported"
    assert results["kept_by_these_rows"] is True
    assert any("set data.validation to other rows" in line for line in notes.lines)
    assert "the rows that are reported" in run.path("README.md").read_text()


def test_validation_rows_are_other_rows_that_choose(tmp_path: Path, target: Path) -> None:
    same = {"name": "chat", "path": tmp_path / "rows.jsonl", "limit": 4}
    twice = r"data\.validation uses the same rows as data\.heldout: choose different rows"
    with pytest.raises(ValueError, match=twice):
        choosing(tmp_path, target, validation=same)
    plain = spec_of(tmp_path, target).model_dump(mode="json")["data"]
    with pytest.raises(ValueError, match="set training"):
        spec_of(tmp_path, target, data=plain | {"validation": same})


def test_a_gate_a_splitter_a_policy_and_the_features_take_part(
    tmp_path: Path, target: Path
) -> None:
    method = {
        "gates": ["discount", {"name": "speckd", "k": 3}],
        "splitters": [{"name": "by_position", "positions": 3}],
        "momentum": {"name": "per_term", "overrides": {"kd_1": 0.5}},
        "terms": {"feature": 0.1},
        "normalize": "sequence",
    }
    training = {"optimizer": "sgd", "momentum": 0.0, "clip": 0.0, "steps": 2}
    training |= {"probe_every": 1, "probe_batches": 2, "probe_layers": True}
    training |= {"learning_rate": 1e-2, "schedule": "multi_step", "milestones": [0.5], "warmup": 0}
    run = train_drafter(
        spec_of(tmp_path, target, method=method, training=training), registry=REGISTRY
    )
    first, last = map(json.loads, run.path("metrics.jsonl").read_text().splitlines()[:2])
    assert [first["learning_rate"], last["learning_rate"]] == pytest.approx([1e-2, 1e-3])
    assert any(name.startswith("gsnr_layer/kd_1/") for name in first)
    assert {"term/kd_1", "term/kd_3", "term/feature", "acceptance/speckd"} <= first.keys()
    assert {"gsnr/kd_1", "gsnr/kd_3", "gsnr/feature", "momentum_norm/kd_1"} <= first.keys()


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, target: Path) -> None:
    short = {"batch_size": 4, "epochs": 5, "learning_rate": 3e-2, "save_every": 6}
    asked = spec_of(tmp_path, target, run=tmp_path / "whole", training=short)
    whole = train_drafter(asked, registry=REGISTRY)
    spec = spec_of(tmp_path, target, training=short)

    class Stop(BaseException):
        """No Exception: a run goes on when a plugin raises one."""

    def stop(run: Run, step: int, metrics: Any) -> None:
        if run.folder.name == "run" and step == 9:
            raise Stop

    REGISTRY.hooks.register(stopper := _hooks(stop))
    try:
        with pytest.raises(Stop):
            train_drafter(spec, registry=REGISTRY)
    finally:
        REGISTRY.hooks.unregister(stopper)
    resumed = train_drafter(spec, registry=REGISTRY, resume=True)
    weights = [load_file(run.path("drafter", "drafter.safetensors")) for run in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert whole.read_json("results.json") == resumed.read_json("results.json")


def test_stored_hidden_states_train_the_same_drafter(tmp_path: Path, target: Path) -> None:
    made = {}
    for dtype in (None, "float32", "bfloat16"):
        spec = spec_of(tmp_path, target, run=tmp_path / str(dtype), training={"steps": 6})
        data = spec.data.model_dump() | {"hidden_states": dtype and {"dtype": dtype}}
        spec = spec_of(tmp_path, target, run=spec.run, training={"steps": 6}, data=data)
        run = train_drafter(spec, registry=REGISTRY)
        made[dtype] = load_file(run.path("drafter", "drafter.safetensors"))
    for name, weight in made[None].items():
        assert torch.allclose(weight.double(), made["float32"][name].double(), atol=1e-4)
        assert torch.allclose(weight.double(), made["bfloat16"][name].double(), atol=3e-2)
    assert run.path("hidden_states", "shard-00000.safetensors").exists()
    stored = {"folder": str(run.path("hidden_states")), "dtype": "float32"}
    for dtype, other in (("bfloat16", False), ("float32", True)):
        data["hidden_states"] = stored | {"dtype": dtype}
        asked = spec_of(tmp_path, target, data=data, run=tmp_path / "other")
        if other:
            with pytest.raises(UserError, match="hidden states with a different dtype") as found:
                preflight_drafter(asked, registry=REGISTRY)
            assert isinstance(found.value, Mistakes)
            assert found.value.found[0].field == "data.hidden_states"
        else:
            assert preflight_drafter(asked, registry=REGISTRY).disk


def test_hidden_states_of_a_run_s_own_go_with_it(tmp_path: Path, target: Path) -> None:
    """A check before the first run finds no folder, and one before --overwrite other states."""
    data = spec_of(tmp_path, target).data.model_dump() | {"hidden_states": {}}
    for drafter in ({"name": "medusa", "depth": 2}, {"name": "fasteagle", "depth": 2}):
        spec = spec_of(tmp_path, target, data=data, drafter=drafter, training={"steps": 1})
        assert preflight_drafter(spec, registry=REGISTRY).disk
        run = train_drafter(spec, registry=REGISTRY, overwrite=True)
        assert run.path("hidden_states", "shard-00000.safetensors").exists()


def test_hidden_states_beyond_the_limit_are_refused(tmp_path: Path, target: Path) -> None:
    spec = spec_of(tmp_path, target)
    data = spec.data.model_dump() | {"hidden_states": {"limit_gb": 1e-5}}
    with pytest.raises(UserError, match=r"the limit is 0\.00 GB"):
        train_drafter(spec_of(tmp_path, target, data=data), registry=REGISTRY)
    found = preflight_drafter(spec_of(tmp_path, target, data=data), registry=REGISTRY)
    assert found.disk["hidden states"] > 1e4, "at most: the answers are yet to come"
    data["responses"] = {"by": "dataset"}
    with pytest.raises(UserError, match=r"the limit is 0\.00 GB"):
        preflight_drafter(spec_of(tmp_path, target, data=data), registry=REGISTRY)


def test_rows_of_a_classifier_are_refused(tmp_path: Path, target: Path) -> None:
    asked = spec_of(tmp_path, target)
    asked = spec_of(tmp_path, target, data=asked.data.model_dump() | {"train": {"name": "digits"}})
    refused = r"data\.train: source 'digits' provides rows for a classifier, and a drafter learns"
    for job in (train_drafter, preflight_drafter):
        with pytest.raises(UserError, match=refused):
            job(asked, registry=REGISTRY)


@pytest.mark.parametrize("layer", [{"heads": 3, "key_heads": 2}, {"head": 3}])
def test_heads_that_make_no_layer_are_refused(
    tmp_path: Path, target: Path, layer: dict[str, int]
) -> None:
    asked = spec_of(tmp_path, target, drafter={"name": "eagle3", "layer": layer})
    for job in (train_drafter, preflight_drafter):
        with pytest.raises(UserError, match="a drafter's layer cannot have"):
            job(asked, registry=REGISTRY)


def test_a_layer_that_is_used_at_each_depth_is_counted_as_often(
    tmp_path: Path, target: Path
) -> None:
    seconds = [
        preflight_drafter(
            spec_of(tmp_path, target, drafter={"name": name, "depth": depth}),
            registry=REGISTRY,
        ).seconds["training"]
        for name in ("eagle3", "fasteagle")
        for depth in (1, 8)
    ]
    once, often, shallow, deep = seconds
    assert often > 3 * once and deep > 3 * shallow


def test_a_drafter_without_weights_is_refused(tmp_path: Path, target: Path) -> None:
    with pytest.raises(UserError, match="'ngram' is not trainable"):
        train_drafter(spec_of(tmp_path, target, drafter="ngram"), registry=REGISTRY)


def test_a_gate_that_asks_for_a_reference_is_refused(tmp_path: Path, target: Path) -> None:
    method = {"gates": [{"name": "adaspec", "reference": str(target)}]}
    for job in (train_drafter, preflight_drafter):
        with pytest.raises(UserError, match="a drafter does not support"):
            job(spec_of(tmp_path, target, method=method), registry=REGISTRY)


def _hooks(step_done: Any) -> Any:
    from kdcore.components.hookspecs import hookimpl

    class Hooks:
        @hookimpl
        def kdcore_step_done(self, run: Run, step: int, metrics: Any) -> None:
            step_done(run, step, metrics)

    return Hooks()


def test_the_preflight_says_what_is_trained_and_touches_nothing(
    tmp_path: Path, target: Path
) -> None:
    training = {"batch_size": 4, "epochs": 24, "probe_every": 6}
    found = preflight_drafter(spec_of(tmp_path, target, training=training), registry=REGISTRY)
    assert {who: facts.layers for who, facts in found.models.items()} == {"target": 4, "drafter": 3}
    assert (found.classes, found.terms, found.steps) == (40, {"kd": 1.0}, 72)
    assert found.train.generated == 9 and found.heldout and found.heldout.generated == 4
    assert all(size > 0 for name, size in found.memory.items() if name != "momentum policy")
    assert found.seconds.pop("hidden states") == 0
    assert all(seconds > 0 for seconds in found.seconds.values())
    asked = spec_of(tmp_path, target, training=training).model_dump(mode="json")
    asked["data"]["hidden_states"] = {}
    stored = TrainDrafterSpec.model_validate(asked, context={"registry": REGISTRY})
    apart = preflight_drafter(stored, registry=REGISTRY).seconds
    assert apart["hidden states"] > 0 and apart["training"] < found.seconds["training"]
    assert not (tmp_path / "run").exists()
    streams = {"splitters": ["target_split"], "momentum": "deepkd"}
    apart = preflight_drafter(
        spec_of(tmp_path, target, training=training | OWN_MOMENTUM, method=streams),
        registry=REGISTRY,
    )
    assert apart.memory["gradients"] == (len(apart.streams) + 1) * found.memory["gradients"]


OWN_MOMENTUM = {"optimizer": "sgd", "momentum": 0.0, "clip": 0.0}


def test_the_preflight_refuses_what_the_run_would(tmp_path: Path, target: Path) -> None:
    with pytest.raises(UserError, match="'ngram' is not trainable"):
        preflight_drafter(spec_of(tmp_path, target, drafter="ngram"), registry=REGISTRY)
