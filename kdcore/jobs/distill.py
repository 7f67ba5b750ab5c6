"""The distill job: train a student from a teacher, from a spec to a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from kdcore.components.registry import Registry, installed
from kdcore.data.batching.batches import Batches
from kdcore.data.conversation import Conversation
from kdcore.data.ranks import ALONE, Ranks
from kdcore.data.responses.on_policy import OnPolicy
from kdcore.data.rows import (
    RowDataset,
    batch_of,
    collate,
    note_shared_rows,
    padding,
)
from kdcore.data.source import DataSource
from kdcore.evaluation.answers import answers, judged, question
from kdcore.evaluation.heldout import HeldOut
from kdcore.evaluation.scores import Scores
from kdcore.evaluation.token_gates import ROWS, judged_responses
from kdcore.jobs.model_card import model_card
from kdcore.jobs.resolution.images import image_warnings
from kdcore.jobs.resolution.resolved import ResolvedDistill
from kdcore.jobs.resolution.teaching import settle_teachers, teacher_of
from kdcore.method.loss_engine import LossEngine
from kdcore.models.device import chunk_on, process_device
from kdcore.models.fit.pair import TeacherAndStudent
from kdcore.models.loading.loaded import LoadedModel
from kdcore.models.loading.mapped import FILE
from kdcore.runs.facts import ModelOrigin
from kdcore.runs.folder import Run
from kdcore.runs.hooks import RunHooks
from kdcore.runs.progress import Progress
from kdcore.runs.results import (
    HELDOUT_ROWS,
    METRICS,
    TOKEN_GATES,
    TRAINING_RESULTS,
    GatedResponse,
    HeldOutResults,
    HeldOutRows,
    TrainingResults,
    shown,
)
from kdcore.runs.today import today
from kdcore.specs.distill import DistillSpec
from kdcore.training.arguments import (
    lost_updates,
    processes,
    several_shards,
    training_arguments,
)
from kdcore.training.rows import TrainingRows, read_rows, settle_rows
from kdcore.training.run import measured_before, train_to_the_end, training_run
from kdcore.training.saved_student import save_student
from kdcore.training.teachers.following import Follow
from kdcore.training.trainer.auxiliary import Auxiliary
from kdcore.training.trainer.best import BestModel, changing_weights, load_weights
from kdcore.training.trainer.lookahead import RowsAhead
from kdcore.training.trainer.matching import attached, matched_by
from kdcore.training.trainer.probe import Probe
from kdcore.training.trainer.shards import OnceSharded
from kdcore.training.trainer.step_decay import StepDecay
from kdcore.training.trainer.trainer import DistillationTrainer, Figures
from kdcore.training.views import StudentView


def distill(
    spec: DistillSpec,
    *,
    registry: Registry | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train a student by a distill spec.

    Args:
        spec: The distill spec.
        registry: The components that the spec may name (default: the installed ones).
        overwrite: Whether an existing run folder is replaced.
        resume: Whether an unfinished run is continued.
        progress: The display of stages and notes (default: none).

    Returns:
        The run, whose folder holds the student.

    Raises:
        UserError: The folder, the models or the data cannot be used (see
            `kdcore.runs.folder.Run.open`, `kdcore.models.loading.load`, `kdcore.data`).
        TrainingDiverged: The loss became NaN or infinite.
    """
    registry = registry or installed()

    def work(hooks: RunHooks) -> None:
        with ExitStack() as connections:
            _Distillation.prepare(spec, hooks, connections).carry_out()

    return training_run(spec, work, registry, overwrite=overwrite, resume=resume, progress=progress)


