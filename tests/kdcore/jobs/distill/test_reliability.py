"""What goes wrong around a run: kills inside a write, plugins that raise; and equal seeds."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kdcore.components.hookspecs import hookimpl
from kdcore.components.registry import Registry, installed
from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.training.arguments import training_arguments
from kdcore.training.trainer import checkpoint as checkpoint_state
from kdcore.training.trainer.checkpointing import remove_oldest
from tests.fixtures.interrupted import interrupted_after
from tests.fixtures.json_lines import write_lines
from tests.fixtures.processes.forked import python
from tests.tiny.distill_specs import CHATS
from tests.tiny.tiny_chat_models import saved, tiny_model


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("asked")
    write_lines(folder / "rows.jsonl", CHATS)
    return {
        "job": "distill",
        "teacher": {"model": str(saved(tiny_model(), folder / "teacher"))},
        "student": {"layers": [0, 2]},
        "data": {"train": {"name": "chat", "path": str(folder / "rows.jsonl")}},
        "training": {"batch_size": 4, "learning_rate": 1e-2, "steps": 5, "save_every": 2},
    }


def spec_of(asked: dict[str, Any], run: Path, **changes: Any) -> DistillSpec:
    return DistillSpec.model_validate(asked | {"run": str(run)} | changes)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path("model", "model.safetensors"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.fixture(scope="module")
def unbroken(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return weights(distill(spec_of(asked, tmp_path_factory.mktemp("unbroken") / "run")))


KILLED = """
import importlib, json, os, signal, sys
from kdcore.jobs.distill import distill
from kdcore.specs.distill import DistillSpec

def run_and_die(asked, module, inside, name, which):
    owner = importlib.import_module(module)
    owner = getattr(owner, inside) if inside else owner
    write, calls = getattr(owner, name), []
    def torn(*given, **more):
        write(*given, **more)
        calls.append(given)
        if len(calls) == which:
            (path,) = (each for each in given if isinstance(each, (str, os.PathLike)))
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, torn)
    distill(DistillSpec.model_validate(asked))

run_and_die(*json.loads(sys.argv[1]))
sys.exit("nothing killed it")
"""

PLACES: dict[str, tuple[tuple[str, str | None, str, int], int | None]] = {
    "the weights": (("transformers.modeling_utils", None, "safe_save_file", 2), 2),
    "the optimizer, first of all": (
        ("kdcore.training.trainer.checkpoint", None, "save_file", 1),
        None,
    ),
    "the second optimizer": (("kdcore.training.trainer.checkpoint", None, "save_file", 4), 2),
    "the second generators": (("kdcore.training.trainer.checkpoint", None, "save_file", 6), 2),
    "what says that it is whole": (("transformers", "TrainerState", "save_to_json", 2), 2),
    "the student, after the last step": (
        ("transformers.modeling_utils", None, "safe_save_file", 4),
        5,
    ),
}
"""What is being written -> the function that a run is killed in, and at which call; the step of
the checkpoint that is whole then."""


@pytest.fixture(scope="module")
def killed(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a run for each place, killed there; each test goes on with its own."""
    folder = tmp_path_factory.mktemp("killed")
    runs = {what: folder / str(number) for number, what in enumerate(PLACES)}
    for what, (place, _) in PLACES.items():
        done = python("-c", KILLED, json.dumps([asked | {"run": str(runs[what])}, *place]))
        assert done.returncode == -signal.SIGKILL, done.stderr
    return runs


@pytest.mark.parametrize("what", PLACES)
def test_a_run_killed_inside_a_write_goes_on_to_the_same_bits(
    asked: dict[str, Any], unbroken: Any, killed: dict[str, Path], what: str
) -> None:
    run, kept = killed[what], PLACES[what][1]
    found = Run(run).checkpoint()
    assert (found and found.name) == (kept and f"checkpoint-{kept}")
    assert same(weights(distill(spec_of(asked, run), resume=True)), unbroken)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [1, 2, 3, 4, 5]


