"""The distill job: train a student from a teacher, from a spec to a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from kdcore.data.conversation import Conversation
from kdcore.data.ranks import ALONE, Ranks
from kdcore.data.responses.on_policy import OnPolicy
from kdcore.data.rows import RowDataset, batch_of, collate, note_shared_rows, padding
from kdcore.evaluation.answers import answers, judged, question
from kdcore.evaluation.heldout import HeldOut
from kdcore.evaluation.token_gates import ROWS, judged_responses
from kdcore.jobs.model_card import model_card
from kdcore.jobs.resolved import ResolvedDistill
from kdcore.method.loss_engine import LossEngine
from kdcore.method.registry import Registry, installed
from kdcore.models.adapters import merged
from kdcore.models.device import chunk_on, process_device
from kdcore.models.facts import describe_model, end_ids
from kdcore.models.loaded import LoadedModel
from kdcore.models.pair import TeacherAndStudent
from kdcore.runs.facts import ModelOrigin
from kdcore.runs.folder import Run
from kdcore.runs.hooks import RunHooks
from kdcore.runs.inputs import settle
from kdcore.runs.progress import Progress
from kdcore.runs.results import (
    HELDOUT_ROWS,
    TOKEN_GATES,
    TRAINING_RESULTS,
    GatedResponse,
    HeldOutResults,
    HeldOutRows,
    Measured,
    TrainingResults,
    shown,
)
from kdcore.runs.today import today
from kdcore.specs.distill import DistillSpec
from kdcore.training.arguments import (
    StepDecay,
    lost_updates,
    micro_batches,
    processes,
    training_arguments,
)
from kdcore.training.probe import Probe
from kdcore.training.rows import TrainingRows, read_rows, settle_rows
from kdcore.training.run import measured_before, train_to_the_end, training_run
from kdcore.training.trainer import DistillationTrainer, Figures
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
            `kdcore.runs.folder.Run.open`, `kdcore.models.loading`, `kdcore.data`).
        TrainingDiverged: The loss became NaN or infinite.
    """
    registry = registry or installed()

    def work(hooks: RunHooks) -> None:
        _Distillation.prepare(spec, hooks).carry_out()

    return training_run(spec, work, registry, overwrite=overwrite, resume=resume, progress=progress)


