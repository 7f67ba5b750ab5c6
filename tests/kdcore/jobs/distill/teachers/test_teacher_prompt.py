"""Distillation from a teacher whose prompts say more, as SDFT does, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from kdcore.data.alignment.prompted_rows import PromptedRows, PromptedSource, prompted
from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.on_policy import answered, prompt_of
from kdcore.data.rows import RowDataset, batch_of, collate, padding
from kdcore.data.templates.mask import encode
from kdcore.errors import UserError
from kdcore.jobs.distill import distill
from kdcore.jobs.preflight.distill import preflight
from kdcore.method.loss_engine import LossEngine
from kdcore.method.records import Batch, Row
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.training.method import objective_of
from kdcore.training.teachers.kinds import LiveTeacher, PromptedTeacher
from kdcore.training.views import StudentView
from kdcore_baselines import reverse_kl
from tests.fixtures.json_lines import write_lines
from tests.tiny.tiny_chat_models import saved, tiny_model

HINTED = "{prompt}\n\nthe teacher said: {response}\n{hint}"
SAMPLED = [[7, 9, 11, 2], [30, 31], [5]]
"""Responses that a student might have sampled; the last two reached their maximum length."""


def conversation(n: int) -> Conversation:
    """Two turns, of which the second is sampled anew on policy."""
    turns = [("user", f"the mat {n}?"), ("assistant", f"sat {n}")]
    turns += [("user", "and the student?"), ("assistant", "the student sat on the mat" * (n + 1))]
    messages = tuple(Message(role, content) for role, content in turns)
    return Conversation(f"row {n}", messages, kept={"hint": "for"})


class Source:
    """Three conversations."""

    def read(self) -> list[Conversation]:
        return [conversation(n) for n in range(3)]

    def encode(self, example: Any, tokenizer: Any, max_length: int) -> Row:
        return encode(example, tokenizer, max_length)


@pytest.mark.parametrize(("sampled", "max_length"), [(False, 512), (True, 512), (False, 85)])
def test_the_loss_is_that_of_whole_texts_read_one_by_one(sampled: bool, max_length: int) -> None:
    """The mean over rows of the mean over the response's tokens of KL(student || teacher).

    With 85 positions the last response of two rows is cut.
    """
    student, teacher = tiny_model(seed=1), tiny_model(seed=2)
    tokenizer, source = student.tokenizer, PromptedSource(Source(), HINTED)
    ours = [source.encode(each, tokenizer, max_length) for each in source.read()]
    theirs = PromptedRows(source, RowDataset(ours), padding(tokenizer))
    rows = ours
    if sampled:
        rows = [answered(row, prompt_of(row), s) for row, s in zip(ours, SAMPLED, strict=True)]
    batch = batch_of(collate(list(enumerate(rows)), padding(tokenizer)), torch.device("cpu"))
    batch = Batch(batch.inputs, batch.labels, batch.mask, batch.index, sampled=sampled)
    live = LiveTeacher.of(teacher.model, 290)
    view = StudentView(student.model, 290, PromptedTeacher(live, theirs))
    objective = objective_of({}, [], reverse_kl(), {})
    step = LossEngine(objective, {"all": ("kd",)}, 7)(
        *view(student.model, batch, 0.5),
        batch,
        whole=3.0,
        progress=0.5,
        generator=torch.Generator(),
    )

    expected = []
    for n, row in enumerate(rows):
        asked = prompted(conversation(n), HINTED)
        text = tokenizer.apply_chat_template([m.said for m in asked.messages], tokenize=False)
        assert f"the teacher said: {asked.messages[3].content}\nfor<|im_end|>" in text
        own = encode(asked, tokenizer, 10_000)
        if sampled:
            own = answered(own, prompt_of(own), SAMPLED[n])
        learned = int(row.mask.sum())
        q = log_probs(student.model, row)
        p = log_probs(teacher.model, own)[:learned]
        expected.append((q.exp() * (q - p)).sum(-1).mean())
    assert float(step.losses["all"]) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


@torch.no_grad()
def log_probs(model: Any, row: Row) -> Tensor:
    """[N, V] float64 at the learned positions of one row, without padding."""
    logits = model(input_ids=row.inputs["input_ids"][None]).logits[0, :, :290]
    return logits[row.mask].double().log_softmax(-1)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A student that is its own teacher, on its own responses."""
    folder = tmp_path_factory.mktemp("asked")
    rows = [{"prompt": f"the mat {n}?", "response": f"sat {n}", "hint": "for"} for n in range(6)]
    write_lines(folder / "rows.jsonl", rows)
    model = {"model": str(saved(tiny_model(seed=1), folder / "model"))}
    train = {"name": "chat", "path": str(folder / "rows.jsonl"), "keep": ["hint"]}
    return {
        "job": "distill",
        "teacher": model,
        "student": model,
        "data": {
            "train": train,
            "heldout": train,
            "on_policy": {"probability": 0.5, "max_new_tokens": 6},
            "teacher_prompt": HINTED,
        },
        "method": {"divergence": "reverse_kl"},
        "training": {"batch_size": 3, "learning_rate": 1e-2, "steps": 4, "log_every": 1},
        "evaluation": {"before": False, "samples": 0},
    }