def test_a_full_disk_names_the_checkpoint(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(SafetensorError) as raised:
        distill(spec_of(asked, tmp_path / "run"))
    assert vars(raised.value)["filename"] == str(tmp_path / "run/checkpoint-2")


def test_the_newest_checkpoint_stays_when_the_clock_goes_back(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is older than the one before it, by the time of its folder."""

    def changed_at(path: str | Path, of: Any = os.path.getmtime) -> float:
        name, _, number = Path(path).name.partition("-")
        return -float(number) if name == "checkpoint" else of(path)

    monkeypatch.setattr(os.path, "getmtime", changed_at)
    training = asked["training"] | {"save_every": 1, "keep": 1}
    run = distill(spec_of(asked, tmp_path / "run", training=training))
    assert [path.name for path in run.folder.glob("checkpoint-*")] == ["checkpoint-5"]


def test_the_remains_of_a_later_checkpoint_do_not_outlive_the_newest(tmp_path: Path) -> None:
    mine = {"checkpoint-9-mine", "checkpoint-old"}
    for name in ("checkpoint-2", "checkpoint-3", "checkpoint-10", *mine):
        (tmp_path / name).mkdir()
    remove_oldest(tmp_path, step=3, limit=2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-3", *mine}
    remove_oldest(tmp_path, step=3, limit=1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-3", *mine}


def test_a_torn_file_never_takes_the_place_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.safetensors"
    checkpoint_state.write(path, {"a": torch.ones(3)}, 1)

    def torn(tensors: Any, beside: Path, metadata: Any) -> None:
        beside.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint_state, "save_file", torn)
    with pytest.raises(OSError, match="no space"):
        checkpoint_state.write(path, {"a": torch.zeros(3)}, 2)
    tensors, plain = checkpoint_state.read(path)
    assert plain == 1 and torch.equal(tensors["a"], torch.ones(3))


class Guest:
    """A plugin whose hooks all raise, and one that only listens."""

    def __init__(self, faulty: bool) -> None:
        self.faulty = faulty
        self.told: list[str] = []

    def _heard(self, hook: str) -> None:
        self.told.append(hook)
        if self.faulty:
            raise RuntimeError(f"no {hook} for me")

    @hookimpl
    def kdcore_run_started(self, run: Run) -> None:
        self._heard("started")

    @hookimpl
    def kdcore_step_done(self, run: Run, step: int, metrics: Any) -> None:
        self._heard(f"step {step}")

    @hookimpl
    def kdcore_run_ended(self, run: Run, status: str) -> None:
        self._heard(status)


def test_a_plugin_that_raises_is_recorded_and_loses_nothing(
    tmp_path: Path, asked: dict[str, Any], unbroken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    guests, registry = (Guest(True), Guest(False)), _registry()
    for name, guest in zip(("faulty", "listener"), guests, strict=True):
        registry.hooks.register(guest, name)
    run = distill(spec_of(asked, tmp_path / "run"), registry=registry)
    assert same(weights(run), unbroken)
    told = ["started", *(f"step {step}" for step in range(1, 6)), "done"]
    assert [list(dict.fromkeys(guest.told)) for guest in guests] == [told, told]
    record = run.read_json("run.json")
    assert record["status"] == "done"
    assert record["plugin_faults"] == {
        "faulty: kdcore_run_started": "RuntimeError: no started for me",
        "faulty: kdcore_step_done": "RuntimeError: no step 1 for me",
        "faulty: kdcore_run_ended": "RuntimeError: no done for me",
    }
    monkeypatch.setenv("KDCORE_STRICT", "1")
    with pytest.raises(RuntimeError, match="for me"):
        distill(spec_of(asked, tmp_path / "strict"), registry=registry)


def _registry() -> Registry:
    registry, ours = Registry(), installed()
    for plugin in ours.plugins:
        module = ours.hooks.get_plugin(plugin.label)
        registry.register(module, plugin.name, plugin.distribution, plugin.version)
    return registry


def test_adapters_of_equal_seeds_are_equal(tmp_path: Path, asked: dict[str, Any]) -> None:
    student = {"layers": [0, 2], "lora": {"r": 2, "dropout": 0.2}}
    made = [
        distill(spec_of(asked, tmp_path / str(place), student=student, seed=seed))
        for place, seed in enumerate((5, 5, 6))
    ]
    first, again, other = (
        load_file(run.path("adapter", "adapter_model.safetensors")) for run in made
    )
    assert same(first, again) and not same(first, other)
    assert all(bool(value.any()) for value in first.values())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dataloader_num_workers": "two"}, 'must be an integer, not "two"'),
        ({"gradient_checkpointing": "yes"}, 'must be true or false, not "yes"'),
        ({"lr_scheduler_kwargs": 3}, "must be a mapping or a string, not 3"),
        ({"torch_compile": 1}, "must be true or false, not 1"),
    ],
)
def test_what_is_passed_on_to_the_trainer_is_of_its_type(
    tmp_path: Path, asked: dict[str, Any], given: dict[str, Any], said: str
) -> None:
    (name,) = given
    spec = spec_of(asked, tmp_path / "run", training={"trainer": given})
    with pytest.raises(UserError) as found:
        training_arguments(spec, Run(spec.run, planned=True))
    assert found.value.cause == f"training.trainer.{name} {said}"


def test_a_run_over_a_stream_goes_on_with_the_rows_that_it_has_read(
    asked: dict[str, Any], unbroken: Any, tmp_path: Path
) -> None:
    """Whatever the stream gives by then."""
    chat = Path(asked["data"]["train"]["path"])
    path = tmp_path / "rows.jsonl"
    path.write_text(chat.read_text())
    stream = {"name": "dataset", "path": str(path), "streaming": True, "limit": 9}
    spec = spec_of(asked, tmp_path / "run", data={"train": stream})

    with interrupted_after(3):
        distill(spec)
    path.write_text("".join(sorted(chat.read_text().splitlines(keepends=True), reverse=True)))
    assert same(weights(distill(spec, resume=True)), unbroken)