@dataclass(frozen=True)
class _Distillation:
    """A distillation with its models and rows, loaded and checked."""

    resolved: ResolvedDistill
    hooks: RunHooks
    train: RowDataset
    heldout: HeldOut | None
    prompts: Sequence[Conversation]
    view: StudentView

    @classmethod
    def prepare(cls, spec: DistillSpec, hooks: RunHooks) -> _Distillation:
        """Resolve the spec, then read the training and held-out rows."""
        run, progress = hooks.run, hooks.progress
        resolved = ResolvedDistill.of(spec, hooks.registry, run, progress=progress)
        models, cache, sources = resolved.models, resolved.cache, resolved.sources
        origins = {n: ModelOrigin(m.name, m.digest) for n, m in models.named.items()}
        run.update(date=str(today().date()), **origins)  # that of the cache, if there is one
        _settle_models(run, resolved)

        def read(name: str) -> TrainingRows:
            readers = resolved.readers
            return read_rows(sources[name], name, spec, readers, run, progress, hooks.registry)

        train = read("train")
        settle_rows(run, "train", spec, train, models.first)
        rows = train.encoded
        if warning := lost_updates(spec, models.student.model.dtype):
            progress.note(f"warning: {warning}")
        micro_batches(spec, len(rows))  # refuses a spec whose run would make no step
        measured: HeldOut | None = None
        prompts: list[Conversation] = []
        if "heldout" in sources:
            held = read("heldout")
            settle_rows(run, "heldout", spec, held, models.first)
            note_shared_rows(rows, held.encoded, progress)
            size = spec.evaluation.batch_size
            chunk = chunk_on(process_device(), spec.training.chunk, models.classes)
            fill = padding(models.first.tokenizer)
            measured = HeldOut(held.encoded, fill, size, chunk, spec.seed, progress)
            told = (e for e in held.examples() if isinstance(e, Conversation))
            prompts += islice(told, spec.evaluation.samples)
        view = StudentView(
            models.student.model,
            models.classes,
            teacher=models.teacher.model if models.teacher else None,
            reference=models.reference.model if models.reference else None,
            cache=cache,
            keys=cache.keys_of(rows.rows) if cache is not None else (),
        )
        return cls(resolved, hooks, rows, measured, prompts, view)

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
        tokenizer = self.models.first.tokenizer

        def figures() -> Figures:
            measured = self._measured(student)
            return measured.means() if measured else {}

        ranks = Ranks(processes(self.spec))
        before = measured_before(self.run, self.spec, lambda: self._judge(student, ranks))
        chunk = chunk_on(arguments.device, self.spec.training.chunk, self.models.classes)
        engine = LossEngine(method.objective, method.streams, chunk)
        trainer = DistillationTrainer(
            model=student,
            args=arguments,
            engine=engine,
            view=self.view,
            policy=method.policy,
            row_ids=lambda index: self.train.rows[index].id,
            logged=self.hooks.logged,
            evaluator=figures,
            on_policy=self._on_policy(),
            probe=Probe.of(self.spec.training),
            decay=StepDecay.of(self.spec.training),
            train_dataset=self.train,
            eval_dataset=self.heldout and self.heldout.rows,
            data_collator=lambda rows: collate(rows, padding(tokenizer)),
            processing_class=tokenizer,
        )
        train_to_the_end(trainer, self.run, self.hooks.progress)

        weights = trainer.whole_weights()
        model = self._saved(trainer.accelerator.unwrap_model(trainer.model), weights)
        # the passes of a sharded model need every process at once
        after = self._judge(model, ranks if weights is None else ALONE)
        gated = self._gated(engine, model)
        if self.run.writes:
            self.run.write(TOKEN_GATES, gated)
            self._report(before, after)

    def _on_policy(self) -> OnPolicy | None:
        asked, models = self.spec.data.on_policy, self.models
        if asked is None or models.teacher is None:
            return None
        contexts = [describe_model(m).context for m in (models.teacher, models.student)]
        positions = min(self.spec.data.max_length, *(c for c in contexts if c is not None))
        ends = end_ids(self._named(models.student.model, "the student"))
        rows, teacher = self.train.rows, models.teacher.model
        return OnPolicy(asked, rows, teacher, ends, models.classes, positions)

    def _judge(self, model: Any, ranks: Ranks) -> HeldOutResults:
        """Measure the student in its present state: held-out figures and sample answers.

        The weights change, so the model itself answers and no engine is converted from it.
        """
        measured = self._measured(model)
        if measured:
            evaluation, asked = self.spec.evaluation, self._named(model, "the student")
            asks, progress = self.resolved.scores, self.hooks.progress
            scores = judged(asks, asked, evaluation, progress, ranks=ranks)
            measured = dataclasses.replace(measured, scores=scores)
        figures = measured.means() if measured else {}
        return HeldOutResults(figures, measured, self._answers(model, "the student", ranks))

    def _measured(self, model: Any) -> Measured | None:
        if self.heldout is None:
            return None
        gates = self.resolved.method.objective.gates
        return self.heldout.measure(self.view, model, gates)

    def _gated(self, engine: LossEngine, model: Any) -> list[GatedResponse]:
        """The gate weights of the first held-out responses; none without text or a live teacher."""
        loaded = self.models.teacher
        if self.heldout is None or loaded is None or not loaded.model.can_generate():
            return []
        shown = [self.heldout.rows[n] for n in range(min(ROWS, len(self.heldout.rows)))]
        device = model.device
        padded = collate(shown, padding(loaded.tokenizer))
        batch = batch_of(padded, device)
        model.eval()
        theirs = self.view.teacher(batch)
        assert theirs is not None  # there is a live teacher
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

    def _answers(self, model: Any, name: str, ranks: Ranks = ALONE) -> list[str]:
        asked, evaluation = self._named(model, name), self.spec.evaluation
        return answers(
            self.prompts,
            asked,
            self.hooks.progress,
            f"{name}'s samples",
            batch_size=evaluation.batch_size,
            max_new_tokens=evaluation.sample_tokens,
            ranks=ranks,
        )

    def _named(self, model: Any, name: str) -> LoadedModel:
        """The model with the tokenizer that encodes the rows."""
        return dataclasses.replace(self.models.first, model=model, name=name)

    def _saved(self, model: Any, weights: Any) -> Any:
        """Save the student, and return it as saved; ``weights``: those of a sharded student.

        It is saved before it is judged: a failure there must not lose what was trained.
        """
        adapted = hasattr(model, "merge_and_unload")
        if adapted and self.run.writes:
            model.save_pretrained(self.run.path("adapter"))
        model = merged(model) if adapted else model
        if self.run.writes:
            model.save_pretrained(self.run.path("model"), state_dict=weights)
            # The teacher's tokenizer: it has the chat template of the rows, and the same ids.
            self.models.first.tokenizer.save_pretrained(self.run.path("model"))
        return model

    def _report(self, before: HeldOutResults, after: HeldOutResults) -> None:
        """Write the student's figures, samples and card."""
        told = {"before": before.answers, "after": after.answers}
        if self.models.teacher is not None:
            told = {"teacher": self._answers(self.models.teacher.model, "the teacher"), **told}
        samples = [
            {"prompt": question(c)} | {who: each[place] for who, each in told.items() if each}
            for place, c in enumerate(self.prompts)
        ]
        figures = before.figures, after.figures
        self.run.write(HELDOUT_ROWS, HeldOutRows(before.rows, after.rows))
        metrics = [*shown(after.figures), *self.resolved.scores.metrics]
        self.run.write(TRAINING_RESULTS, TrainingResults(*figures, metrics, samples))
        card = model_card(self.spec, *figures, metrics, self.run.facts.versions)
        self.run.write_text("model/README.md", card)
        self.run.write_text("README.md", card)  # last, because it marks the run as finished


def _settle_models(run: Run, resolved: ResolvedDistill) -> None:
    """Record the models and the cache as inputs. Raises OtherInput as `settle` does."""
    named = resolved.spec.model_dump(mode="json", include={"teacher", "student"})
    reference = resolved.method.objective.reference
    asked = {"teacher": named["teacher"], "student": named, "reference": reference}
    for name, loaded in resolved.models.named.items():
        settle(run, f"the {name}", asked[name], loaded.digest)
    if resolved.cache is not None:
        cache = resolved.cache
        settle(run, "the teacher cache", str(cache.folder), cache.manifest.digest)
