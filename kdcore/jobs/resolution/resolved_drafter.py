"""A train-drafter spec, resolved: see `kdcore.jobs.resolution.resolved`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed

from kdcore.components.registry import Registry
from kdcore.data.batching.augmentation import augmentation_of
from kdcore.data.batching.streaming import refuse_stream
from kdcore.data.caches.hidden_states import Origin
from kdcore.data.source import DataSource
from kdcore.decoding.build import refuse_untrainable
from kdcore.decoding.protocols import TrainedDrafter
from kdcore.errors import UserError, in_field
from kdcore.method.objective import Objective
from kdcore.models.assembly import Assembly
from kdcore.models.device import process_device
from kdcore.models.facts import dtype_name
from kdcore.models.fit.pair import model_kind
from kdcore.models.loading.load import load_model
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.folder import Run
from kdcore.runs.progress import Progress, Silent
from kdcore.specs.parts.training import source_field
from kdcore.specs.train_drafter import HiddenStatesSpec, TrainDrafterSpec
from kdcore.training.method import Method
from kdcore.training.views import DrafterView


@dataclass(frozen=True, slots=True)
class ResolvedDrafter:
    """A train-drafter spec with its method, sources, target and drafter.

    Attributes:
        spec: The spec.
        method: The objective and the momentum policy.
        sources: Field of ``data`` -> data source.
        target: The target model.
        drafter: A `TrainedDrafter`, which is a torch.nn.Module, bound to the target.
    """

    spec: TrainDrafterSpec
    method: Method
    sources: Mapping[str, DataSource]
    target: LoadedModel
    drafter: Any

    @classmethod
    def of(
        cls,
        spec: TrainDrafterSpec,
        registry: Registry,
        run: Run,
        *,
        weights: bool = True,
        progress: Progress | None = None,
    ) -> ResolvedDrafter:
        """Build the method first, since it costs nothing, then load the target.

        Args:
            spec: The spec.
            registry: The components that the spec may name.
            run: The spec's run folder, which need not exist.
            weights: Whether target and drafter get weights; otherwise they have sizes only.
            progress: The display of the loading (default: none).

        Returns:
            The resolved spec.

        Raises:
            UserError: Method, target, drafter and data do not fit together.
        """
        assembly = Assembly(registry)
        method = Method.build(spec, assembly, run)
        _refuse_reference(method.objective)
        with in_field("drafter"):
            refuse_untrainable(spec.drafter, assembly)
        sources = _text_sources(spec, assembly)
        set_seed(spec.seed)  # for the initial weights of the drafter
        with (progress or Silent()).stage("load the target", 1) as stage:
            device = process_device() if weights else None  # where the drafter is then made
            with in_field("target"):
                target = load_model(spec.target, weights=weights, device=device)
            with in_field("drafter"), nullcontext() if weights else torch.device("meta"):
                drafter: Any = assembly.build(spec.drafter)
                drafter.bind(target.model, target.tokenizer)
            stage.advance()
        refuse_stream(spec, sources["train"], chosen=drafter.vocabulary is not None)
        DrafterView(target.model, drafter)  # refuses a target whose logits a drafter cannot learn
        return cls(spec, method, sources, target, drafter)


def origin_of(asked: HiddenStatesSpec, drafter: TrainedDrafter, target: LoadedModel) -> Origin:
    """Describe the hidden states that a run stores.

    Args:
        asked: The spec of the stored hidden states.
        drafter: The drafter, whose ``layers`` are stored.
        target: The target model.

    Returns:
        The target's digest, the layers, the width and the dtypes.
    """
    width = (len(drafter.layers) + 1) * target.model.config.get_text_config().hidden_size
    return Origin(
        target.digest, tuple(drafter.layers), width, asked.dtype, dtype_name(target.model)
    )


def _text_sources(spec: TrainDrafterSpec, assembly: Assembly) -> dict[str, DataSource]:
    """Build the spec's data sources. Raises UserError for a source of classification rows."""
    sources = assembly.built(spec.data.sources, source_field)
    for name, source in sources.items():
        if model_kind(source) is not AutoModelForCausalLM:
            raise UserError(
                f"data.{name}: source '{spec.data.sources[name].name}' provides rows for a "
                "classifier, and a drafter learns next tokens",
                "choose a source of text for a language model, e.g. chat",
                f"data.{name}",
            )
    if augmentation_of(sources["train"]) is not None:
        raise UserError(
            "data.train augments its rows, which the training of a drafter does not support",
            "remove augment from data.train",
            "data.train",
        )
    return sources


def _refuse_reference(objective: Objective) -> None:
    """Raises UserError when a gate names a reference model: drafter training does not load one."""
    if objective.reference is not None:
        raise UserError(
            f"a gate names the reference model {objective.reference}, which the training of a "
            "drafter does not support",
            "choose another gate: see `kdcore plugins list`",
            "method.gates",
        )
