"""What would stop a run, or harm what is not its own, is refused before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from kdcore.components.registry import installed
from kdcore.errors import UserError
from kdcore.models.folder.files import model_folder
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore.specs.parts.training import MethodSpec
from kdcore.specs.reading import plain_yaml
from kdcore.training.arguments import SET_BY, micro_batches, training_arguments
from kdcore.training.method import build_objective
from kdcore_baselines.method.params import AdaSPEC
from kdcore_deepkd.params import TopKMaskParams

SPEC: dict[str, Any] = {
    "job": "distill",
    "teacher": {"model": "some/teacher"},
    "student": {"layers": [0]},
    "data": {"train": {"name": "chat", "path": "rows.jsonl"}},
}


def spec(**changes: Any) -> DistillSpec:
    return DistillSpec.model_validate(SPEC | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": -1},
        {"seed": 2**32},
        {"method": {"tau": 0}},
        {"method": {"tau": [[0, 1], [1, 0]]}},
        {"method": {"tau": [[0, 1], [1, 1000]]}},
        {"method": {"tau": 1e-6}},
        {"method": {"terms": {"task": float("nan")}}},
        {"training": {"learning_rate": float("inf")}},
        {"training": {"epochs": float("inf")}},
        {"training": {"betas": [1, 2]}},
        {"student": {"layers": [0], "dtype": "float16"}},
    ],
)
def test_numbers_that_cannot_train_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        spec(**changes)


@pytest.mark.parametrize(
    "training", [{"report_to": ["zork"]}, {"trainer": {"save_only_model": True}}]
)
def test_the_trainer_is_not_told_what_it_would_refuse(
    tmp_path: Path, training: dict[str, Any]
) -> None:
    with pytest.raises(UserError):
        training_arguments(spec(training=training), Run(tmp_path, planned=True))


@pytest.mark.parametrize(("name", "field"), sorted(SET_BY.items()))
def test_what_a_field_of_the_spec_sets_names_that_field(
    tmp_path: Path, name: str, field: str
) -> None:
    place: Any = DistillSpec
    for part in field.split("."):  # it exists
        place = place.model_fields[part].annotation
    with pytest.raises(UserError) as told:
        training_arguments(spec(training={"trainer": {name: 1}}), Run(tmp_path, planned=True))
    assert told.value.cause == f"training.trainer.{name} is already set by {field}"
    assert told.value.cure == f"remove it, and set {field}"


@pytest.mark.parametrize(
    "name",
    [
        "label_smoothing_factor",
        "per_device_eval_batch_size",
        "do_eval",
        "bf16_full_eval",
        "metric_for_best_model",
    ],
)
def test_what_would_have_no_effect_is_no_setting(tmp_path: Path, name: str) -> None:
    asked = spec(training={"trainer": {name: 1}})
    with pytest.raises(UserError, match=f"training.trainer.{name} would have no effect"):
        training_arguments(asked, Run(tmp_path, planned=True))


@pytest.mark.parametrize(
    ("rows", "size", "found"), [(9, 4, 2), (8, 4, 2), (4, 4, 1), (9, 10, None)]
)
def test_batches_that_are_dropped_do_not_make_a_training(
    rows: int, size: int, found: int | None
) -> None:
    asked = spec(training={"batch_size": size, "trainer": {"dataloader_drop_last": True}})
    if found is not None:
        assert micro_batches(asked, rows) == found
        return
    with pytest.raises(
        UserError, match=r"the run would make no step\nset training\.batch_size to 9"
    ):
        micro_batches(asked, rows)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": {"model": ""}},
        {"student": {"model": "  "}},
        {"student": {"model": "new", "config": {"model_type": "llama"}, "tokenizer": ""}},
    ],
)
def test_an_empty_name_is_not_the_working_directory(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="empty model name: give a hub id"):
        spec(**changes)
    with pytest.raises(ValueError, match="empty model name: give a hub id"):
        AdaSPEC(reference="")


@pytest.mark.parametrize(
    ("mask", "cure"),
    [({"k": 50}, "unit: classes"), ({"k": 0.2, "unit": "classes"}, "unit: share")],
)
def test_a_mask_whose_k_counts_something_else(mask: dict[str, Any], cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        TopKMaskParams.model_validate(mask)


def test_a_method_without_a_weighted_term() -> None:
    from kdcore.models.assembly import Assembly

    with pytest.raises(UserError, match="so the model would learn nothing"):
        build_objective(MethodSpec(terms={"kd": 0.0}), Assembly(installed()))


def test_a_folder_that_is_not_there_is_no_hub_id() -> None:
    with pytest.raises(UserError, match="is not a folder, a GGUF file or a hub id"):
        model_folder(ModelSpec(model="./nowhere"))


def test_a_run_folder_is_held_once_and_harms_no_other(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", spec(), installed())
    with run.closed_after():
        for how in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(UserError, match="another process is writing"):
                Run.open(tmp_path / "run", spec(), installed(), **how)
    with pytest.raises(UserError, match="inside another run"):
        Run.open(tmp_path / "run" / "model", spec(), installed())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Run.open(tmp_path / "file" / "run", spec(), installed())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text(json.dumps({"program": "another"}))
    with pytest.raises(UserError, match="already exists and is not a run folder"):
        Run.open(tmp_path / "other", spec(), installed(), overwrite=True)
    copy = run.folder / "checkpoint-8-mine"
    copy.mkdir()
    (copy / "trainer_state.json").write_text("{}")
    assert run.checkpoint() is None


def test_a_run_that_another_process_made_in_between_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look at the folder and the lock."""
    acquire, others = FileLock.acquire, iter([True])

    def late(self: FileLock, *how: Any, **more: Any) -> Any:
        if next(others, False):
            with Run.open(tmp_path / "run", spec(), installed()).closed_after():
                pass
        return acquire(self, *how, **more)

    monkeypatch.setattr(FileLock, "acquire", late)
    with pytest.raises(UserError, match="already contains a run"):
        Run.open(tmp_path / "run", spec(), installed())
    run = Run.open(tmp_path / "run", spec(), installed(), resume=True)
    assert run.read_json("run.json")["status"] == "running", "who was refused let go of it"


