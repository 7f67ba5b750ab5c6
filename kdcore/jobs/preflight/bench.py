"""Preflight of bench specs: read the prompts, and measure what the drafters cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdcore.components.registry import Registry, installed
from kdcore.errors import in_field
from kdcore.evaluation.speed.turns import prompt_count
from kdcore.jobs.preflight.drafter_cost import DrafterCost, drafter_cost
from kdcore.jobs.resolution.benchmark import of_method, read_sets, refuse_methods
from kdcore.models.assembly import Assembly
from kdcore.models.device import chosen_device
from kdcore.models.facts import ModelFacts, describe_model
from kdcore.models.loading.load import load_model
from kdcore.runs.folder import Run
from kdcore.specs.bench import BenchSpec


@dataclass(frozen=True, slots=True)
class BenchReport:
    """The findings about a bench spec.

    Attributes:
        target: Facts of the target.
        prompts: Task set -> number of its prompts, of all turns.
        tokens: Maximum number of tokens that one method decodes.
        drafting: The cost of the methods' rounds, or None without methods.
    """

    target: ModelFacts
    prompts: Mapping[str, int]
    tokens: int
    drafting: DrafterCost | None


def preflight_bench(spec: BenchSpec, *, registry: Registry | None = None) -> BenchReport:
    """Resolve a bench spec, and measure from which acceptance length its drafters pay.

    Servers are not asked.

    Args:
        spec: The bench spec.
        registry: The components that the spec may name (default: the installed ones).

    Returns:
        The findings.

    Raises:
        UserError: The run could not start.
    """
    registry = registry or installed()
    Run(spec.run, planned=True).refuse_foreign()
    refuse_methods(spec, registry)
    device, assembly = chosen_device(spec.device), Assembly(registry)
    assembly.built(spec.baselines, "baselines.{}".format)
    with in_field("target"):
        target = load_model(spec.target, weights=False)
    questions, prompts = read_sets(spec, target, assembly)
    first = next(iter(prompts.values()))[0]
    cost = None
    if spec.methods:
        methods = {name: spec.drafting(name) for name in spec.methods}
        cost = drafter_cost(
            *(spec.target, target, methods, first, device, registry),
            batch_sizes=spec.batch_sizes,
            temperature=spec.temperatures[0],
            of=of_method,
        )
    count = {name: prompt_count(rows, spec) for name, rows in questions.items()}
    settings = len(spec.temperatures) * len(spec.batch_sizes) * max(1, len(spec.threads))
    tokens = sum(count.values()) * spec.max_new_tokens * settings
    return BenchReport(describe_model(target), count, tokens, cost)
