"""The train-drafter job: as `kdcore.jobs.distill`, but with the drafter's anchors as rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcore.components.registry import Registry, installed
from kdcore.data.batching.anchors import AnchorCollation
from kdcore.data.batching.batches import Batches
from kdcore.data.caches.hidden_states import HiddenStates, store
from kdcore.data.conversation import Conversation
from kdcore.data.ranks import Ranks
from kdcore.data.rows import (
    RowDataset,
    batch_of,
    collate,
    learned_tokens,
    note_shared_rows,
    padding,
)
from kdcore.data.templates.mask import prompt_ids
from kdcore.decoding.build import greedy_decoder
from kdcore.decoding.drafters.files import save_drafter, template_digest
from kdcore.decoding.loop import Stop
from kdcore.decoding.trials.tree_probe import refuse_unfaithful
from kdcore.errors import UserError, in_field
from kdcore.evaluation.drafts import HeldOutDrafts, feature_rms, metrics
from kdcore.evaluation.replay import REPLAYED, replay
from kdcore.jobs.model_card import drafter_card
from kdcore.jobs.resolution.resolved_drafter import ResolvedDrafter, origin_of
from kdcore.method.loss_engine import LossEngine
from kdcore.method.records import Row
from kdcore.models.device import chunk_on, pins_memory, process_device
from kdcore.models.facts import end_ids
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.facts import ModelOrigin
from kdcore.runs.folder import Run
from kdcore.runs.hooks import RunHooks
from kdcore.runs.inputs import settle
from kdcore.runs.progress import Progress
from kdcore.runs.results import (
    HELDOUT_ROWS,
    REPLAYS,
    TRAINING_RESULTS,
    HeldOutResults,
    HeldOutRows,
    Replay,
    TrainingResults,
)
from kdcore.specs.train_drafter import TrainDrafterSpec
from kdcore.training.arguments import micro_batches, processes, training_arguments
from kdcore.training.rows import read_rows, settle_rows
from kdcore.training.run import measured_before, train_to_the_end, training_run
from kdcore.training.trainer.best import BestModel
from kdcore.training.trainer.lookahead import RowsAhead
from kdcore.training.trainer.probe import Probe
from kdcore.training.trainer.step_decay import StepDecay
from kdcore.training.trainer.trainer import DistillationTrainer
from kdcore.training.views import DrafterView


def train_drafter(
    spec: TrainDrafterSpec,
    *,
    registry: Registry | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train a drafter by a train-drafter spec.

    Args:
        spec: The train-drafter spec.
        registry: The components that the spec may name (default: the installed ones).
        overwrite: Whether an existing run folder is replaced.
        resume: Whether an unfinished run is continued.
        progress: The display of stages and notes (default: none).

    Returns:
        The run, whose folder holds the drafter.

    Raises:
        UserError: The folder, the target, the drafter or the data cannot be used.
        TrainingDiverged: The loss became NaN or infinite.
    """
    registry = registry or installed()

    def work(hooks: RunHooks) -> None:
        _Drafting.prepare(spec, hooks).carry_out()

    return training_run(spec, work, registry, overwrite=overwrite, resume=resume, progress=progress)


