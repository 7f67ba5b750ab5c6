"""Evaluation of a loaded model by the tasks of lm-eval, an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcore.components.optional_packages import optional_package
from kdcore.components.registry import describe
from kdcore.errors import UserError
from kdcore.models.loading.loaded import LoadedModel


def refuse_without_harness() -> None:
    """Raises UserError when lm-eval is not installed."""
    for module in ("lm_eval.evaluator", "lm_eval.models.huggingface"):
        optional_package(module, "kdcore[lm-eval]", "an lm-eval task")


def run_tasks(
    loaded: LoadedModel, tasks: Sequence[str], batch_size: int
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-eval, with its own prompts and without a chat template.

    Args:
        loaded: The model.
        tasks: Names of tasks, or paths of task files (YAML); their data come from a hub or from
            the source that the file names.
        batch_size: Requests per batch.

    Returns:
        Task -> metric -> value, with lm-eval's names, e.g. ``acc,none``, and standard errors.

    Raises:
        UserError: lm-eval rejects a task.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model: Any = loaded.model
    try:
        wrapped = HFLM(pretrained=model, tokenizer=loaded.tokenizer, batch_size=batch_size)
        found: Any = simple_evaluate(model=wrapped, tasks=list(tasks), log_samples=False)
    except (KeyError, ValueError, OSError) as fault:
        raise UserError(
            f"lm-eval cannot run {', '.join(tasks)}: {describe(fault)}",
            "check the names with `lm-eval ls tasks`, and that the tasks' data are available",
        ) from fault
    return {
        task: {name: float(v) for name, v in figures.items() if isinstance(v, int | float)}
        for task, figures in found["results"].items()
    }
