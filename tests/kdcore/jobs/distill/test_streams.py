"""Streams without an end: read during the training, by whoever reads them, and read on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from kdcore.data.batching.batches import Batches
from kdcore.data.conversation import Conversation
from kdcore.data.encoded import stream_windows
from kdcore.data.encoded.streamed_rows import StreamedRows
from kdcore.data.rows import RowDataset
from kdcore.errors import UserError
from kdcore.jobs.caches.build import build_cache
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.jobs.train_drafter import train_drafter
from kdcore.method.records import Row
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.training import TrainingSpec
from kdcore.specs.train_drafter import TrainDrafterSpec
from kdcore_baselines.sources.hub import streams
from tests.fixtures.interrupted import interrupted_after
from tests.fixtures.json_lines import write_lines
from tests.fixtures.processes.forked import in_two_processes
from tests.fixtures.processes.two_processes import run
from tests.plugins.sources.test_hub_datasets import source
from tests.tiny.distill_specs import chat, logged
from tests.tiny.tiny_chat_models import saved, tiny_model

CHATS = [chat(n) for n in range(11)]


class Counted:
    """A source whose stream has the numbers 0 to 9, and tells each that is read."""

    def __init__(self) -> None:
        self.read_numbers: list[int] = []

    def stream(self) -> Numbers:
        return Numbers(self)

    def read(self) -> Sequence[Any]:
        raise UserError("a stream", "")

    def encode(self, example: Any, tokenizer: Any, max_length: int) -> Row:
        inputs = {"x": torch.tensor([example.number])}
        return Row(inputs, torch.tensor([example.number]), torch.tensor([example.number != 3]), "")


class Numbers:
    window = 4

    def __init__(self, told: Counted) -> None:
        self._told, self._place = told, 0

    def __iter__(self) -> Iterator[Any]:
        while self._place < 10:
            self._place += 1
            self._told.read_numbers.append(self._place - 1)
            yield Number(self._place - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self._place}

    def load_state_dict(self, state: Any) -> None:
        self._place = state["place"]


class Number:
    def __init__(self, number: int) -> None:
        self.number, self.id = number, str(number)

    def __repr__(self) -> str:
        return self.id


def rows_of(folder: Path, source: Any, count: int = 24) -> StreamedRows:
    return StreamedRows(
        source, None, 8, count=count, window=4, first=[], folder=folder, writes=True
    )


def batches(folder: Path, source: Any, **training: Any) -> Batches:
    asked, rows = TrainingSpec.model_validate(training), RowDataset(rows_of(folder, source))
    return Batches.of(asked, rows, {}, seed=3, capacity=8, processes=1)


def indices(made: Batches, workers: int = 0) -> tuple[list[int], list[int]]:
    """The indices of the rows that a loader gives, and the numbers of the stream."""
    loader = DataLoader(
        made.items, 3, sampler=made.order, collate_fn=made.collate, num_workers=workers
    )
    found = [(batch["index"], batch["x"][:, 0]) for batch in loader]
    places, numbers = (torch.cat(each).tolist() for each in zip(*found, strict=True))
    return places, numbers


def test_a_stream_is_shuffled_in_windows_and_begins_again(tmp_path: Path) -> None:
    source = Counted()
    places, numbers = indices(batches(tmp_path, source))
    assert numbers == [place % 10 for place in places]
    without_label = {3, 13, 23}
    assert sorted(places) == [each for each in range(24) if each not in without_label]
    windows = [place // 4 for place in places]
    assert windows == sorted(windows) and places != sorted(places)
    assert source.read_numbers == [place % 10 for place in range(24)], "each is read once"
    straight = batches(tmp_path / "s", source, trainer={"train_sampling_strategy": "sequential"})
    assert indices(straight)[0] == sorted(places)


def test_workers_give_the_batches_of_one_process(tmp_path: Path) -> None:
    made = batches(tmp_path / "one", Counted())
    expected = indices(made)
    assert indices(made, workers=2) == expected, "after it has read the stream itself"
    assert indices(batches(tmp_path / "two", Counted()), workers=2) == expected
    lines = (tmp_path / "two/windows.jsonl").read_text().splitlines()
    assert [json.loads(line)[0] for line in lines] == list(range(6)), "one of them writes"


def test_rows_are_read_on_from_the_window_that_is_asked_for(tmp_path: Path) -> None:
    first = rows_of(tmp_path, Counted())
    expected = [int(row.inputs["x"]) for row in first]
    with (tmp_path / "windows.jsonl").open("a") as file:
        file.write("[6, {")  # of a killed process
    assert int(rows_of(tmp_path, Counted(), 32)[28].inputs["x"]) == 8, "which is written on"
    source = Counted()
    again = rows_of(tmp_path, source)
    assert int(again[18].inputs["x"]) == expected[18] and len(source.read_numbers) == 4
    assert int(again[5].inputs["x"]) == expected[5], "and back"
    assert [int(row.inputs["x"]) for row in again] == expected


def test_a_stream_that_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(list(rows_of(tmp_path, Counted()))) == 24
    monkeypatch.setattr(Number, "__repr__", lambda self: f"another {self.id}")
    with pytest.raises(
        UserError, match=r"the stream of data\.train changed since .*: 8 is not what"
    ):
        rows_of(tmp_path, Counted())[9]


def test_a_stream_without_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Numbers, "__iter__", lambda self: iter(()))
    with pytest.raises(UserError, match=r"data\.train has no rows"):
        rows_of(tmp_path, Counted())[0]


@pytest.mark.parametrize("format", ["jsonl", "parquet", "saved"])
def test_conversations_are_read_on_from_any_place(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    path = tmp_path / f"rows.{format}"
    if format == "jsonl":
        write_lines(path, CHATS)
    elif format == "parquet":
        Dataset.from_list(CHATS).to_parquet(path)
    else:
        Dataset.from_list(CHATS).save_to_disk(path)
    monkeypatch.setattr(streams, "BATCH", 4)
    stream = source("dataset", path=path, streaming=True).stream()
    whole = list[Conversation]()
    states = [stream.state_dict()]
    for each in stream:
        whole.append(each)
        states.append(json.loads(json.dumps(stream.state_dict())))
    assert [each.id for each in whole] == [f"rows.{format}:{n + 1}" for n in range(11)]
    assert [each.messages[0].content for each in whole] == [row["prompt"] for row in CHATS]
    for place in (7, 0, 4, 10):
        stream.load_state_dict(states[place])
        assert list(stream) == whole[place:]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("asked")
    write_lines(folder / "rows.jsonl", CHATS)
    path = str(folder / "rows.jsonl")
    return {
        "job": "distill",
        "student": {"model": str(saved(tiny_model(), folder / "student"))},
        "data": {
            "train": {"name": "dataset", "path": path, "streaming": True, "shuffle_buffer": 6},
            "max_length": 64,
        },
        "method": {"terms": {"task": 1, "kd": 0}},
        "training": {"batch_size": 4, "learning_rate": 1e-2, "steps": 5, "save_every": 2},
    }


def spec_of(asked: dict[str, Any], folder: Path, **changes: Any) -> DistillSpec:
    given = {name: {**asked[name], **more} for name, more in changes.items()}
    return DistillSpec.model_validate(asked | {"run": str(folder / "run")} | given)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path("model", "model.safetensors"))


@pytest.fixture(scope="module")
def unbroken(asked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return distill(spec_of(asked, tmp_path_factory.mktemp("unbroken")))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_reads_on_to_the_same_bits(
    asked: dict[str, Any],
    unbroken: Run,
    tmp_path: Path,
    workers: int,
) -> None:
    more = {"trainer": {"dataloader_num_workers": workers}}
    spec = spec_of(asked, tmp_path, training=more)

    with interrupted_after(3):
        distill(spec)
    ours, theirs = weights(distill(spec, resume=True)), weights(unbroken)
    assert all(torch.equal(ours[name], each) for name, each in theirs.items())


def test_two_processes_share_the_rows(asked: dict[str, Any], unbroken: Run, tmp_path: Path) -> None:
    """The loss of a step is that of one process with batches of twice the size."""
    spec = asked | {"run": str(tmp_path / "run")}
    spec["training"] = asked["training"] | {"batch_size": 2}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))  # JSON is YAML
    in_two_processes(tmp_path, run, ["distill", str(tmp_path / "spec.yaml")])
    assert logged(Run(tmp_path / "run")) == pytest.approx(logged(unbroken), rel=1e-4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_data_ends_the_training_in_one_line(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(stream_windows, "FIRST", 4)
    wrong = [*CHATS[:9], {"prompt": "", "response": 3}]
    path = tmp_path / "rows.jsonl"
    write_lines(path, wrong)
    data = {"train": asked["data"]["train"] | {"path": str(path)}}
    more = {"trainer": {"dataloader_num_workers": workers}}
    with pytest.raises(UserError, match=r"rows\.jsonl") as stopped:
        distill(spec_of(asked, tmp_path, data=data, training=more))
    assert stopped.value.field == "data.train"


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"training": {"steps": None}}, "the number of steps is not known"),
        ({"training": {"packing": True}}, "training.packing needs all rows"),
        ({"data": {"responses": {"by": "teacher"}}}, "data.responses.by needs all rows"),
    ],
)
def test_what_needs_all_rows_is_refused(
    asked: dict[str, Any], tmp_path: Path, changes: dict[str, Any], cause: str
) -> None:
    teacher = {"teacher": asked["student"]}
    with pytest.raises(UserError, match=f"data.train is a stream without an end, and {cause}"):
        preflight(spec_of(asked | teacher, tmp_path, **changes))


def test_other_readers_refuse_a_stream(asked: dict[str, Any], tmp_path: Path) -> None:
    held = {"heldout": asked["data"]["train"]}
    with pytest.raises(UserError, match="is a stream without an end, which only"):
        preflight(spec_of(asked, tmp_path, data=held))
    with pytest.raises(UserError, match="and a cache has all of its rows"):
        build_cache(spec_of(asked | {"teacher": asked["student"]}, tmp_path), tmp_path / "cache")


def test_a_row_may_be_as_long_as_data_max_length(asked: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_of(asked, tmp_path, data={"max_length": 513})
    for job in (preflight, distill):
        with pytest.raises(UserError, match="has 513 tokens, but the context of") as refused:
            job(spec)
    assert refused.value.field == "data.max_length"


def test_check_reads_the_first_rows(asked: dict[str, Any], tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps(CHATS[0]) + "\n")
    held = {"heldout": {"name": "chat", "path": str(heldout)}}
    report = preflight(spec_of(asked, tmp_path, data=held))
    assert report.train.streamed and report.train.rows == 11 and report.steps == 5
    (told,) = (each for each in report.warnings if "1 of 1 held-out rows are also" in each)
    assert told.endswith(": remove them"), "a stream cannot be split"


def test_a_drafter_reads_a_stream(asked: dict[str, Any], tmp_path: Path) -> None:
    spec = {
        "job": "train-drafter",
        "run": str(tmp_path / "run"),
        "target": asked["student"],
        "drafter": {"name": "fasteagle", "depth": 2},
        "data": asked["data"] | {"responses": {"by": "dataset"}},
        "training": {"batch_size": 4, "steps": 2},
    }
    made = train_drafter(TrainDrafterSpec.model_validate(spec))
    assert len(logged(made)) == 2
    spec["data"]["hidden_states"] = {}
    with pytest.raises(UserError, match=r"data\.hidden_states needs all rows"):
        train_drafter(TrainDrafterSpec.model_validate(spec | {"run": str(tmp_path / "other")}))
