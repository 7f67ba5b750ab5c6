"""The sources that read through Hugging Face datasets, offline: local data of every format."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from pydantic import TypeAdapter

from kdcore.components.choice import Choice, OfKind
from kdcore.components.registry import installed
from kdcore.data.conversation import Conversation
from kdcore.errors import UserError
from kdcore.jobs.starters.own_data import spec_of
from kdcore.models.assembly import Assembly
from kdcore.testing.source import SourceSuite
from kdcore_baselines.sources.components import DatasetParams
from kdcore_baselines.sources.hub.loading import refused_data

ROWS = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(4)]


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


class TestDataset(SourceSuite):
    name = "dataset"

    @pytest.fixture(autouse=True)
    def _data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
        params = MappingProxyType({"path": str(tmp_path / "rows.parquet")})
        monkeypatch.setattr(type(self), "params", params)


class TestLabelledDataset(SourceSuite):
    name = "labelled_dataset"

    @pytest.fixture(autouse=True)
    def _data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "rows.csv").write_text("text,label\none,b\ntwo,a\nthree,b\n")
        params = MappingProxyType({"path": str(tmp_path / "rows.csv")})
        monkeypatch.setattr(type(self), "params", params)


def source(name: str, **params: Any) -> Any:
    adapter = TypeAdapter(Annotated[Choice, OfKind("source")])
    given = {"name": name} | {n: str(v) if isinstance(v, Path) else v for n, v in params.items()}
    return Assembly(installed()).build(adapter.validate_python(given))


def read(path: Path | str, **params: Any) -> list[Conversation]:
    return list(source("dataset", path=path, **params).read())


def turns(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def _gzipped(rows: Dataset, path: Path) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _arrow(rows: Dataset, path: Path) -> None:
    rows.save_to_disk(path.parent / "saved")
    next((path.parent / "saved").glob("*.arrow")).rename(path)


WRITERS: dict[str, Callable[[Dataset, Path], Any]] = {
    "rows.parquet": lambda rows, path: rows.to_parquet(path),
    "rows.arrow": _arrow,
    "rows.csv": lambda rows, path: rows.to_csv(path),
    "rows.jsonl": lambda rows, path: rows.to_json(path),
    "rows.json": lambda rows, path: path.write_text(json.dumps(list(rows))),
    "rows.jsonl.gz": _gzipped,
    "saved": lambda rows, path: rows.save_to_disk(path),
    "splits": lambda rows, path: DatasetDict({"train": rows}).save_to_disk(path),
    "folder": lambda rows, path: rows.to_parquet(path / "train.parquet"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_local_data_of_every_format(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    WRITERS[name](Dataset.from_list(ROWS), path)
    found = read(path)
    assert [turns(each) for each in found] == [
        [("user", f"q{n}"), ("assistant", f"a{n}")] for n in range(4)
    ]
    assert [each.id for each in found] == [f"{name}:{n}" for n in range(1, 5)]
    assert [each.id for each in read(path, limit=2)] == [f"{name}:1", f"{name}:2"]


CALL = {"type": "function", "function": {"name": "look", "arguments": '{"city": "Rome"}'}}


def test_turns_with_tools_keep_what_was_said(tmp_path: Path) -> None:
    """A table fills the fields that a turn lacks with nulls."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "sunny", "tool_call_id": "1"},
                {"role": "assistant", "content": "warm", "weight": 0},
            ],
            "tools": '[{"type": "function", "function": {"name": "look"}}]',
            "source": "somewhere",
        }
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (found,) = read(tmp_path / "rows.parquet")
    asked, called, result, last = found.messages
    assert not asked.fields and result.fields == {"tool_call_id": "1"} and not last.fields
    function = {"name": "look", "arguments": {"city": "Rome"}}
    assert called.fields == {
        "content": None,
        "tool_calls": [{"type": "function", "function": function}],
    }
    assert called.learned and not last.learned
    assert found.arguments == {"tools": [{"type": "function", "function": {"name": "look"}}]}
    assert found.unread == ("source",)


def test_sharegpt_and_fields_of_other_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    path.write_text(json.dumps(row | {"system": "be brief"}) + "\n")
    expected = [("system", "be brief"), ("user", "q"), ("assistant", "a")]
    assert turns(*read(path)) == expected
    other = [{"from": "customer", "text": "q"}, {"from": "agent", "text": "a"}]
    path.write_text(json.dumps({"thread": other}) + "\n")
    with pytest.raises(UserError) as raised:
        read(path)
    line = (
        "{name: dataset, messages: thread, role: from, content: text, "
        "roles: {customer: user, agent: assistant}}"
    )
    assert raised.value.cure == f"write {line}"
    roles = {"customer": "user", "agent": "assistant"}
    found = read(path, messages="thread", role="from", content="text", roles=roles)
    assert turns(*found) == expected[1:]


