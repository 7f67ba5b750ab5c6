"""Every mistake in a spec is named by file and line, with what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcore.errors import Mistakes, TrainingDiverged, UserError
from kdcore.runs.folder import Run
from kdcore.runs.inputs import OtherInput
from kdcore.specs.distill import DistillSpec
from kdcore.specs.jobs import JOBS
from kdcore.specs.reading.file import placing, read_spec
from tests.tiny.toy_components import InvertedParams, SpeckdParams, registry

GOOD = """\
job: distill
teacher:
  model: some/teacher
student:
  layers: [0, 1]
data:
  train: {name: jsonl, path: rows.jsonl}
method:
  gates:
    - name: speckd
      k: 5
  tau: 1.0
training:
  steps: 10
  learning_rate: 1e-4
"""


@pytest.fixture
def spec_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("spec.yaml")


def read(file: Path, text: str, *sets: str) -> DistillSpec:
    file.write_text(text)
    spec = read_spec(file, sets, registry=registry())
    assert isinstance(spec, DistillSpec)
    return spec


def refused(file: Path, text: str, *sets: str) -> UserError:
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_spec(file, sets, registry=registry())
    for phrase in ("pydantic", "Spec", "Params", "Input should", "Choice", "https://"):
        assert phrase not in str(caught.value)
    return caught.value


def test_a_good_spec(spec_file: Path) -> None:
    spec = read(spec_file, GOOD)
    assert spec.training.learning_rate == 1e-4
    gate = spec.method.gates[0]
    assert gate.params == SpeckdParams(k=5)
    assert spec.method.divergence.name == "forward_kl"
    assert spec.data.train.params.path == spec_file.parent.resolve() / "rows.jsonl"  # type: ignore[attr-defined]


# what to change in the good spec, the cause, the cure
BROKEN = {
    "unknown key": (
        ("  steps: 10", "  stepz: 10"),
        "spec.yaml:14: training.stepz: unknown key",
        "did you mean 'steps'?",
    ),
    "key of another section": (
        ("job: distill", "job: distill\nlearning_rate: 1e-3"),
        "spec.yaml:2: learning_rate: unknown key",
        "'learning_rate' belongs at training.learning_rate",
    ),
    "unknown component": (
        ("name: speckd", "name: spekd"),
        "spec.yaml:10: method.gates.0: unknown gate 'spekd'",
        "did you mean 'speckd'?",
    ),
    "component without a name": (
        ("name: speckd", "nam: speckd"),
        "spec.yaml:10: method.gates.0: must be the name of a gate, or {name: NAME, "
        "PARAMETER: VALUE}",
        "use one of: all, inverted, random, speckd",
    ),
    "value of a component's parameter": (
        ("k: 5", "k: 0"),
        "spec.yaml:11: method.gates.0.k: must be greater than or equal to 1, not 0",
        "change it; k: how many of the teacher's tokens count",
    ),
    "unknown parameter of a component": (
        ("k: 5", "betta: 5"),
        "spec.yaml:11: method.gates.0.betta: unknown key",
        "did you mean 'beta'?",
    ),
    "missing parameter of a component": (
        ("- name: speckd\n      k: 5", "- random"),
        "spec.yaml:10: method.gates.0.rate: missing field",
        "add it; rate: share of positions",
    ),
    "parameter of a component's component": (
        (
            "name: speckd\n      k: 5",
            "name: inverted\n      gate:\n        name: speckd\n        k: x",
        ),
        'spec.yaml:13: method.gates.0.gate.k: must be an integer, not "x"',
        "change it; k: how many of the teacher's tokens count",
    ),
    "wrong type": (
        ("steps: 10", "steps: ten"),
        'spec.yaml:14: training.steps: must be an integer, not "ten"',
        "change it; steps: number of optimizer steps",
    ),
    "scalar where a list belongs": (
        ("[0, 1]", "1"),
        "spec.yaml:5: student.layers: must be a list, not 1",
        "write [1]",
    ),
    "scalar where a mapping belongs": (
        ("teacher:\n  model: some/teacher", "teacher: some/teacher"),
        'spec.yaml:2: teacher: must be a mapping of fields, not "some/teacher"',
        "write teacher: {model: ...}",
    ),
    "nothing where a mapping belongs": (
        ("  model: some/teacher", "  # model: some/teacher"),
        "spec.yaml:1: a student cut from its teacher needs a teacher",
        "set teacher",
    ),
    "number where text belongs": (
        ("some/teacher", "123"),
        "spec.yaml:3: teacher.model: must be a string, not 123",
        'put it in quotes: "123"',
    ),
    "flag where a number belongs": (
        ("steps: 10", "steps: true"),
        "spec.yaml:14: training.steps: must be a number, not true",
        "if you mean 1, write 1",
    ),
    "one of several words": (
        ("steps: 10", "optimizer: adam"),
        "spec.yaml:14: training.optimizer: must be 'adamw' or 'sgd', not \"adam\"",
        "did you mean 'adamw'?",
    ),
    "a word or a list": (
        ("layers: [0, 1]", "lora: {targets: all-linears}"),
        "spec.yaml:5: student.lora.targets: must be a list or 'all-linear', not \"all-linears\"",
        "did you mean 'all-linear'?",
    ),
    "missing teacher": (
        ("teacher:\n  model: some/teacher\n", ""),
        "spec.yaml:1: a student cut from its teacher needs a teacher",
        "set teacher",
    ),
    "missing required field of a section": (
        ("  model: some/teacher", "  dtype: float32"),
        "spec.yaml:2: teacher.model: missing field",
        "add it; model: hub id, folder, path/to/file.gguf, or package:NAME/file.gguf",
    ),
    "falling schedule": (
        ("tau: 1.0", "tau: [[0.5, 1], [0, 2]]"),
        "spec.yaml:12: method.tau: the progress values in [[progress, value], ...] must "
        "increase and lie between 0 and 1",
        "change it; tau: temperature of the loss; the loss is multiplied by tau^2",
    ),
    "no schedule": (
        ("tau: 1.0", "tau: [[0, 1, 2]]"),
        "spec.yaml:12: method.tau: must be a number or [[progress, value], ...], "
        "with values of at most 1e+09",
        "change it; tau: temperature of the loss; the loss is multiplied by tau^2",
    ),
    "a rule of several fields": (
        ("layers: [0, 1]", "model: teacher"),
        "spec.yaml:4: student: the student is identical to its teacher",
        "set layers",
    ),
    "a rule of the whole spec": (
        ("steps: 10", "eval_every: 10"),
        "spec.yaml:1: training.eval_every needs held-out rows",
        "set data.heldout",
    ),
    "wrong job": (
        ("job: distill", "job: distil"),
        'spec.yaml:1: job: unknown job "distil"',
        "did you mean 'distill'?",
    ),
    "no job": (
        ("job: distill\n", ""),
        "spec.yaml:1: job: missing field",
        "add it, one of: distill",
    ),
    "tab": (
        ("  layers: [0, 1]", "\tlayers: [0, 1]"),
        "spec.yaml:5: found character '\\t' that cannot start any token",
        "indent with spaces, not tabs",
    ),
    "open bracket": (
        ("[0, 1]", "[0, 1"),
        "spec.yaml:6: expected ',' or ']', but got ':'",
        "close the bracket, and separate its items with commas",
    ),
    "duplicate key": (
        ("  steps: 10", "  steps: 10\n  steps: 20"),
        "spec.yaml:15: duplicate key 'steps', first used in line 14",
        "remove one of them",
    ),
    "alias": (
        ("[0, 1]", "*keep"),
        "spec.yaml:5: aliases (*name) are not supported",
        "write the value itself",
    ),
    "tag": (
        ("steps: 10", "steps: !!python/object/apply:os.getpid []"),
        "spec.yaml:14: the tag tag:yaml.org,2002:python/object/apply:os.getpid is not supported",
        "write the value itself",
    ),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_mistake_is_told_with_its_line_and_a_cure(spec_file: Path, mistake: str) -> None:
    (old, new), cause, cure = BROKEN[mistake]
    assert old in GOOD
    error = refused(spec_file, GOOD.replace(old, new))
    assert error.cause == cause
    assert error.cure.startswith(cure)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("# nothing yet\n", "spec.yaml is empty"),
        ("- job: distill\n", "spec.yaml:1: a spec must be a mapping, not a list"),
        ("distill\n", 'spec.yaml:1: a spec must be a mapping, not "distill"'),
    ],
)
def test_a_file_that_is_no_spec(spec_file: Path, text: str, cause: str) -> None:
    error = refused(spec_file, text)
    assert (error.cause, error.cure) == (cause, "run `kdcore init` for an example spec")


def test_a_file_that_cannot_be_read(spec_file: Path) -> None:
    spec_file.write_bytes(b"job: \xff\xfe")
    for path, cause, cure in (
        ("spec.yml", "file not found: spec.yml", "did you mean 'spec.yaml'?"),
        ("nowhere/spec.yaml", "file not found: nowhere/spec.yaml", "run `kdcore init`"),
        (".", ". is a folder", "give the path of the spec file inside it"),
        ("spec.yaml", "spec.yaml is not UTF-8: invalid start byte", "save it as UTF-8"),
    ):
        with pytest.raises(UserError) as caught:
            read_spec(Path(path), registry=registry())
        assert caught.value.cause == cause
        assert cure in caught.value.cure


def test_several_mistakes_are_told_together_in_the_order_of_lines(spec_file: Path) -> None:
    text = GOOD.replace("steps: 10", "stepz: 10").replace("k: 5", "k: x")
    error = refused(spec_file, text, "seed=abc")
    assert error.cause.splitlines() == [
        '--set seed=abc: seed: must be an integer, not "abc"',
        'spec.yaml:11: method.gates.0.k: must be an integer, not "x"',
        "spec.yaml:14: training.stepz: unknown key",
    ]
    assert error.cure.splitlines()[1:] == [
        "method.gates.0.k: how many of the teacher's tokens count",
        "training.stepz: did you mean 'steps'?",
    ]


def test_set_changes_adds_and_indexes(spec_file: Path) -> None:
    spec = read(
        spec_file,
        GOOD.replace("- name: speckd\n      k: 5", "- speckd\n    - all"),
        "training.steps=7",
        "training.learning_rate=3e-5",
        "method.gates.0.k=3",
        "method.gates.1={name: inverted, gate: random}".replace(
            "random", "{name: random, rate: 1}"
        ),
        "student.lora.r=4",
        "method.terms.task=[[0, 0.1], [1, 0.9]]",
        "teacher.revision='1e5'",
    )
    assert (spec.training.steps, spec.training.learning_rate) == (7, 3e-5)
    assert spec.method.gates[0].params == SpeckdParams(k=3)
    assert isinstance(spec.method.gates[1].params, InvertedParams)
    assert spec.student.lora is not None
    assert spec.student.lora.r == 4
    assert spec.method.terms == {"task": [(0.0, 0.1), (1.0, 0.9)]}
    assert spec.teacher.revision == "1e5"


@pytest.mark.parametrize(
    ("assignment", "cause", "cure"),
    [
        ("training.steps", "not an assignment", "write --set training.steps=100"),
        ("=3", "not an assignment", "write --set"),
        ("training.stepz=3", "training.stepz: unknown key", "did you mean 'steps'?"),
        ("trainng.steps=3", "trainng: unknown key", "did you mean 'training'?"),
        ("training.steps.x=3", "training.steps is 10, so 'x' cannot be set in it", "set a field"),
        (
            "method.gates.1.k=3",
            "method.gates is a list of 1 and has no item '1'",
            "index of an item",
        ),
        ("method.gates.k=3", "method.gates is a list of 1 and has no item 'k'", "index of an item"),
        ("training.steps=[1", "expected ',' or ']'", "close the bracket"),
        (
            "training.steps=x",
            'training.steps: must be an integer, not "x"',
            "number of optimizer steps",
        ),
    ],
)
def test_a_bad_set_is_named_itself(spec_file: Path, assignment: str, cause: str, cure: str) -> None:
    error = refused(spec_file, GOOD, assignment)
    assert error.cause.startswith(f"--set {assignment}: {cause}")
    assert cure in error.cure


def test_yes_and_no_are_flags_only_where_a_flag_belongs(spec_file: Path) -> None:
    text = GOOD.replace("some/teacher", "no\n  trust_remote_code: no")
    spec = read(spec_file, text)
    assert (spec.teacher.model, spec.teacher.trust_remote_code) == ("no", False)


def test_a_params_model_that_breaks_is_its_distributions_fault(
    spec_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(SpeckdParams, "model_validate", breaks)
    error = refused(spec_file, GOOD)
    assert error.cause == (
        "spec.yaml:10: method.gates.0: toys 1.0 failed while checking the parameters of "
        "gate 'speckd': ZeroDivisionError: oh"
    )
    assert "reinstall that package" in error.cure


def test_mistakes_that_a_run_finds_are_placed_as_far_as_their_fields_are_known(
    spec_file: Path,
) -> None:
    spec_file.write_text(GOOD)
    found = [UserError("no field", "cure 1"), UserError("a layer", "cure 2", "student.layers")]
    with pytest.raises(UserError) as caught, placing(spec_file, ["training.steps=7"]):
        raise Mistakes(found)
    assert str(caught.value).splitlines() == [
        "spec.yaml:1: no field",
        "spec.yaml:5: student.layers: a layer",
        "cure 1",
        "student.layers: cure 2",
    ]
    with pytest.raises(UserError, match=r"^no field\n"), placing(spec_file):
        raise UserError("no field", "cure")
    with pytest.raises(TrainingDiverged), placing(spec_file):
        raise TrainingDiverged("the loss is NaN", "lower it")


def test_a_placed_mistake_keeps_its_class_and_its_field(spec_file: Path) -> None:
    """And is placed once: a job may run another spec."""
    spec_file.write_text(GOOD)
    other = spec_file.with_name("other.yaml")
    other.write_text("\n" + GOOD)
    changed = OtherInput("the layers changed", "restore them", "student.layers")
    with pytest.raises(OtherInput) as caught, placing(other), placing(spec_file):
        raise changed
    assert caught.value is changed and changed.field == "student.layers"
    assert str(changed) == "spec.yaml:5: student.layers: the layers changed\nrestore them"
    found = [UserError("a", "b", "teacher"), UserError("c", "d", "student.layers")]
    with pytest.raises(Mistakes) as both, placing(other), placing(spec_file):
        raise Mistakes(found)
    assert [each.field for each in both.value.found] == ["teacher", "student.layers"]
    assert both.value.cause.count(".yaml:") == 2
    with pytest.raises(UserError) as invalid:
        read(spec_file, GOOD, "teacher=[]")
    assert invalid.value.field == "teacher"


def test_the_resolved_spec_of_a_run_reads_as_the_same_spec(spec_file: Path) -> None:
    spec = read(spec_file, GOOD, "teacher.revision='123e45'", "run=out")
    run = Run.open(spec.run, spec, registry())
    with run.closed_after():
        pass
    assert read_spec(run.path("spec.yaml"), registry=registry()) == spec


def test_every_job_has_a_schema_model() -> None:
    assert set(JOBS) == {
        "bench",
        "compare",
        "distill",
        "evaluate",
        "generate-data",
        "train-drafter",
    }