def ran(asked: dict[str, Any], run: Path, name: str = "loss", **data: Any) -> list[float]:
    spec = DistillSpec.model_validate(asked | {"run": run, "data": asked["data"] | data})
    return losses(distill(spec), name)


def losses(run: Run, name: str = "loss") -> list[float]:
    lines = map(json.loads, run.path("metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def test_the_students_own_prompt_is_the_neutral_one(asked: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit; and a student that equals its teacher has nothing to learn from it."""
    neutral = ran(asked, tmp_path / "neutral", teacher_prompt="{prompt}")
    plain = ran(asked, tmp_path / "plain", teacher_prompt=None)
    assert neutral == plain
    assert neutral[0] == pytest.approx(0, abs=1e-6)
    hinted = ran(asked, tmp_path / "hinted")
    assert len(hinted) == 4 and hinted[0] > 1e-3


def test_a_teacher_follows_the_student_also_when_resumed(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    """Its weights are the moving average of the student's after each step, as checkpoints say."""
    training = asked["training"] | {"save_every": 1, "keep": 9, "steps": 3}
    method = asked["method"] | {"teacher_follows": 0.25}
    changes = {"run": tmp_path / "run", "method": method, "training": training}
    spec = DistillSpec.model_validate(asked | changes)
    distill(spec)
    mean = load_file(Path(asked["student"]["model"]) / "model.safetensors")
    for step in (1, 2, 3):
        student = load_file(spec.run / f"checkpoint-{step}/model.safetensors")
        for name, weight in taught(spec, step).items():
            mean[name] = 0.75 * mean[name] + 0.25 * student[name]
            torch.testing.assert_close(weight, mean[name], rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(weight, student[n]) for n, weight in taught(spec, 3).items())
    last, final = taught(spec, 3), load_file(spec.run / "model/model.safetensors")
    for left in ("checkpoint-2", "checkpoint-3", "model"):
        shutil.rmtree(spec.run / left)
    (spec.run / "README.md").unlink()
    resumed = load_file(distill(spec, resume=True).path("model", "model.safetensors"))
    for found, known in ((taught(spec, 3), last), (resumed, final)):
        assert all(torch.equal(found[name], weight) for name, weight in known.items())


def taught(spec: DistillSpec, step: int) -> dict[str, Tensor]:
    """The teacher's weights in a checkpoint."""
    state = load_file(spec.run / f"checkpoint-{step}/kdcore_state.safetensors")
    return {name[8:]: weight for name, weight in state.items() if name.startswith("teacher/")}


def test_the_rate_one_makes_the_student_its_own_teacher(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    """With the student's prompt the loss is then 0 at every step, and not after a frozen one's."""
    own = asked | {"method": asked["method"] | {"teacher_follows": 1, "terms": {"task": 1}}}
    live = ran(own, tmp_path / "live", "term/kd", teacher_prompt="{prompt}")
    assert live == pytest.approx([0] * 4, abs=1e-6)
    frozen = own | {"method": own["method"] | {"teacher_follows": None}}
    assert ran(frozen, tmp_path / "frozen", "term/kd", teacher_prompt="{prompt}")[-1] > 1e-4


def test_braces_without_a_field_are_text() -> None:
    asked = prompted(conversation(0), "{prompt} as \\boxed{} or {response}, {a b}")
    assert asked.messages[2].content == (
        "and the student? as \\boxed{} or the student sat on the mat, {a b}"
    )
    assert asked.messages[:2] == conversation(0).messages[:2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": None}, "does not support a teacher on another machine"),
        ({"data": {"on_policy": {"policy": "interleaved"}}}, "on_policy.policy=interleaved"),
        ({"data": {"teacher_cache": "cache", "on_policy": None}}, "support data.teacher_cache"),
        ({"method": {"alignment": "spans"}}, "does not support method.alignment"),
        ({"training": {"packing": True}, "data": {"on_policy": None}}, "training.packing"),
        ({"data": {"teacher_prompt": "the answer is {response}"}}, "is missing: write it where"),
        (
            {"method": {"teacher_follows": 0.5}, "data": {"teacher_prompt": None}},
            "set data.teacher_prompt",
        ),
        (
            {"method": {"teacher_follows": 0.5}, "training": {"trainer": {"fsdp": True}}},
            "does not support training.trainer.fsdp",
        ),
        ({"method": {"teacher_follows": 0}}, "greater than 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    asked: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    given = asked | {
        name: asked[name] | change if change else change for name, change in changes.items()
    }
    with pytest.raises(ValidationError, match=said):
        DistillSpec.model_validate(given)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student": {"layers": [0, 1]}}, "the two models have other weights"),
        ({"teacher": {"dtype": "bfloat16"}}, "a teacher in torch.bfloat16 cannot follow"),
    ],
)
def test_a_teacher_that_cannot_follow_is_refused(
    asked: dict[str, Any], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    given = asked | {name: asked[name] | change for name, change in changes.items()}
    method = asked["method"] | {"teacher_follows": 0.5}
    spec = DistillSpec.model_validate(given | {"run": tmp_path / "run", "method": method})
    with pytest.raises(UserError, match=said):
        preflight(spec)


def test_rows_that_do_not_fit_are_named(asked: dict[str, Any], tmp_path: Path) -> None:
    def checked(prompt: str, **row: Any) -> None:
        rows = [{"prompt": "the mat?", "response": "sat", "hint": "for"} | row]
        rows.append({"prompt": "the mat?", "response": "sat", "hint": "on"})
        write_lines(tmp_path / "rows.jsonl", rows)
        train = asked["data"]["train"] | {"path": str(tmp_path / "rows.jsonl")}
        data = asked["data"] | {"train": train, "heldout": None, "teacher_prompt": prompt}
        spec = DistillSpec.model_validate(asked | {"run": tmp_path / "run", "data": data})
        preflight(spec)

    with pytest.raises(UserError, match=r"rows.jsonl:1 does not have the field 'clue'") as wrong:
        checked("{prompt} {clue}")
    assert "use one of hint, prompt, response" in wrong.value.cure
    with pytest.raises(
        UserError, match=r"rows.jsonl:1 and .*rows.jsonl:2 have the same prompt and response"
    ):
        checked("{prompt} {hint}")
    with pytest.raises(UserError, match=r"rows.jsonl:1 has \d+ tokens with the teacher's prompt"):
        checked("{prompt} {hint}" + " the mat" * 400, hint="on")