@dataclass(frozen=True)
class _Distillation:
    """A distillation with its models and rows, loaded and checked."""

    resolved: ResolvedDistill
    hooks: RunHooks
    train: RowDataset
    batches: Batches
    heldout: HeldOut | None
    validation: HeldOut | None
    prompts: Sequence[Conversation]
    view: StudentView
    on_policy: OnPolicy | None
    auxiliary: Auxiliary | None

    @classmethod
    def prepare(cls, spec: DistillSpec, hooks: RunHooks, connections: ExitStack) -> _Distillation:
        """Resolve the spec, then read the training and held-out rows."""
        run, progress = hooks.run, hooks.progress
        resolved = ResolvedDistill.of(spec, hooks.registry, run, progress=progress)
        models, sources = resolved.models, resolved.sources
        roles = ("teacher", "student", "reference")
        origins = {n: ModelOrigin(m.name, m.digest) for n, m in models.named.items() if n in roles}
        run.update(date=str(today().date()), **origins)  # that of the cache, if there is one
        resolved.settle(run)

        def read(source: DataSource, name: str) -> TrainingRows:
            readers, answerer = resolved.readers, models.answerer
            return read_rows(source, name, spec, readers, run, progress, hooks.registry, answerer)

        train = read(resolved.train_source, "train")
        settle_rows(run, "train", spec, train, models.first)
        settle_teachers(run, "train", spec, train.encoded.rows)
        rows = train.encoded
        teacher = teacher_of(resolved, train, progress, connections)
        for other in image_warnings(spec, sources):
            progress.note(f"warning: {other}")
        if warning := lost_updates(spec, models.student.model.dtype):
            progress.note(f"warning: {warning}")
        fill = padding(models.first.tokenizer)
        batches = resolved.batches(rows, fill)
        measured: dict[str, HeldOut] = {}
        prompts: list[Conversation] = []
        size = spec.evaluation.batch_size
        chunk = chunk_on(process_device(), spec.training.chunk, models.classes)
        for name in (name for name in sources if name in ("heldout", "validation")):
            held = read(sources[name], name)
            settle_rows(run, name, spec, held, models.first)
            settle_teachers(run, name, spec, held.encoded.rows)
            measured[name] = HeldOut(held.encoded, fill, size, chunk, spec.seed, progress)
            if name == "heldout":
                note_shared_rows(rows, held.encoded, progress)
                told = (e for e in held.examples() if isinstance(e, Conversation))
                prompts += islice(told, spec.evaluation.samples)
        heldout, validation = measured.get("heldout"), measured.get("validation")
        if heldout and validation:
            note_shared_rows(validation.rows, heldout.rows, progress, "chosen on")
        elif heldout and spec.training.keep_best:
            progress.note(
                "the best student is chosen on the reported held-out rows, which makes its figures "
                "optimistic: set data.validation to other rows"
            )
        view = StudentView(
            models.student.model,
            models.classes,
            teacher,
            reference=models.reference.model if models.reference else None,
            matched=matched_by(resolved.method.objective)[0],
        )
        sampler = resolved.sampler(run)
        if sampler is not None:
            connections.callback(sampler.close)
        policy = OnPolicy.of(spec, models, rows.rows, sampler)
        beside = None
        if "auxiliary" in sources:
            added = read(sources["auxiliary"], "auxiliary")
            settle_rows(run, "auxiliary", spec, added, models.first)
            if heldout:
                note_shared_rows(added.encoded, heldout.rows, progress)
            beside = Auxiliary.of(spec, resolved.method, added.encoded, fill, view, chunk)
        return cls(
            resolved, hooks, rows, batches, heldout, validation, prompts, view, policy, beside
        )

    @property
    def spec(self) -> DistillSpec:
        """The resolved spec."""
        return self.resolved.spec

    @property
    def models(self) -> TeacherAndStudent:
        """The loaded models."""
        return self.resolved.models

    @property
    def run(self) -> Run:
        """The run folder."""
        return self.hooks.run

    def carry_out(self) -> None:
        """Measure, train, save, and measure again."""
        arguments = training_arguments(self.spec, self.run)
        for loaded in self.models.named.values():
            loaded.to(arguments.device)
        method, student = self.resolved.method, self.models.student.model

        sharded = several_shards(self.spec)  # whose passes need every process at once
        ranks = ALONE if sharded else Ranks(processes(self.spec))

        def measured() -> HeldOutResults:
            return measured_before(self.run, self.spec, lambda: self._judge(student, ranks))

        begun = [OnceSharded(self.run.path(FILE), measured)] if sharded else []
        before = HeldOutResults() if sharded else measured()  # it may not fit before
        chunk = chunk_on(arguments.device, self.spec.training.chunk, self.models.classes)
        engine = LossEngine(method.objective, method.streams, chunk)
        with attached(student, method.objective.matchers, arguments.device):
            model, weights = self._trained(arguments, engine, begun)
        before = measured() if sharded else before
        # Saved before it is judged: a failure there must not lose what was trained.
        images = getattr(self.resolved.sources["train"], "image_processor", None)
        model = save_student(self.run, model, weights, self.models.first.tokenizer, images)
        after = self._judge(model, ranks)
        gated = self._gated(engine, model)
        teacher = self.models.teacher  # in each process: it may be sharded over all of them
        asked = teacher and dataclasses.replace(teacher, name="the teacher")
        theirs = self._answers(asked) if asked else []
        if self.run.writes:
            self.run.write(TOKEN_GATES, gated)
            self._report(before, after, theirs)

    def _trained(self, arguments: Any, engine: LossEngine, begun: list[Any]) -> tuple[Any, Any]:
        """The student after the last step, and its weights if it is sharded."""
        tokenizer = self.models.first.tokenizer
        trainer = DistillationTrainer(
            model=self.models.student.model,
            args=arguments,
            engine=engine,
            view=self.view,
            policy=self.resolved.method.policy,
            row_ids=lambda index: self.train.rows[index].id,
            logged=self._logged,
            evaluator=lambda: self._offered(self.models.student.model).figures,
            best=self._best,
            patience=self.spec.training.patience,
            on_policy=self.on_policy,
            ahead=RowsAhead(self.view.taught_by, self.on_policy),
            probe=Probe.of(self.spec.training),
            decay=StepDecay.of(self.spec.training),
            train_dataset=self.batches.items,
            eval_dataset=self._choosing and self._choosing.rows,
            data_collator=self.batches.collate_for(self.view.taught_by.reader()),
            order=self.batches.order,
            auxiliary=self.auxiliary,
            streams=self.resolved.method.streams,
            processing_class=tokenizer,
            callbacks=[Follow(self.view.taught_by), *begun],
        )
        train_to_the_end(trainer, self.run, self.hooks.progress)
        if self._best is not None:
            student = self.models.student.model
            if not self._best.measured_at_end(trainer.state):
                self._offered(student)
            trainer.accelerator.wait_for_everyone()  # until the main process has written it
            load_weights(student, self._best.read()[0])
        return trainer.accelerator.unwrap_model(trainer.model), trainer.whole_weights()

    def _logged(self, step: int, figures: Figures) -> None:
        """Log figures, with those of the teacher."""
        self.hooks.logged(step, {**figures, **self.view.taught_by.figures()})

    @property
    def _choosing(self) -> HeldOut | None:
        """The rows that choose the best student."""
        return self.validation or self.heldout

    @property
    def _best(self) -> BestModel | None:
        """The best student so far; None if that of the last step is saved."""
        figure = self.spec.training.keep_best
        if figure is None:
            return None
        known = [*METRICS, *self.resolved.choosing.metrics]
        return BestModel.by(self.run, figure, known, validation=self.validation is not None)

    def _offered(self, model: Any) -> HeldOutResults:
        """Measure the student on the choosing rows, and store it if it is the best so far."""
        found = self._results(model, self._choosing, self.resolved.choosing)
        if self._best is not None:
            self._best.offer(found, lambda: changing_weights(model))
        return found

    def _judge(self, model: Any, ranks: Ranks) -> HeldOutResults:
        """Measure the student in its present state: held-out figures and sample answers.

        The weights change, so the model itself answers and no engine is converted from it.
        """
        found = self._results(model, self.heldout, self.resolved.scores, ranks)
        asked = self._named(model, "the student")
        return dataclasses.replace(found, answers=self._answers(asked, ranks))

    def _results(
        self, model: Any, rows: HeldOut | None, scores: Scores, ranks: Ranks = ALONE
    ) -> HeldOutResults:
        """Measure a student on rows, and score its answers to their prompts."""
        if rows is None:
            return HeldOutResults()
        measured = rows.measure(self.view, model, self.resolved.method.objective.gates)
        asked, evaluation = self._named(model, "the student"), self.spec.evaluation
        said = judged(scores, asked, evaluation, self.hooks.progress, ranks=ranks)
        measured = dataclasses.replace(measured, scores=said)
        return HeldOutResults(measured.means(), measured)

    def _gated(self, engine: LossEngine, model: Any) -> list[GatedResponse]:
        """The gate weights of the first held-out responses; none without text or their teacher."""
        loaded = self.models.first
        if not (self.heldout and self.view.taught_by.has_any and loaded.model.can_generate()):
            return []
        shown = [self.heldout.rows[n] for n in range(min(ROWS, len(self.heldout.rows)))]
        device = model.device
        padded = collate(shown, padding(loaded.tokenizer))
        batch = batch_of(padded, device)
        model.eval()
        theirs = self.view.teacher(batch)
        assert theirs is not None  # has_any
        with torch.no_grad():
            ours = self.view.student(model, batch)
        return judged_responses(
            engine,
            ours,
            theirs,
            batch,
            ids=[row.id for _, row in shown],
            tokenizer=loaded.tokenizer,
            generator=torch.Generator().manual_seed(self.spec.seed),
            reference=self.view.reference(batch),
        )

    def _answers(self, asked: LoadedModel, ranks: Ranks = ALONE) -> list[str]:
        evaluation = self.spec.evaluation
        return answers(
            self.prompts,
            asked,
            self.hooks.progress,
            f"{asked.name}'s samples",
            batch_size=evaluation.batch_size,
            max_new_tokens=evaluation.sample_tokens,
            ranks=ranks,
        )

    def _named(self, model: Any, name: str) -> LoadedModel:
        """The model with the tokenizer that encodes the rows."""
        return dataclasses.replace(self.models.first, model=model, name=name)

    def _report(self, before: HeldOutResults, after: HeldOutResults, theirs: Sequence[str]) -> None:
        """Write the student's figures, samples and card; ``theirs``: the teacher's answers."""
        told = {"teacher": theirs, "before": before.answers, "after": after.answers}
        samples = [
            {"prompt": question(c)} | {who: each[place] for who, each in told.items() if each}
            for place, c in enumerate(self.prompts)
        ]
        figures = before.figures, after.figures
        self.run.write(HELDOUT_ROWS, HeldOutRows(before.rows, after.rows))
        metrics = [*shown(after.figures), *self.resolved.scores.metrics]
        best = self._best
        kept_by, flattered = (best.criterion, best.reported) if best else (None, None)
        results = TrainingResults(*figures, metrics, samples, kept_by, flattered)
        self.run.write(TRAINING_RESULTS, results)
        card = model_card(self.spec, *figures, metrics, self.run.facts.versions, kept_by)
        self.run.write_text("model/README.md", card)
        self.run.write_text("README.md", card)  # last, because it marks the run as finished
