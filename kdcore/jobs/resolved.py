"""A training spec, resolved: its method, data and models, checked for a mutual fit.

A run, its preflight check and its teacher cache share this step, with or without the models'
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed

from kdcore.data.ranks import Ranks
from kdcore.data.teacher_cache import TeacherCache
from kdcore.errors import UserError
from kdcore.evaluation.scores import Scores
from kdcore.method.objective import Objective
from kdcore.method.protocols import DataSource, TrainedDrafter
from kdcore.method.registry import Registry
from kdcore.models.assembly import Assembly
from kdcore.models.device import process_device
from kdcore.models.loaded import LoadedModel
from kdcore.models.loading import load_model
from kdcore.models.pair import TeacherAndStudent, model_kind, refuse_features, refuse_no_teacher
from kdcore.runs.folder import Run
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.today import pin
from kdcore.specs.distill import DistillSpec
from kdcore.specs.train_drafter import TrainDrafterSpec
from kdcore.training.arguments import processes
from kdcore.training.method import Method
from kdcore.training.views import DrafterView


@dataclass(frozen=True, slots=True)
class ResolvedDistill:
    """A distill spec with its method, sources and models.

    Attributes:
        spec: The spec.
        method: The objective and the momentum policy.
        sources: Field of ``data`` -> data source.
        scores: The scores of answers to the held-out prompts.
        models: Teacher, student and, if a gate names one, the reference.
        cache: The teacher cache that training reads, or None.
    """

    spec: DistillSpec
    method: Method
    sources: Mapping[str, DataSource]
    scores: Scores
    models: TeacherAndStudent
    cache: TeacherCache | None

    @classmethod
    def of(
        cls,
        spec: DistillSpec,
        registry: Registry,
        run: Run,
        *,
        weights: bool = True,
        before_cache: bool = False,
        progress: Progress | None = None,
    ) -> ResolvedDistill:
        """Build the method first, since it costs nothing, then load the models.

        Args:
            spec: The spec.
            registry: The components that the spec may name.
            run: The spec's run folder, which need not exist.
            weights: Whether the models' weights are loaded; otherwise they have sizes only.
            before_cache: Whether a teacher cache is about to be built: then the spec's cache is
                not read, its reference is not loaded, and a missing teacher is not refused.
            progress: The display of the loading (default: none).

        Returns:
            The resolved spec.

        Raises:
            UserError: Method, models and data do not fit together.
        """
        assembly = Assembly(registry)
        method = Method.build(spec, assembly, run)
        if not before_cache:
            refuse_no_teacher(spec, method.objective)
        sources = {name: assembly.build(choice) for name, choice in spec.data.sources.items()}
        asked = sources["heldout"].read() if spec.evaluation.answers else []
        ranks = Ranks(processes(spec))
        scores = Scores.build(spec.evaluation.answers, assembly.build, asked, ranks)
        set_seed(spec.seed)  # for the initial weights of the student, such as adapters
        reference = None if before_cache else method.objective.reference
        models = TeacherAndStudent.load(
            spec, sources, reference=reference, weights=weights, progress=progress
        )
        if weights:
            for loaded in models.named.values():
                loaded.to(process_device())
        cache = None if before_cache else _open_cache(spec, method.objective, models)
        if not before_cache:
            refuse_features(spec, method.objective, models)
        return cls(spec, method, sources, scores, models, cache)

    @property
    def readers(self) -> list[LoadedModel]:
        """The models that read the rows; the first one's tokenizer encodes them."""
        return list(self.models.named.values())


def _open_cache(
    spec: DistillSpec, objective: Objective, models: TeacherAndStudent
) -> TeacherCache | None:
    """Open the spec's teacher cache, if any, and pin the date of its rows.

    Raises UserError when it does not fit the spec.
    """
    if spec.data.teacher_cache is None:
        return None
    cache = TeacherCache(spec.data.teacher_cache)
    cache.refuse_other_origin(models.first, models.classes, is_teacher=models.teacher is not None)
    cache.refuse_method(objective)
    if cache.manifest.date is not None:
        pin(cache.manifest.date)
    return cache


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
        sources = _text_sources(spec, assembly)
        set_seed(spec.seed)  # for the initial weights of the drafter
        with (progress or Silent()).stage("load the target", 1) as stage:
            target = load_model(spec.target, weights=weights)
            if weights:
                target.to(process_device())  # where the drafter is then made
            with nullcontext() if weights else torch.device("meta"):
                drafter: Any = assembly.build(spec.drafter)
                drafter.bind(target.model, target.tokenizer)
            stage.advance()
        if not isinstance(drafter, TrainedDrafter):
            raise UserError(
                f"drafter '{spec.drafter.name}' is not trainable",
                "choose another drafter: see `kdcore plugins list`",
            )
        DrafterView(target.model, drafter)  # refuses a target whose logits a drafter cannot learn
        return cls(spec, method, sources, target, drafter)


def _text_sources(spec: TrainDrafterSpec, assembly: Assembly) -> dict[str, DataSource]:
    """Build the spec's data sources. Raises UserError for a source of classification rows."""
    sources: dict[str, DataSource] = {}
    for name, choice in spec.data.sources.items():
        sources[name] = assembly.build(choice)
        if model_kind(sources[name]) is not AutoModelForCausalLM:
            raise UserError(
                f"data.{name}: source '{choice.name}' provides rows for a classifier, and a "
                "drafter learns next tokens",
                "choose a source of text for a language model, e.g. chat",
            )
    return sources


def _refuse_reference(objective: Objective) -> None:
    """Raises UserError when a gate names a reference model: drafter training does not load one."""
    if objective.reference is not None:
        raise UserError(
            f"a gate names the reference model {objective.reference}, which the training of a "
            "drafter does not support",
            "choose another gate: see `kdcore plugins list`",
        )