def test_streaming_reads_the_first_rows(tmp_path: Path) -> None:
    lines = [json.dumps(row) + "\n" for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    found = read(tmp_path / "rows.jsonl", streaming=True, limit=2)
    assert found == read(tmp_path / "rows.jsonl", limit=2) and len(found) == 2
    with pytest.raises(UserError, match="is a stream without an end"):
        read(tmp_path / "rows.jsonl", streaming=True)


def test_a_part_of_a_split(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    parts = [read(tmp_path / "rows.parquet", split=part) for part in ("train[:75%]", "train[75%:]")]
    assert [[turns(each)[0][1] for each in part] for part in parts] == [["q0", "q1", "q2"], ["q3"]]


def test_labels_have_the_names_that_the_column_declares(tmp_path: Path) -> None:
    features = Features({"say": Value("string"), "kind": ClassLabel(names=["zebra", "ant"])})
    rows = {"say": ["one", "two"], "kind": [1, 0]}
    Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    found = source("labelled_dataset", path=tmp_path / "saved", text="say", label="kind")
    assert found.classes == ["zebra", "ant"]
    assert [(each.text, each.labels) for each in found.read()] == [("one", (1,)), ("two", (0,))]


def test_a_row_of_the_label_minus_one_is_left_out_beside_named_classes(tmp_path: Path) -> None:
    """It is no class, and the rows of a test split may all have it."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ant"])})
    rows = {"text": list("abcd"), "label": [-1, 1, -1, 0]}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows.parquet")
    found = source("labelled_dataset", path=tmp_path / "rows.parquet")
    assert [(each.text, each.labels) for each in found.read()] == [("b", (1,)), ("d", (0,))]
    assert found.left_out == ["rows.parquet:1", "rows.parquet:3"]
    part = source("labelled_dataset", path=tmp_path / "rows.parquet", limit=1)
    assert [each.text for each in part.read()] == ["b"]
    hidden = {"text": list("ab"), "label": [-1, -1]}
    Dataset.from_dict(hidden, features).to_parquet(tmp_path / "hidden.parquet")
    said = cause("labelled_dataset", path=tmp_path / "hidden.parquet")
    assert said[0].startswith("none of the 2 rows of ") and "choose a split" in said[1]
    stream = source("labelled_dataset", path=tmp_path / "rows.parquet", streaming=True)
    with pytest.raises(UserError, match="has the label -1, which does not name a class"):
        next(iter(stream.stream()))


def test_each_part_names_the_rows_that_it_leaves_out(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["zebra", "ant"])})
    rows = {"text": [f"t{n}" for n in range(12)], "label": [-1, 0, 1] * 4}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "rows.parquet")
    found = []
    for part in ([0, 0.5], [0.5, 1]):
        read = source("labelled_dataset", path=tmp_path / "rows.parquet", part=part)
        assert len(read.read()) == 4
        found.append(read.left_out)
    assert list(map(len, found)) == [2, 2]
    assert {*found[0], *found[1]} == {f"rows.parquet:{n}" for n in (1, 4, 7, 10)}


def test_minus_one_among_integers_is_refused(tmp_path: Path) -> None:
    """It may be a class or stand for none: only the user knows."""
    Dataset.from_dict({"text": list("ab"), "label": [0, -1]}).to_parquet(tmp_path / "rows.parquet")
    said = cause("labelled_dataset", path=tmp_path / "rows.parquet")
    assert said[0] == "rows.parquet:2 has the label -1, which stands for no label in many data sets"
    assert "write the labels as text" in said[1]
    texts = {"text": list("ab"), "label": ["0", "-1"]}
    Dataset.from_dict(texts).to_parquet(tmp_path / "texts.parquet")
    assert source("labelled_dataset", path=tmp_path / "texts.parquet").classes == ["-1", "0"]


def test_a_column_of_lists_gives_a_row_any_number_of_labels(tmp_path: Path) -> None:
    named = Features({"text": Value("string"), "label": List(ClassLabel(names=["wet", "calm"]))})
    rows: dict[str, Any] = {"text": ["one", "two"], "label": [[1, 0], []]}
    Dataset.from_dict(rows, features=named).save_to_disk(tmp_path / "named")
    Dataset.from_dict(rows).save_to_disk(tmp_path / "plain")
    for folder, classes in (("named", ["wet", "calm"]), ("plain", ["0", "1"])):
        found = source("labelled_dataset", path=tmp_path / folder)
        assert found.multi_label and found.classes == classes
        assert [each.labels for each in found.read()] == [(1, 0), ()]


def test_classes_of_another_split_and_numbers_in_order(tmp_path: Path) -> None:
    train = Dataset.from_dict({"text": list("abc"), "label": [10, 9, 2]})
    test = Dataset.from_dict({"text": ["d"], "label": [9]})
    DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "saved")
    params = {"path": tmp_path / "saved", "split": "test", "classes_split": "train"}
    found = source("labelled_dataset", **params)
    assert found.classes == ["2", "9", "10"] and [each.labels for each in found.read()] == [(1,)]


def cause(name: str = "dataset", **params: Any) -> tuple[str, str]:
    with pytest.raises(UserError) as raised:
        source(name, **params).read()
    assert "\n" not in raised.value.cause + raised.value.cure
    return raised.value.cause, raised.value.cure


def test_mistakes_have_one_line_of_cause_and_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.parquet"
    said = cause(path=path)
    assert said[0] == f"{path} does not exist"
    Dataset.from_list(ROWS).to_parquet(path)
    said = cause(path=path, split="test")
    assert "test" in said[0] and said[1] == "set split to one of its splits"
    assert cause(path=path, revision="main")[1] == "remove revision from the source"
    said = cause("labelled_dataset", path=path, label="answer")
    assert said[0].startswith(f"split train of {path} has no column 'text'")
    (tmp_path / "rows.txt").write_text("q\n")
    assert "'.txt' is unknown" in cause(path=f"{tmp_path}/rows.txt")[0]
    (tmp_path / "broken.parquet").write_text("no table")
    assert cause(path=tmp_path / "broken.parquet")[0].startswith(f"{tmp_path}/broken.parquet cann")
    DatasetDict({"a": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert cause(path=tmp_path / "saved")[1] == "choose one of a (split)"
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = cause(path="nobody/nothing")
    assert said[0].startswith("nobody/nothing cannot be read: ")
    assert said[1] == "unset HF_HUB_OFFLINE to download it once, or name local data"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert cause(path=path)[1] == 'run: pip install "kdcore[datasets]"'


def test_files_that_are_damaged_or_no_files_have_cures_that_fit(tmp_path: Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in 99 * ROWS).encode()
    packed = gzip.compress(rows + random.Random(0).randbytes(9999))
    cut, plain, pipe = (tmp_path / name for name in ("a.jsonl.gz", "b.csv.gz", "c.csv"))
    cut.write_bytes(packed[: len(packed) // 2])
    plain.write_text("question,answer\n")
    os.mkfifo(pipe)
    (tmp_path / "link.csv").symlink_to("gone.csv")
    for path in (cut, plain):
        said = cause(path=path)
        assert said[0].startswith(f"{path} cannot be read: ")
        assert said[1].startswith("copy or download it again"), said
    assert cause(path=pipe)[0] == f"{pipe} is neither a file nor a folder"
    assert cause(path=tmp_path / "link.csv")[1] == "restore that file, or name another one"
    denied = PermissionError(errno.EACCES, "Permission denied", str(plain))
    told = refused_data(DatasetParams(path=str(plain)), denied)
    assert told.cure == f"let its owner permit it: chmod +r {plain}"


@pytest.mark.parametrize("file", ["link.jsonl", "pipe.jsonl", "cut.csv.gz"])
def test_own_data_that_cannot_be_read_are_refused_before_a_spec_is_written(
    file: str, tmp_path: Path
) -> None:
    path = tmp_path / file
    if file == "link.jsonl":
        path.symlink_to("gone.jsonl")
    elif file == "pipe.jsonl":
        os.mkfifo(path)
    else:
        path.write_bytes(gzip.compress(b"question,answer\n" * 999)[:-9])
    registry = installed()
    with pytest.raises(UserError, match=r"cannot be read|neither a file nor a folder"):
        spec_of(registry.job("distill"), path, tmp_path / "spec.yaml", registry)


@pytest.mark.parametrize(
    ("fault", "cure"),
    [
        (
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated"
            ),
            "accept its terms",
        ),
        (
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."
            ),
            "check the hub id",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "check the connection"),
        (ValueError("Config name is missing.\nPlease pick one of ['main']"), "set config"),
    ],
)
def test_errors_of_the_hub(fault: Exception, cure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise fault

    monkeypatch.setattr("datasets.load_dataset", refuse)
    said = cause(path="a/b")
    assert said[0].startswith("a/b cannot be read: ") and said[1].startswith(cure)
