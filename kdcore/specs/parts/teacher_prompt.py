"""A teacher with a prompt of its own, or that follows the student: what a spec cannot combine."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, WithJsonSchema

from kdcore.specs.parts.on_policy import sampled_with_teacher

PROMPT = "{prompt}"


def _has_the_prompt(text: str) -> str:
    if PROMPT not in text:
        raise ValueError(f"{PROMPT} is missing: write it where the student's prompt belongs")
    return text


TeacherPrompt: TypeAlias = Annotated[
    str,
    AfterValidator(_has_the_prompt),
    WithJsonSchema({"type": "string", "pattern": r"\{prompt\}"}),
]
"""The text of a prompt that contains the student's."""

_INSTEAD = {
    "a teacher on another machine": "set teacher.model to a model that this machine runs",
    "several teachers (teachers)": "set a single teacher",
    "training.packing": "replace it by training.group_by_length: true",
}
"""What does not work with it -> the cure; else, to remove it."""


def refuse_with_prompt(spec: Any) -> None:
    """Check that a spec with ``data.teacher_prompt`` sets nothing that reads the student's rows.

    Args:
        spec: The distill spec.

    Raises:
        ValueError: It does.
    """
    on_policy = spec.data.on_policy
    asked = {
        "several teachers (teachers)": spec.teachers,
        "a teacher on another machine": spec.local_teacher is None,
        "data.teacher_cache": spec.data.teacher_cache,
        **sampled_with_teacher(on_policy),
        "method.alignment": spec.method.alignment,
        "training.packing": spec.training.packing,
    }
    for what in (what for what, wants in asked.items() if wants):
        cure = _INSTEAD.get(what, f"remove {what.partition(':')[0]}")
        raise ValueError(f"data.teacher_prompt does not support {what}: {cure}")


def refuse_with_following(spec: Any) -> None:
    """Check that a spec with ``method.teacher_follows`` has a teacher that can follow.

    Args:
        spec: The distill spec.

    Raises:
        ValueError: It does not.
    """
    teacher, trainer = spec.local_teacher, spec.training.trainer
    if spec.data.teacher_prompt is None:
        raise ValueError(
            "method.teacher_follows makes the student its own teacher, which needs a prompt that "
            "says more: set data.teacher_prompt"
        )
    asked = {
        "student.lora": spec.student.lora is not None,
        "teacher.quantization": teacher is not None and teacher.quantization is not None,
        "teacher.device": teacher is not None and teacher.device is not None,
        "training.trainer.fsdp": bool(trainer.get("fsdp")),
    }
    for what in (what for what, wants in asked.items() if wants):
        raise ValueError(f"method.teacher_follows does not support {what}: remove {what}")