def test_an_overwriting_that_is_killed_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(tmp_path / "run", spec(), installed())
    (run.folder / "model").mkdir()
    with run.closed_after():
        run.write_text("README.md", "finished")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("kdcore.runs.whole_files.shutil.rmtree", killed)
        Run.open(run.folder, spec(), installed(), overwrite=True)
    assert not run.finished
    Run.open(run.folder, spec(), installed(), overwrite=True)
    assert sorted(path.name for path in run.folder.iterdir()) == ["lock", "run.json", "spec.yaml"]


def test_no_checkpoint_outlives_what_guards_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an overwriting that was killed, a resume would go on from it under another spec."""
    run = Run.open(tmp_path / "run", spec(), installed())
    (run.folder / "checkpoint-2").mkdir()
    with run.closed_after():
        run.write_text("before.json", "{}")

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("kdcore.runs.whole_files.shutil.rmtree", killed)
        Run.open(run.folder, spec(), installed(), overwrite=True)
    assert all((run.folder / name).exists() for name in ("before.json", "spec.yaml", "run.json"))
    with pytest.raises(UserError, match=r"different spec; changed: training\.steps"):
        Run.open(run.folder, spec(training={"steps": 3}), installed(), resume=True)


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    run = Run.open(tmp_path / "run", spec(), installed())
    (run.folder / "report.html.kdcore-part").symlink_to(tmp_path / "precious")
    run.write_text("report.html", "a page")
    assert (tmp_path / "precious").read_text() == "mine"
    assert run.path("report.html").read_text() == "a page"


def test_a_name_longer_than_a_file_has_is_no_model() -> None:
    with pytest.raises(UserError, match="is not a folder, a GGUF file or a hub id"):
        model_folder(ModelSpec(model="why is the sky so blue? " * 20))


def test_brackets_without_end_are_told() -> None:
    with pytest.raises(UserError, match=r"spec\.yaml:1: nested too deep"):
        plain_yaml.parse(10_000 * "[", lambda line: f"spec.yaml:{line}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a \\ud800", "response": "b"}', "incomplete surrogate pair"),
        ('{"instruction": "a", "instances": {"input": "b"}}', "must be a list"),
        (
            '{"messages": [{"role": "user", "content": "a", "ended": "x"}]}',
            "a message must be",
        ),
    ],
)
def test_a_line_that_no_tokenizer_could_read_is_named(tmp_path: Path, line: str, said: str) -> None:
    from kdcore.models.assembly import Assembly
    from kdcore.specs.distill import DataSpec

    (tmp_path / "rows.jsonl").write_text(line + "\n")
    data = DataSpec.model_validate({"train": {"name": "chat", "path": tmp_path / "rows.jsonl"}})
    with pytest.raises(UserError, match=rf"rows\.jsonl:1.*{said}"):
        Assembly(installed()).build(data.train).read()


@pytest.mark.parametrize("fault", [SystemExit(3), RuntimeError("no licence")])
def test_a_component_that_cannot_be_built_names_its_distribution(
    monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    from kdcore.components.registry import Registry
    from kdcore.models.assembly import Assembly

    def build(params: Any, context: Any) -> Any:
        raise fault

    monkeypatch.setattr(Registry, "attribute", lambda self, component: build)
    with pytest.raises(UserError, match=r"divergence 'forward_kl' of kdcore .* cannot be built"):
        Assembly(installed()).build(MethodSpec().divergence)


@pytest.mark.parametrize("place", ["s3://bucket/run", "memory://run", "file:///tmp/run"])
def test_a_run_folder_is_not_a_url(place: str) -> None:
    with pytest.raises(ValueError, match="not a folder of this machine"):
        spec(run=place)
