"""A distill spec, resolved: its method, data and models, checked for a mutual fit.

A run, its preflight check and its teacher cache share this step, with or without the models'
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import set_seed

from kdcore.components.registry import Registry
from kdcore.data.alignment.paired_rows import PairedSource
from kdcore.data.alignment.prompted_rows import PromptedSource
from kdcore.data.alignment.vocabulary import bind_splitters
from kdcore.data.batching.augmentation import augmentation_of, refuse_augmentation
from kdcore.data.batching.batches import Batches
from kdcore.data.batching.streaming import refuse_stream
from kdcore.data.caches.teacher_cache import TeacherCache
from kdcore.data.ranks import Ranks
from kdcore.data.responses.endpoint.sampler import ServedSampler
from kdcore.data.responses.endpoint.teacher import ServedTeacher
from kdcore.data.rows import RowDataset
from kdcore.data.source import DataSource
from kdcore.errors import UserError, in_field
from kdcore.evaluation.scores import Scores
from kdcore.jobs.resolution.open_caches import open_cache, open_caches
from kdcore.models.assembly import Assembly
from kdcore.models.device import process_device
from kdcore.models.fit.method import (
    refuse_across_tokenizers,
    refuse_features,
    refuse_no_teacher,
    refuse_splitters,
)
from kdcore.models.fit.pair import TeacherAndStudent
from kdcore.models.loading.loaded import LoadedModel
from kdcore.models.loading.mapped import FILE
from kdcore.models.probes import refuse_mixing
from kdcore.runs.folder import Run
from kdcore.runs.inputs import settle
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.results import METRICS, OF_TEACHER
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.teachers import ServedTeacherSpec
from kdcore.specs.parts.training import source_field
from kdcore.training.arguments import micro_batches, processes, several_shards
from kdcore.training.method import Method
from kdcore.training.teachers.following import refuse_following
from kdcore.training.trainer.best import KEEP_BEST, choosing_metric
from kdcore.training.trainer.matching import bind_matchers, without_matchers


@dataclass(frozen=True, slots=True)
class ResolvedDistill:
    """A distill spec with its method, sources and models.

    Attributes:
        spec: The spec.
        method: The objective and the momentum policy.
        sources: Field of ``data`` -> data source.
        scores: The scores of answers to the held-out prompts.
        choosing: The score that chooses the best student, with its prompts, if one does.
        models: Teacher, student and, if a gate names one, the reference.
        cache: The teacher cache that training reads, or None.
        caches: Name -> cache, those of several teachers.
    """

    spec: DistillSpec
    method: Method
    sources: Mapping[str, DataSource]
    scores: Scores
    choosing: Scores
    models: TeacherAndStudent
    cache: TeacherCache | None
    caches: Mapping[str, TeacherCache] = field(default_factory=dict)

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
            refuse_no_teacher(spec, method.objective, method.auxiliary)
        refuse_across_tokenizers(spec, method.objective)
        sources = assembly.built(spec.data.sources, source_field)
        refuse_augmentation(spec, sources["train"], cached=before_cache)
        refuse_stream(spec, sources["train"], cached=before_cache)
        with in_field("data.heldout"):
            asked = sources["heldout"].read() if spec.evaluation.answers else []
        ranks = Ranks(processes(spec))
        with in_field("evaluation.answers"):
            scores = Scores.build(spec.evaluation.answers, assembly.build, asked, ranks)
        choosing = _choosing(spec, scores, sources, registry)
        set_seed(spec.seed)  # for the initial weights of the student, such as adapters
        reference = None if before_cache else method.objective.reference
        device = process_device() if weights else None
        file = run.path(FILE) if weights and several_shards(spec) else None
        how: Any = {"reference": reference, "weights": weights, "device": device}
        models = TeacherAndStudent.load(spec, sources, student_file=file, progress=progress, **how)
        if device is not None:
            models.student.to(device)  # a copy of a teacher that has a place of its own
        cache = None if before_cache else open_cache(spec, method.objective, models)
        caches = open_caches(spec, method.objective, models)
        fewest = min([models.classes, *(each.manifest.classes for each in caches.values())])
        models = replace(models, classes=fewest)
        if not before_cache:
            refuse_features(spec, method.objective, models)
            bind_matchers(method.objective, models)
            if models.aligned:
                tokenizers = models.student.tokenizer, models.answerer.tokenizer
                bind_splitters(method.objective, *tokenizers)
        refuse_splitters(method.objective, models)
        if spec.method.teacher_follows is not None and models.teacher is not None:
            pair = models.teacher.model, models.student.model
            refuse_following(*pair, spec.method.teacher_follows)
        if spec.training.packing and not before_cache:
            for loaded in models.named.values():
                refuse_mixing(loaded.model, loaded.name, flat=models.flattens_packed_rows)
        scores, choosing = (each.read_by(models.first.tokenizer) for each in (scores, choosing))
        return cls(spec, method, sources, scores, choosing, models, cache, caches)

    def settle(self, run: Run) -> None:
        """Record the models and the cache as inputs of a run.

        Args:
            run: The run.

        Raises:
            OtherInput: The run was started with another model or cache.
        """
        named = self.spec.model_dump(mode="json", include={"teacher", "student", "teachers"})
        reference = self.method.objective.reference
        own = {n: named[n] for n in ("teacher", "student")}  # as it was with one teacher only
        asked = {"teacher": named["teacher"], "student": own, "reference": reference}
        asked |= {f"teacher {name}": each for name, each in named["teachers"].items()}
        for name, loaded in self.models.named.items():
            settle(run, f"the {name}", asked[name], loaded.digest)
        if self.cache is not None:
            settle(run, "the teacher cache", str(self.cache.folder), self.cache.manifest.digest)
        for name, cache in self.caches.items():
            settle(run, f"the cache of teacher {name}", str(cache.folder), cache.manifest.digest)

    @property
    def train_source(self) -> DataSource:
        """The training rows, with rows of the teacher's own if it reads other tokens or prompts."""
        source, models = self.sources["train"], self.models
        if self.spec.data.teacher_prompt is not None:
            return PromptedSource(source, self.spec.data.teacher_prompt)
        if self.spec.method.alignment is not None:
            tokenizers = models.student.tokenizer, models.answerer.tokenizer
            return PairedSource(source, *tokenizers, self.spec.method.alignment)
        return source

    def served(
        self, connections: ExitStack, progress: Progress | None = None
    ) -> dict[str, ServedTeacher]:
        """Connect to the servers of teachers, without a request.

        Args:
            connections: Closes the connections.
            progress: Receiver of a note for each failure of a server (default: none).

        Returns:
            Name -> teacher; the name of a single one is ``teacher``.

        Raises:
            UserError: A connection lacks its library or its key, or the method needs more of the
                teacher's classes than its ``k``.
        """
        every = {"teacher": self.spec.teacher} | self.spec.teachers
        asked = {n: each for n, each in every.items() if isinstance(each, ServedTeacherSpec)}
        if asked and not self.models.first.model.can_generate():
            raise UserError(
                f"{self.models.first.name} is a classifier, and a server scores only text",
                "set teacher to a model without an endpoint",
            )
        note, found = (progress or Silent()).note, {}
        for name, each in asked.items():
            found[name] = ServedTeacher(each, self.models.classes, note)
            connections.callback(found[name].close)
            found[name].refuse_method(self.method.objective)
        return found

    def sampler(self, run: Run) -> ServedSampler | None:
        """Connect to the server that samples the student's responses, without a request.

        Args:
            run: The spec's run folder, which need not exist.

        Returns:
            The sampler, which its user closes; None if the spec does not name one.

        Raises:
            UserError: The connection lacks its library or its key.
        """
        asked = self.spec.data.on_policy
        if asked is None or asked.sampler is None:
            return None
        return ServedSampler(
            asked,
            run.path("sampler"),
            self.models.classes,
            every=self.models.student.classes == self.models.classes,
            plain=without_matchers,
            ranks=Ranks(processes(self.spec)),
        )

    def batches(self, rows: RowDataset, pad: Mapping[str, int]) -> Batches:
        """The training rows as the Trainer reads them.

        Args:
            rows: The training rows.
            pad: Padding value of each input, see `kdcore.data.rows.collate`.

        Returns:
            The rows, packed or grouped if the spec says so.

        Raises:
            UserError: The run would make no step.
        """
        found = Batches.of(
            self.spec.training,
            rows,
            pad,
            seed=self.spec.seed,
            capacity=self.spec.data.max_length,
            processes=processes(self.spec).num_processes,
            flat=self.spec.training.packing and self.models.flattens_packed_rows,
            augmentation=augmentation_of(self.sources["train"]),
        )
        micro_batches(self.spec, len(found))
        return found

    @property
    def readers(self) -> list[LoadedModel]:
        """The models that read the student's rows; the first one's tokenizer encodes them."""
        return [self.models.student] if self.models.aligned else list(self.models.named.values())


def _choosing(
    spec: DistillSpec, scores: Scores, sources: Mapping[str, DataSource], registry: Registry
) -> Scores:
    """The score that chooses the best student, on the validation prompts if there are any.

    Raises UserError when ``training.keep_best`` names a figure that is not measured.
    """
    figure = spec.training.keep_best
    known = [*METRICS, *scores.metrics]
    if figure is None:
        return Scores()
    if figure in OF_TEACHER and not spec.has_live_teacher:
        raise UserError(
            f"{KEEP_BEST}: {figure} compares the student with a live teacher, and the spec "
            "does not name one",
            "set teacher, or choose another figure, e.g. perplexity or accuracy",
            KEEP_BEST,
        )
    measured = {metric.name for metric in known}
    if figure not in measured and figure in registry.names("score"):
        raise UserError(
            f"{KEEP_BEST}: the score {figure} is not measured",
            f"add {figure} to evaluation.answers",
            KEEP_BEST,
        )
    choosing_metric(figure, known)
    if figure not in scores.of:
        return Scores()
    rows = scores.prompts if "validation" not in sources else sources["validation"].read()
    return scores.of_one(figure, rows)
