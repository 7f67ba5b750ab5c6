"""Train a student from a teacher: the whole path, from a spec to a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, set_seed

from kdcore.data.conversation import Conversation
from kdcore.data.responses.on_policy import OnPolicy
from kdcore.data.rows import RowDataset, batch_of, collate, note_shared_rows, padding
from kdcore.data.teacher_cache import TeacherCache
from kdcore.evaluation.answers import answers, judged, question, references
from kdcore.evaluation.heldout import HeldOut
from kdcore.evaluation.token_gates import ROWS, judged_responses
from kdcore.jobs.model_card import model_card
from kdcore.method.logits import HiddenLogits, TeacherLogits, no_teacher
from kdcore.method.loss_engine import LossEngine
from kdcore.method.objective import Objective
from kdcore.method.protocols import DataSource
from kdcore.method.records import Batch
from kdcore.method.registry import Registry, installed
from kdcore.models.assembly import Assembly
from kdcore.models.facts import describe_model, end_ids
from kdcore.models.loaded import LoadedModel
from kdcore.models.pair import TeacherAndStudent, refuse_features, refuse_no_teacher
from kdcore.runs.facts import ModelOrigin
from kdcore.runs.folder import Run
from kdcore.runs.hooks import RunHooks
from kdcore.runs.inputs import settle
from kdcore.runs.progress import Progress
from kdcore.runs.results import (
    HELDOUT_ROWS,
    METRICS,
    TOKEN_GATES,
    TRAINING_RESULTS,
    GatedResponse,
    HeldOutResults,
    HeldOutRows,
    Measured,
    TrainingResults,
    shown,
)
from kdcore.specs.distill import DistillSpec
from kdcore.training.arguments import micro_batches, training_arguments
from kdcore.training.method import Method
from kdcore.training.probe import Probe
from kdcore.training.rows import read_rows, settle_rows
from kdcore.training.run import measured_before, training_run
from kdcore.training.trainer import DistillationTrainer, Figures
from kdcore.training.views import ModelView


def distill(
    spec: DistillSpec,
    *,
    registry: Registry | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Carry out a spec; the returned run's folder holds the student.

    Raises UserError for what the user can mend (see `kdcore.runs.folder.Run.open`,
    `kdcore.models.loading`, `kdcore.data`), TrainingDiverged when the loss is not finite.
    """
    registry = registry or installed()

    def work(hooks: RunHooks) -> None:
        _Distillation.prepare(spec, hooks).carry_out()

    return training_run(spec, work, registry, overwrite=overwrite, resume=resume, progress=progress)