@dataclass(frozen=True)
class _Drafting:
    """A drafter training with its models and rows, loaded and checked."""

    resolved: ResolvedDrafter
    hooks: RunHooks
    train: RowDataset
    heldout: HeldOutDrafts | None
    validation: HeldOutDrafts | None
    prompts: Sequence[Conversation]

    @classmethod
    def prepare(cls, spec: TrainDrafterSpec, hooks: RunHooks) -> _Drafting:
        """Resolve the spec, then read the rows of all sources."""
        run, progress = hooks.run, hooks.progress
        resolved = ResolvedDrafter.of(spec, hooks.registry, run, progress=progress)
        target = resolved.target
        try:
            refuse_unfaithful(target.model)
        except UserError as wrong:  # a note and not an error: another engine may decode with it
            progress.note(f"kdcore will not decode with this drafter: {wrong.cause}")
        run.update(target=ModelOrigin(target.name, target.digest))
        settle(run, "the target", spec.target.model_dump(mode="json"), target.digest)
        read = {
            name: read_rows(source, name, spec, [target], run, progress, hooks.registry)
            for name, source in resolved.sources.items()
        }
        rows = {name: each.encoded for name, each in read.items()}
        for name, each in read.items():
            settle_rows(run, name, spec, each, target)
        micro_batches(spec, len(rows["train"]))  # refuses a spec whose run would make no step
        resolved.drafter.choose_vocabulary(learned_tokens(rows["train"].rows, target.classes))
        pad = padding(target.tokenizer)
        size, candidates = spec.evaluation.batch_size, spec.evaluation.candidates
        chunk = chunk_on(process_device(), spec.training.chunk, target.classes)
        measured = {
            name: HeldOutDrafts(of, pad, size, candidates, chunk, progress)
            for name, of in rows.items()
            if name != "train"
        }
        heldout, validation = measured.get("heldout"), measured.get("validation")
        if heldout:
            note_shared_rows(rows["train"], heldout.rows, progress)
        if heldout and validation:
            note_shared_rows(validation.rows, heldout.rows, progress, "chosen on")
        elif heldout and spec.training.eval_every:
            progress.note(
                "the best drafter is chosen on the reported held-out rows, which makes its figures "
                "optimistic: set data.validation to other rows"
            )
        prompts = read["heldout"].examples() if "heldout" in read else []
        return cls(resolved, hooks, rows["train"], heldout, validation, prompts)

    @property
    def spec(self) -> TrainDrafterSpec:
        """The resolved spec."""
        return self.resolved.spec

    @property
    def target(self) -> LoadedModel:
        """The target model."""
        return self.resolved.target

    @property
    def drafter(self) -> Any:
        """The drafter that is trained."""
        return self.resolved.drafter

    @property
    def run(self) -> Run:
        """The run folder."""
        return self.hooks.run

    def carry_out(self) -> None:
        """Measure, train, measure again, and save the best drafter."""
        arguments = training_arguments(self.spec, self.run)
        target = self.target.model
        self.target.to(arguments.device)
        self.drafter.to(arguments.device)
        view = DrafterView(target, self.drafter)
        stored = self._stored(view)
        training = DrafterView(target, self.drafter, stored)

        before = measured_before(self.run, self.spec, lambda: self._measured(view, self.heldout))
        pad = padding(self.target.tokenizer)
        chunk = chunk_on(arguments.device, self.spec.training.chunk, self.target.classes)
        method, tokenizer = self.resolved.method, self.target.tokenizer
        depth, vocabulary = self.drafter.depth, self.drafter.vocabulary
        vocabulary = None if vocabulary is None else vocabulary.cpu()
        batches = Batches.of(
            self.spec.training,
            self.train,
            pad,
            seed=self.spec.seed,
            capacity=self.spec.data.max_length,
            processes=arguments.world_size,
        )
        trainer = DistillationTrainer(
            model=self.drafter,
            args=arguments,
            engine=LossEngine(method.objective, method.streams, chunk),
            view=training,
            policy=method.policy,
            row_ids=lambda index: self.train.rows[index].id,
            logged=self.hooks.logged,
            evaluator=lambda: self._judge(view).figures,
            ahead=RowsAhead(stored) if stored else None,
            probe=Probe.of(self.spec.training),
            decay=StepDecay.of(self.spec.training),
            train_dataset=batches.items,
            order=batches.order,
            best=self._best if self.spec.training.patience else None,
            patience=self.spec.training.patience,
            eval_dataset=self._choosing and self._choosing.rows,
            data_collator=AnchorCollation(batches.collate, depth, vocabulary),
            processing_class=tokenizer,
        )
        train_to_the_end(trainer, self.run, self.hooks.progress)

        if self.run.writes:  # before it is judged: a failure there must not lose what was trained
            self._save_drafter(view, {})
        if self._best is not None and not self._best.measured_at_end(trainer.state):
            self._judge(view)
        if self.run.writes:
            self._save(view, before, self._kept(view))

    def _stored(self, view: DrafterView) -> HiddenStates | None:
        """Store the target's hidden states of the training rows, if the spec says so."""
        asked = self.spec.data.hidden_states
        if asked is None:
            return None
        rows = self.train.rows
        folder = asked.folder or self.run.path("hidden_states")
        with in_field("data.hidden_states"):
            store(
                folder,
                origin_of(asked, self.drafter, self.target),
                rows,
                asked.limit_gb,
                lambda part: self._read(view, part),
                self.hooks.progress,
                Ranks(processes(self.spec)),
            )
        device = self.target.model.device
        return HiddenStates(folder, rows, pinned=pins_memory(device))

    def _read(self, view: DrafterView, rows: Sequence[Row]) -> Iterator[Tensor]:
        """Yield each row's features and last hidden states [T, F + H], without padding."""
        size, pad = self.spec.training.batch_size, padding(self.target.tokenizer)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = batch_of(collate(list(enumerate(part)), pad), self.target.model.device)
            with in_field("target"):
                states = torch.cat(view.read(batch), dim=-1)
            yield from (each[: len(row.labels)] for each, row in zip(states, part, strict=True))

    @property
    def _choosing(self) -> HeldOutDrafts | None:
        """The rows that choose the best drafter."""
        return self.validation or self.heldout

    @property
    def _best(self) -> BestModel | None:
        """The best drafter so far. Raises UserError for an unknown figure."""
        if self._choosing is None:
            return None
        figure = self.spec.training.keep_best or "tau"
        known = metrics(self.drafter.depth, self.spec.evaluation.candidates)
        return BestModel.by(self.run, figure, known, validation=self.validation is not None)

    def _judge(self, view: DrafterView) -> HeldOutResults:
        """Measure the drafter on the choosing rows, and store it if it is the best so far."""
        found = self._measured(view, self._choosing)
        if self._best is not None:
            self._best.offer(found, self.drafter.state_dict)
        return found

    def _kept(self, view: DrafterView) -> HeldOutResults:
        """Load the weights of the best drafter, and return its held-out figures."""
        if self._best is None:
            return HeldOutResults()
        weights, found = self._best.read()
        self.drafter.load_state_dict(weights)
        return self._reported(view, found)

    def _reported(self, view: DrafterView, judged: HeldOutResults) -> HeldOutResults:
        """The reported figures of the present drafter, whose choosing figures are ``judged``."""
        return judged if self.validation is None else self._measured(view, self.heldout)

    def _measured(self, view: DrafterView, rows: HeldOutDrafts | None) -> HeldOutResults:
        if rows is None:
            return HeldOutResults()
        training = self.drafter.training
        drafted = rows.measure(view)
        self.drafter.train(training)
        return HeldOutResults(drafted.means(), drafted)

    def _feature_rms(self, view: DrafterView) -> list[float]:
        """The root mean square of each layer's features, over a few rows without padding."""
        rows = list(enumerate(self.train.rows[: self.spec.training.batch_size]))
        padded = collate(rows, padding(self.target.tokenizer))
        batch = batch_of(padded, self.target.model.device)
        features, _ = view.read(batch)
        real = batch.inputs["attention_mask"].bool()
        return feature_rms(features[real], len(self.drafter.layers))

    def _replays(self) -> list[Replay]:
        """Decode the first held-out prompt that leaves room for an answer, with the drafter."""
        self.drafter.eval()
        tokenizer, end = self.target.tokenizer, end_ids(self.target)
        try:
            decoder = greedy_decoder(self.target, self.drafter, self.hooks.registry)
            for conversation in self.prompts:
                prompt = prompt_ids(conversation, tokenizer)
                room = (decoder.session.limit or sys.maxsize) - len(prompt)
                if room > 0:
                    name, most = self.spec.drafter.name, min(room, REPLAYED)
                    return [replay(decoder, prompt, tokenizer, name, Stop(most, tuple(end)))]
        except UserError as wrong:  # a note and not an error: another engine may decode with it
            self.hooks.progress.note(f"the replay of the drafter is skipped: {wrong.cause}")
        return []

    def _save_drafter(self, view: DrafterView, figures: Mapping[str, float]) -> None:
        """Save the weights of the present drafter, and its held-out figures."""
        save_drafter(
            self.run.path("drafter"),
            self.drafter,
            self.spec.drafter,
            self.target,
            self.hooks.registry,
            template=template_digest(self.target),
            feature_rms=self._feature_rms(view),
            figures=figures,
        )

    def _save(self, view: DrafterView, before: HeldOutResults, after: HeldOutResults) -> None:
        """Save the drafter, its figures and its card."""
        shown = metrics(self.drafter.depth, self.spec.evaluation.candidates)
        best = self._best if self.spec.training.eval_every else None
        kept_by = None if best is None else best.criterion
        self._save_drafter(view, after.figures)
        figures = before.figures, after.figures
        results = TrainingResults(
            *figures,
            metrics=list(shown),
            kept_by=kept_by,
            kept_by_these_rows=best is not None and best.reported,
        )
        self.run.write(HELDOUT_ROWS, HeldOutRows(before.rows, after.rows))
        self.run.write(TRAINING_RESULTS, results)
        self.run.write(REPLAYS, self._replays())
        card = drafter_card(self.spec, *figures, shown, self.run.facts.versions, kept_by)
        self.run.write_text("drafter/README.md", card)
        self.run.write_text("README.md", card)  # last, because it marks the run as finished
