"""The tasks of lm-eval, an extra, on a model that is loaded already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcore.errors import UserError
from kdcore.method.registry import describe
from kdcore.models.loaded import LoadedModel


def refuse_without_harness() -> None:
    """Raises UserError when lm-eval is not installed."""
    try:
        import lm_eval.evaluator
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as fault:
        raise UserError(
            f"lm-eval cannot be imported: {describe(fault)}", "pip install 'kdcore[lm-eval]'"
        ) from fault


def run_tasks(
    loaded: LoadedModel, tasks: Sequence[str], batch_size: int
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, in lm-eval's own names, e.g. ``acc,none``, with their errors.

    tasks: names that lm-eval knows, or paths of its YAML files. Their data come from a hub, or
    from what a YAML file names. Prompts are lm-eval's own, without a chat template.
    Raises UserError for what lm-eval refuses.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model: Any = loaded.model
    try:
        wrapped = HFLM(pretrained=model, tokenizer=loaded.tokenizer, batch_size=batch_size)
        found: Any = simple_evaluate(model=wrapped, tasks=list(tasks), log_samples=False)
    except (KeyError, ValueError, OSError) as fault:
        raise UserError(
            f"lm-eval cannot do {', '.join(tasks)}: {describe(fault)}",
            "`lm-eval ls tasks` names its tasks; their data must be within reach",
        ) from fault
    return {
        task: {name: float(v) for name, v in figures.items() if isinstance(v, int | float)}
        for task, figures in found["results"].items()
    }
