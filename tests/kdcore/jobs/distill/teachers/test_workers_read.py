"""What teachers have stored of the rows is read by a loader's workers, with the same result."""

from __future__ import annotations

from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from kdcore.data.alignment.paired_rows import PairedRows
from kdcore.data.alignment.prompted_rows import PromptedRows
from kdcore.data.caches.teacher_cache import TeacherCache
from kdcore.errors import UserError
from kdcore.jobs.caches.build import build_cache
from kdcore.jobs.distill import distill
from kdcore.specs.distill import DistillSpec
from kdcore.training.teachers.mixture import SeveralReaders
from kdcore.training.teachers.row_weights import RowWeights
from tests.fixtures.json_lines import write_lines
from tests.tiny.distill_specs import logged
from tests.tiny.tiny_chat_models import OTHER_TEXT, saved, tiny_model, tiny_tokenizer

V = 290
CACHES = {"math": (1, ["math", {"math": 1, "chat": 3}, ""]), "chat": (2, ["chat", ""])}
"""Name of a teacher -> its seed, and what rows say of their teacher that its cache has."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, (seed, _) in CACHES.items():
        saved(tiny_model(seed=seed), folder / name)
    saved(tiny_model(seed=3), folder / "student")
    tiny_model(seed=4).model.save_pretrained(folder / "stranger")
    tiny_tokenizer(text=OTHER_TEXT).save_pretrained(folder / "stranger")
    said = ["math", "chat", {"math": 1, "chat": 3}, "", "math", "", "chat", "chat"]
    rows = [
        {"prompt": f"the mat of {n}?", "response": f"the teacher sat {n}", "teacher": each}
        for n, each in enumerate(said)
    ]
    write_lines(folder / "rows.jsonl", rows)
    return folder


def asked(folder: Path, run: Path, **changes: Any) -> DistillSpec:
    plain = {
        "job": "distill",
        "run": str(run),
        "student": {"model": str(folder / "student")},
        "data": {"train": {"name": "chat", "path": str(folder / "rows.jsonl")}},
        "training": {"batch_size": 3, "optimizer": "sgd", "momentum": 0, "learning_rate": 0.1}
        | {"steps": 4},
        "evaluation": {"before": False, "samples": 0},
    }
    merged = {n: {**plain.get(n, {}), **each} for n, each in changes.items()}  # type: ignore[dict-item]
    return DistillSpec.model_validate(plain | merged)


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> the fields of a spec whose teacher has something stored."""
    math = {"model": str(folder / "math")}
    for name in CACHES:
        built = asked(folder, folder / "none", teacher={"model": str(folder / name)})
        build_cache(built, folder / f"cache-{name}", k=V)
    caches = {name: {"cache": str(folder / f"cache-{name}")} for name in CACHES}
    # the weight of a teacher is 0 in the first half: its cache is read, and not used
    weights = {"math": [[0, 0], [0.5, 0], [1, 1]], "chat": 1}
    aligned = {
        "teacher": {"model": str(folder / "stranger")},
        "method": {"alignment": "spans", "splitters": ["uld"], "divergence": "total_variation"},
    }
    build_cache(asked(folder, folder / "none", **aligned), folder / "cache-stranger", k=V)
    return {
        "several": {"teachers": caches, "teacher_weights": weights},
        "one of them live": {"teachers": caches | {"math": math}},
        "aligned": aligned,
        "aligned and cached": aligned | {"data": {"teacher_cache": str(folder / "cache-stranger")}},
        "prompted": {"teacher": math, "data": {"teacher_prompt": "{prompt}\n{response}"}},
    }


@pytest.mark.parametrize(
    "case", ["several", "one of them live", "aligned", "aligned and cached", "prompted"]
)
def test_workers_read_what_a_teacher_has_stored(
    case: str,
    folder: Path,
    cases: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = distill(asked(folder, tmp_path / "alone", **cases[case]))
    for owner, name in (
        (TeacherCache, "stored"),
        (PairedRows, "collated"),
        (PromptedRows, "collated"),
    ):
        monkeypatch.setattr(owner, name, only_in_workers(getattr(owner, name)))
    workers = {"trainer": {"dataloader_num_workers": 2}}
    shared = distill(asked(folder, tmp_path / "shared", **cases[case], training=workers))
    assert logged(shared) == logged(alone)
    ours, theirs = (load_file(run.path("model/model.safetensors")) for run in (shared, alone))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def only_in_workers(read: Any) -> Any:
    def checked(*given: Any) -> Any:
        assert get_worker_info() is not None, "the training process reads"
        return read(*given)

    return checked


@pytest.mark.parametrize("name", ["prompted", "aligned"])
def test_responses_that_are_sampled_replace_what_workers_read(
    name: str, folder: Path, cases: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    case, on_policy = cases[name], {"on_policy": {"max_new_tokens": 4}}
    sampled = case | {"data": case.get("data", {}) | on_policy}
    workers = {"trainer": {"dataloader_num_workers": 1}}
    alone = distill(asked(folder, tmp_path / "alone", **sampled))
    shared = distill(asked(folder, tmp_path / "shared", **sampled, training=workers))
    assert logged(shared) == logged(alone)


@pytest.mark.parametrize(
    ("changes", "cause", "cure"),
    [
        (
            {"data": {"on_policy": {"policy": "mixed"}}},
            "method.alignment and data.on_policy.policy=mixed cannot be combined",
            "set data.on_policy.policy: student",
        ),
        (
            {"data": {"on_policy": {}}, "method": {"advantage": "minillm", "terms": {"policy": 1}}},
            "method.advantage reads the teacher's probability of each sampled token",
            "remove method.advantage, or choose a teacher with the student's tokenizer",
        ),
    ],
)
def test_a_teacher_with_other_tokens_has_no_probabilities_of_the_student_s(
    changes: dict[str, Any],
    cause: str,
    cure: str,
    folder: Path,
    cases: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    aligned = cases["aligned"]
    method = aligned["method"] | changes.get("method", {})
    with pytest.raises(UserError, match=cause) as refused:
        distill(asked(folder, tmp_path / "run", **aligned | changes | {"method": method}))
    assert refused.value.cure == cure


def test_a_damaged_cache_of_several_ends_the_training_in_one_line(
    folder: Path, cases: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(cache: TeacherCache, key: bytes) -> Any:
        raise UserError(f"{cache.folder} is damaged", "delete it")

    monkeypatch.setattr(TeacherCache, "stored", damaged)
    workers = {"trainer": {"dataloader_num_workers": 1}}
    with pytest.raises(UserError, match="is damaged"):
        distill(asked(folder, tmp_path / "run", **cases["several"], training=workers))


def length_of_rows(batch: Any) -> dict[str, torch.Tensor]:
    return {"counts": batch["index"]}


def test_a_reader_reads_the_rows_that_its_teacher_ever_teaches() -> None:
    weights = RowWeights(("math", "chat"), {"math": ((0.0, 0.0), (1.0, 1.0)), "chat": 1.0})
    readers = SeveralReaders(dict.fromkeys(weights.names, length_of_rows), weights)
    spawned = ForkingPickler.loads(ForkingPickler.dumps(readers))
    batch = {"index": torch.tensor([7, 5, 6]), "teachers": ["chat", "", "math"]}
    found = {name: each["read"]["counts"].tolist() for name, each in spawned(batch).items()}
    assert found == {"math": [5, 6], "chat": [7, 5]}
    assert spawned({"index": torch.tensor([7]), "teachers": ["chat"]}).keys() == {"chat"}