@dataclass(frozen=True)
class _Distillation:
    """Everything a run needs, loaded and checked."""

    spec: DistillSpec
    hooks: RunHooks
    run: Run
    progress: Progress
    models: TeacherAndStudent
    method: Method
    train: RowDataset
    heldout: HeldOut | None
    prompts: Sequence[Conversation]
    questions: Sequence[Conversation]
    cache: TeacherCache | None
    keys: Sequence[bytes]
    """Of every row that is trained on, in the cache."""

    @classmethod
    def prepare(cls, spec: DistillSpec, hooks: RunHooks) -> _Distillation:
        """Build the method first, since it costs nothing, then load models and rows."""
        registry, run, progress = hooks.registry, hooks.run, hooks.progress
        assembly = Assembly(registry)
        method = Method.build(spec, assembly, run)
        refuse_no_teacher(spec, method.objective)
        sources = {n: assembly.build(choice) for n, choice in spec.data.sources.items()}
        questions = questions_of(spec, sources)

        set_seed(spec.seed)  # new weights of the student, such as adapters, are drawn
        models = TeacherAndStudent.load(
            spec, sources, reference=method.objective.reference, progress=progress
        )
        cache = open_cache(spec, method.objective, models)
        refuse_features(spec, method.objective, models)
        run.update(**{n: ModelOrigin(m.name, m.digest) for n, m in models.named.items()})
        _settle_models(run, spec, models, method.objective.reference, cache)
        readers = list(models.named.values())
        rows, asked = read_rows(sources["train"], "train", spec, readers, run, progress)
        settle_rows(run, "train", spec, rows, asked, models.first)
        micro_batches(spec, len(rows))  # refuses what would make no step
        keys = cache.keys_of(rows.rows) if cache is not None else []
        measured: HeldOut | None = None
        prompts: list[Conversation] = []
        if heldout := sources.get("heldout"):
            found, examples = read_rows(heldout, "heldout", spec, readers, run, progress)
            settle_rows(run, "heldout", spec, found, examples, models.first)
            note_shared_rows(rows, found, progress)
            size, chunk = spec.evaluation.batch_size, spec.training.chunk
            fill = padding(models.first.tokenizer)
            measured = HeldOut(found, fill, size, chunk, spec.seed, progress)
            prompts += [e for e in examples if isinstance(e, Conversation)]
        return cls(
            spec,
            hooks,
            run,
            progress,
            models,
            method,
            rows,
            measured,
            prompts[: spec.evaluation.samples],
            questions,
            cache,
            keys,
        )

    def carry_out(self) -> None:
        """Measure, train, measure again, save."""
        arguments = training_arguments(self.spec, self.run)
        for loaded in self.models.named.values():
            loaded.model.to(arguments.device)  # type: ignore[arg-type]
        student, third = self.models.student.model, self.models.reference
        views = {n: ModelView(m.model, self.models.classes) for n, m in self.models.named.items()}

        def both(student: Callable[..., Any], batch: Batch) -> tuple[HiddenLogits, TeacherLogits]:
            return views["student"](student, batch), self._of_teacher(views, batch)

        @torch.no_grad()
        def reference(batch: Batch) -> TeacherLogits | None:
            return views["reference"](third.model, batch) if third else None

        def figures() -> Figures:
            measured = self._measured(views, student)
            return measured.means() if measured else {}

        before = measured_before(self.run, self.spec, lambda: self._judge(views, student))
        checkpoint = self.run.checkpoint()
        done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        self.run.forget_after(done)
        engine = LossEngine(self.method.objective, self.method.streams, self.spec.training.chunk)
        trainer = DistillationTrainer(
            model=student,
            args=arguments,
            engine=engine,
            view=both,
            policy=self.method.policy,
            row_ids=lambda index: self.train.rows[index].id,
            step_done=lambda step, figures: stage.advance(loss=figures["loss"]),
            logged=self._logged,
            evaluator=figures,
            reference=reference,
            on_policy=self._on_policy(),
            probe=Probe.of(self.spec.training),
            train_dataset=self.train,
            eval_dataset=self.heldout and self.heldout.rows,
            data_collator=lambda rows: collate(rows, padding(self.models.first.tokenizer)),
            processing_class=self.models.first.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        total = trainer.planned_steps()
        with self.progress.stage("train", total, done) as stage:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

        model = trainer.accelerator.unwrap_model(trainer.model)
        after = self._judge(views, model)
        gated = self._gated(engine, views, model, reference)
        weights = trainer.whole_weights()
        if self.run.writes:
            self.run.write(TOKEN_GATES, gated)
            self._save(model, weights, before, after)

    def _of_teacher(self, views: Mapping[str, ModelView], batch: Batch) -> TeacherLogits:
        """From the cache, or from the teacher itself, or of no classes where there is none."""
        if self.cache is not None:
            keys = [self.keys[place] for place in batch.index.tolist()]
            return self.cache.logits(keys, batch.mask.device)
        if self.models.teacher is None:
            return no_teacher(batch)
        with torch.no_grad():
            return views["teacher"](self.models.teacher.model, batch)

    def _on_policy(self) -> OnPolicy | None:
        asked, models = self.spec.data.on_policy, self.models
        if asked is None or models.teacher is None:
            return None
        contexts = [describe_model(m).context for m in (models.teacher, models.student)]
        positions = min(self.spec.data.max_length, *(c for c in contexts if c is not None))
        ends = end_ids(self._named(models.student.model, "the student"))
        rows, teacher = self.train.rows, models.teacher.model
        return OnPolicy(asked, rows, teacher, ends, models.classes, positions)

    def _judge(self, views: Mapping[str, ModelView], model: Any) -> HeldOutResults:
        """The held-out figures and the sample answers of the student as it is."""
        measured = self._measured(views, model)
        if measured:
            evaluation, asked = self.spec.evaluation, self._named(model, "the student")
            scores = judged(self.questions, asked, evaluation, self.progress)
            measured = dataclasses.replace(measured, scores=scores)
        figures = measured.means() if measured else {}
        return HeldOutResults(figures, measured, self._answers(model, "the student"))

    def _measured(self, views: Mapping[str, ModelView], model: Any) -> Measured | None:
        if self.heldout is None:
            return None
        loaded = self.models.teacher
        teacher = (views["teacher"], loaded.model) if loaded else None
        return self.heldout.measure((views["student"], model), teacher, self.method.objective.gates)

    def _gated(
        self,
        engine: LossEngine,
        views: Mapping[str, ModelView],
        model: Any,
        reference: Callable[[Batch], TeacherLogits | None],
    ) -> list[GatedResponse]:
        """What the gates give the first held-out responses, where there is text and a teacher."""
        loaded = self.models.teacher
        if self.heldout is None or loaded is None or not loaded.model.can_generate():
            return []
        shown = [self.heldout.rows[n] for n in range(min(ROWS, len(self.heldout.rows)))]
        device = model.device
        padded = collate(shown, padding(loaded.tokenizer))
        batch = batch_of({name: each.to(device) for name, each in padded.items()})
        model.eval()
        with torch.no_grad():
            ours = views["student"](model, batch)
            theirs = views["teacher"](loaded.model, batch)
        return judged_responses(
            engine,
            ours,
            theirs,
            batch,
            ids=[row.id for _, row in shown],
            tokenizer=loaded.tokenizer,
            generator=torch.Generator(device).manual_seed(self.spec.seed),
            reference=reference(batch),
        )

    def _answers(self, model: Any, name: str) -> list[str]:
        asked, evaluation = self._named(model, name), self.spec.evaluation
        return answers(
            self.prompts,
            asked,
            self.progress,
            f"{name}'s samples",
            batch_size=evaluation.batch_size,
            max_new_tokens=evaluation.sample_tokens,
        )

    def _named(self, model: Any, name: str) -> LoadedModel:
        """With the tokenizer that the rows are made with."""
        return dataclasses.replace(self.models.first, model=model, name=name)

    def _logged(self, step: int, figures: Figures) -> None:
        self.run.log(step, figures)
        self.hooks.tell("kdcore_step_done", step=step, metrics=figures)

    def _save(
        self, model: Any, weights: Any, before: HeldOutResults, after: HeldOutResults
    ) -> None:
        """The student, the table and the card. weights: of a sharded student, whole; else None."""
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(self.run.path("adapter"))
            model = model.merge_and_unload()
        model.save_pretrained(self.run.path("model"), state_dict=weights)
        # The teacher's: it has the chat template that the rows were made with, and the same ids.
        self.models.first.tokenizer.save_pretrained(self.run.path("model"))
        told = {"before": before.answers, "after": after.answers}
        if self.models.teacher is not None:
            told = {"teacher": self._answers(self.models.teacher.model, "the teacher"), **told}
        samples = [
            {"prompt": question(c)} | {who: each[place] for who, each in told.items() if each}
            for place, c in enumerate(self.prompts)
        ]
        figures = before.figures, after.figures
        self.run.write(HELDOUT_ROWS, HeldOutRows(before.rows, after.rows))
        self.run.write(TRAINING_RESULTS, TrainingResults(*figures, shown(after.figures), samples))
        card = model_card(self.spec, *figures, METRICS, self.run.facts.versions)
        self.run.write_text("model/README.md", card)
        self.run.write_text("README.md", card)  # last: a folder that has it is finished


def questions_of(spec: DistillSpec, sources: Mapping[str, DataSource]) -> Sequence[Conversation]:
    """The held-out prompts whose answers are to be judged.

    Raises UserError when they could not be judged in the end.
    """
    questions = sources["heldout"].read() if spec.evaluation.answers else []
    references(questions, spec.evaluation)
    return questions


def open_cache(
    spec: DistillSpec, objective: Objective, models: TeacherAndStudent
) -> TeacherCache | None:
    """The cache that the spec names, if any.

    Raises UserError when it was made from something else, or holds less than the method needs.
    """
    if spec.data.teacher_cache is None:
        return None
    cache = TeacherCache(spec.data.teacher_cache)
    cache.refuse_other_origin(models.first, models.classes, is_teacher=models.teacher is not None)
    cache.refuse_method(objective)
    return cache


def _settle_models(
    run: Run,
    spec: DistillSpec,
    models: TeacherAndStudent,
    reference: str | None,
    cache: TeacherCache | None,
) -> None:
    """Raises OtherInput as `settle` does."""
    named = spec.model_dump(mode="json", include={"teacher", "student"})
    asked = {"teacher": named["teacher"], "student": named, "reference": reference}
    for name, loaded in models.named.items():
        settle(run, f"the {name}", asked[name], loaded.digest)
    if cache is not None:
        settle(run, "the teacher cache", str(cache.folder), cache.manifest.digest)
