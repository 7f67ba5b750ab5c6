"""The store of hidden states: what comes out is what went in, and nothing else is let in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from kdcore.data.caches.hidden_states import SHARD, HiddenStates, Origin, store
from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.runs.progress import Silent

WIDTH = 8


def row(*ids: int) -> Row:
    tokens = torch.tensor(ids)
    return Row({"input_ids": tokens}, tokens, torch.ones(len(ids), dtype=torch.bool), "row")


def states_of(rows: Sequence[Row]) -> Iterator[Tensor]:
    for each in rows:
        yield each.labels[:, None] + torch.arange(WIDTH) / 8


def origin(target: str = "a", dtype: str = "float32", computed: str = "float32") -> Origin:
    return Origin(target, (1, 2), WIDTH, dtype, computed)


def stored(folder: Path, rows: Sequence[Row], limit: float = 1.0) -> HiddenStates:
    store(folder, origin(), rows, limit, states_of, Silent())
    return HiddenStates(folder, rows)


def test_rows_come_back_in_any_order_padded(tmp_path: Path) -> None:
    rows = [row(1, 2, 3), row(4, 5), row(6)]
    found = stored(tmp_path, rows).read([2, 0], length=4)
    expected = [torch.nn.functional.pad(each, (0, 0, 0, 4 - len(each))) for each in states_of(rows)]
    assert torch.equal(found, torch.stack([expected[2], expected[0]]))


def test_only_what_is_missing_is_computed_and_a_partial_shard_is_made_again(tmp_path: Path) -> None:
    long, longer = row(*range(SHARD)), row(*range(SHARD + 1))

    def fails(rows: Sequence[Row]) -> Iterator[Tensor]:
        for place, state in enumerate(states_of(rows)):
            if rows[place] is longer:
                raise KeyboardInterrupt
            yield state

    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, origin(), [longer, row(1), long], 1.0, fails, Silent())
    asked: list[Row] = []

    def counted(rows: Sequence[Row]) -> Iterator[Tensor]:
        asked.extend(rows)
        yield from states_of(rows)

    rows = [longer, row(2), long, row(1), row(1)]
    store(tmp_path, origin(), rows, 1.0, counted, Silent())
    assert [len(each.labels) for each in asked] == [1, SHARD + 1], "those of like length together"
    assert torch.equal(HiddenStates(tmp_path, rows).read([4], 1)[0], next(states_of([row(1)])))


def test_a_limit_is_refused_before_it_is_passed(tmp_path: Path) -> None:
    rows = [row(1, 2, 3), row(4)]
    size = 4 * WIDTH * 4
    with pytest.raises(UserError, match="4 positions take"):
        store(tmp_path, origin(), rows, (size - 1) / 1e9, lambda part: pytest.fail(), Silent())
    assert not list(tmp_path.glob("shard*"))
    stored(tmp_path, rows, limit=size / 1e9)
    with pytest.raises(UserError, match="5 positions take"):  # those it holds already count
        stored(tmp_path, [row(9)], limit=size / 1e9)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (origin(target="b"), "target"),
        (origin(dtype="bfloat16"), "dtype\n"),
        (origin(computed="bfloat16"), "dtype of the target"),
    ],
)
def test_states_of_another_origin_are_refused(tmp_path: Path, other: Origin, named: str) -> None:
    stored(tmp_path, [row(1)])
    with pytest.raises(UserError, match=f"with a different {named}"):
        store(tmp_path, other, [row(1)], 1.0, states_of, Silent())


def test_a_folder_that_does_not_say_what_its_target_computed_in_is_read(tmp_path: Path) -> None:
    stored(tmp_path, [row(1)])
    manifest = tmp_path / "manifest.json"
    said = json.loads(manifest.read_text())
    del said["computed"]
    manifest.write_text(json.dumps(said))
    for computed in ("float32", "bfloat16"):
        wanted = origin(computed=computed)
        store(tmp_path, wanted, [row(1)], 1.0, lambda part: pytest.fail(), Silent())
    with pytest.raises(UserError, match="with a different target"):
        store(tmp_path, origin(target="b"), [row(1)], 1.0, states_of, Silent())


def test_a_foreign_folder_a_damaged_shard_and_a_second_writer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").touch()
    with pytest.raises(UserError, match="contains files that are not hidden states"):
        stored(tmp_path / "foreign", [row(1)])

    def twice(rows: Sequence[Row]) -> Iterator[Tensor]:
        with pytest.raises(UserError, match="another process is writing to"):
            stored(tmp_path / "held", [row(2)])
        return states_of(rows)

    store(tmp_path / "held", origin(), [row(1)], 1.0, twice, Silent())
    shard = tmp_path / "held" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(UserError, match="damaged"):
        stored(tmp_path / "held", [row(1)])
    shard.unlink()
    stored(tmp_path / "held", [row(1)])


def test_whoever_lacks_no_row_waits_for_nobody(tmp_path: Path) -> None:
    rows = [row(1, 2), row(3)]
    stored(tmp_path, rows)
    with FileLock(tmp_path / "lock"):
        store(tmp_path, origin(), rows, 1.0, lambda part: pytest.fail(), Silent())
        with pytest.raises(UserError, match="another process is writing to"):
            stored(tmp_path, [*rows, row(4)])


@pytest.mark.parametrize("manifest", ["[]", "null", "3", "{"])
def test_a_manifest_that_is_none_is_another_origin(tmp_path: Path, manifest: str) -> None:
    stored(tmp_path, [row(1)])
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="with a different target"):
        stored(tmp_path, [row(1)])


def test_a_file_in_its_place_and_a_shard_that_cannot_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        stored(tmp_path / "file", [row(1)])
    stored(tmp_path / "store", [row(1)])
    two, one = torch.zeros(2, 16, dtype=torch.uint8), torch.ones(1, dtype=torch.int32)
    save_file({"keys": two, "counts": one}, tmp_path / "store" / "shard-00000.safetensors")
    with pytest.raises(UserError, match="damaged"):
        stored(tmp_path / "store", [row(1)])
