"""The subclass of transformers.Trainer: with `CheckpointingTrainer`, where kdcore changes it.

`get_batch_samples` samples the student's responses, and counts the rows or tokens that the loss is
averaged over; `training_step` computes the loss, the gradients of each stream and the momentum
policy's combination of them; `log` adds figures. Everything else (loop, accumulation,
clipping, optimizer, precision, processes, checkpoint intervals, trackers) is the Trainer's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import TrainingArguments

from kdcore.data.batching.faults import raise_fault
from kdcore.data.batching.grouping import set_epoch
from kdcore.data.responses.on_policy import OnPolicy
from kdcore.data.rows import batch_of, tokens_of
from kdcore.errors import RERUN, TrainingDiverged
from kdcore.method.gating import refuse_outside
from kdcore.method.generators import generator_at
from kdcore.method.loss_engine import LossEngine, StepLoss
from kdcore.method.protocols import MomentumPolicy
from kdcore.method.records import Batch
from kdcore.models.device import sent
from kdcore.training.step_scores import StepScores
from kdcore.training.stream_gradients import StreamGradients
from kdcore.training.trainer.auxiliary import Auxiliary, MicroBatch
from kdcore.training.trainer.best import BestModel
from kdcore.training.trainer.checkpointing import CheckpointingTrainer
from kdcore.training.trainer.figures import LogTheLast, StepFigures, StopWithoutGain
from kdcore.training.trainer.lookahead import RowsAhead
from kdcore.training.trainer.probe import Probe, momentum_norms, signal_to_noise
from kdcore.training.trainer.shards import several_backward_passes
from kdcore.training.trainer.step_decay import StepDecay
from kdcore.training.views import View

Figures = Mapping[str, float]


class DistillationTrainer(CheckpointingTrainer):
    """A Trainer whose loss and gradients come from the loss engine.

    Args:
        model: The model that is trained.
        args: The Trainer's own arguments.
        engine: The loss engine.
        view: Runs the model and its teacher, and returns their logits.
        policy: Combines the streams' gradients into one.
        row_ids: Returns the id of a training row by its index, for messages.
        logged: Called with a step and the figures that are logged there.
        evaluator: Returns figures on held-out rows, without the ``eval_`` prefix.
        on_policy: Replaces the rows' responses by responses that the student samples.
        ahead: Tells the teacher the rows of coming steps.
        probe: When to measure the terms' gradients, and on how many batches.
        decay: Step decay of the learning rate, instead of the schedule in ``args``.
        best: The best model by a held-out figure; ``evaluator`` offers it the weights.
        patience: Number of evaluations without a better figure after which the training stops.
        order: The order of the training rows; None for the Trainer's own.
        auxiliary: Further rows of each step, or None.
        streams: Stream -> the terms that share a backward pass, those of auxiliary rows too.

    Attributes:
        step_done: Called with each optimizer step and its figures as soon as they are known.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        engine: LossEngine,
        view: View,
        policy: MomentumPolicy,
        row_ids: Callable[[int], str],
        logged: Callable[[int, Figures], None],
        evaluator: Callable[[], Figures] | None = None,
        on_policy: OnPolicy | None = None,
        ahead: RowsAhead | None = None,
        probe: Probe | None = None,
        decay: StepDecay | None = None,
        best: BestModel | None = None,
        patience: int | None = None,
        order: Sampler[int] | None = None,
        auxiliary: Auxiliary | None = None,
        streams: Mapping[str, tuple[str, ...]] | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(model=model, args=args, **rest)
        self.loss_is_scaled_for_ga = True
        self.engine, self.view, self.policy = engine, view, policy
        self.row_ids, self.logged = row_ids, logged
        self.step_done: Callable[[int, Figures], None] = lambda step, figures: None
        self.evaluator, self.on_policy, self.probe = evaluator, on_policy, probe
        self.decay, self.ahead, self.order = decay, ahead, order
        self.auxiliary = auxiliary
        self.streams = streams or engine.streams
        self._micro_step, self._beside = 0, list[MicroBatch]()
        self._gradients = StreamGradients(policy, self.streams)
        self._probed: dict[str, float] = {}
        self._figures = StepFigures(self.accelerator)
        self._scores = StepScores(engine.objective.gates)
        self.add_callback(LogTheLast)
        if best is not None and patience is not None:
            self.add_callback(StopWithoutGain(best.figure, best.better, patience))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Build the learning rate scheduler, once."""
        if self.decay is not None and self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            given = cast(torch.optim.Optimizer, optimizer or self.optimizer)
            self.lr_scheduler = self.decay.scheduler(given, warmup, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the micro-batches of a step and the number that its loss is averaged over.

        The number covers all micro-batches and processes, so that neither accumulation nor the
        number of processes changes the loss. In an on-policy step (`OnPolicy`) the student's
        samples replace the rows' responses first.
        """
        ahead = self.ahead
        batches = ahead.over(epoch_iterator, self.state, self.args) if ahead else epoch_iterator
        samples, _ = super().get_batch_samples(batches, num_batches, device)
        for sample in samples:
            raise_fault(sample)
        if self.on_policy is not None:
            samples = self._sampled(self.on_policy, samples)
        if ahead:
            ahead.step(samples, self._progress)
        if self.auxiliary is not None:
            place = self.state.global_step, self.args.process_index
            beside = self.auxiliary.of_step(*place, self.args, len(samples))
            whole = self._whole(beside, device)
            self._beside = [self.auxiliary.micro_batch(each, whole) for each in beside]
        return samples, self._whole(samples, device)

    def _whole(self, samples: list[Any], device: torch.device) -> float:
        """The number of rows or tokens of a step that a loss is averaged over."""
        whole = sum(self._share(sample) for sample in samples)
        if self.accelerator.num_processes > 1:
            whole = int(self.accelerator.reduce(sent(torch.tensor(whole), device), "sum"))
        return float(max(1, whole))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> None:
        """Count nothing, where the Trainer would count the labels on the device."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one forward pass and one backward pass per stream; combine on the last micro-batch.

        Raises TrainingDiverged on a loss that is not finite, and UserError on gate weights outside
        their range, before any weight changes.
        """
        began = time.perf_counter()
        model.train()
        batches = [
            MicroBatch(inputs, float(num_items_in_batch), self.engine, self.view, self.row_ids)
        ]
        batches += self._beside[self._micro_step : self._micro_step + 1]
        one_stream = len(self.streams) == 1
        # Several streams bypass DDP, whose reducer allows one backward pass per forward pass.
        body = model if one_stream else self.accelerator.unwrap_model(model)
        with nullcontext() if one_stream else several_backward_passes(body):
            trained = self._trained(model)
            totals = [self._backward(body, each, trained) for each in batches]
        spent = (time.perf_counter() - began) / self.accelerator.num_processes
        read = sum(tokens_of(each.padded) for each in batches)
        self._figures.count(tokens=read, seconds=spent)
        self._micro_step += 1
        if self.accelerator.sync_gradients:
            self._gradients.combine(self._trained(model))
            self._finish_step()
            if self.probe and (self.state.global_step + 1) % self.probe.every == 0:
                self._probed = self._probe(self.probe) | momentum_norms(self.policy)
        return torch.stack(totals).sum()

    def _backward(self, body: Any, micro: MicroBatch, trained: list[nn.Parameter]) -> Tensor:
        """Run a batch forward, and backward for each stream. Returns the sum of the losses."""
        batch, place = self._batch(micro.padded), (self._micro_step, self.args.process_index)
        step = self._loss(micro, body, batch, *micro.purpose, *place)
        self._refuse_unsound(step, batch, micro)
        # DDP averages over processes, but the loss is already a share of the global sum.
        processes = self.accelerator.num_processes
        losses = {stream: loss * processes for stream, loss in step.losses.items()}
        if len(self.streams) == 1:
            for loss in losses.values():
                self.accelerator.backward(loss)
        else:
            self._gradients.add(losses, trained)
        self._figures.add(step, "".join(f"{each}/" for each in micro.purpose))
        if not micro.purpose:
            self._scores.add(step)
        return torch.stack([loss.detach() for loss in losses.values()]).sum()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Train an epoch, unless the training was over at the checkpoint.

        The Trainer looks whether the training is over after a step, and never before one.
        """
        set_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        over = self.state.global_step >= self.state.max_steps
        if over or self.control.should_training_stop:
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's figures together with those of the loss engine."""
        if "loss" in logs:
            logs |= {k: v for k, v in self._figures.logged().items() if k != "loss"}
            logs |= self._probed
            self._probed = {}
        super().log(logs, start_time)
        if "train_runtime" not in logs:  # the Trainer's summary: wrong for a resumed run
            self.logged(self.state.global_step, logs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the student on held-out rows, as the final table does."""
        figures = self.evaluator() if self.evaluator else {}
        logs = {f"eval_{name}": value for name, value in figures.items()}
        self.log(dict(logs))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics=logs
        )
        return logs

    def planned_steps(self) -> int:
        """Return the number of optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        batches = len(self.get_train_dataloader())
        steps = max(1, -(-batches // self.args.gradient_accumulation_steps))
        return math.ceil(self.args.num_train_epochs * steps)

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(1, self.state.max_steps)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self.order is None else self.order

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's loader, whose batches stay on the CPU until a step sends them.

        The host reads counts and indices of a batch, and would have to wait for the device.
        """
        loader: Any = super().get_train_dataloader()
        loader.device = None  # accelerate sends a batch only where this is set
        return loader

    def _batch(self, padded: Mapping[str, Tensor]) -> Batch:
        """The batch on the device of the training."""
        batch = batch_of(padded, self.args.device)
        return replace(batch, inputs=self._prepare_inputs(dict(batch.inputs)))

    def _share(self, padded: Mapping[str, Tensor]) -> int:
        """The number of tokens or rows of a batch that a loss is averaged over."""
        mask = padded["mask"]
        by_token = self.engine.objective.normalize == "token"
        return int(mask.sum() if by_token else mask.any(1).sum())

    def _sampled(self, on_policy: OnPolicy, samples: list[Any]) -> list[Any]:
        """Return a step's micro-batches with the student's responses, or unchanged."""
        began = time.perf_counter()
        places = [sample["index"].tolist() for sample in samples]
        sampled, step = on_policy.none_sampled(), self.state.global_step
        if on_policy.samples_at(step, self.args.seed):
            student = self.accelerator.unwrap_model(self.model)
            generator = self._generator(student.device, "samples", self.args.process_index)
            sampled = on_policy(student, list(chain(*places)), generator, step)
            rows, collate = iter(sampled.rows), cast(Any, self.data_collator)
            samples = [
                collate([(place, next(rows)) for place in each]) | on_policy.spec.sampled
                for each in places
            ]
        counts = {f"on_policy/{name}": count for name, count in sampled.counts.items()}
        spent = (time.perf_counter() - began) / self.accelerator.num_processes
        self._figures.count(seconds=spent, **counts)
        return samples

    def _loss(self, micro: MicroBatch, body: Any, batch: Batch, *what: str | int) -> StepLoss:
        """Compute a batch's losses in one forward pass. ``what``: see `_generator`."""
        # The Trainer's own context leaves autocast to the wrapped student's forward: the teacher
        # and both heads would stay in float32.
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            return micro.engine(
                *micro.view(body, batch, self._progress),
                batch,
                whole=micro.whole,
                progress=self._progress,
                generator=self._generator("cpu", *what),
                reference=micro.view.reference(batch),
            )

    def _generator(self, device: torch.device | str, *what: str | int) -> torch.Generator:
        """A generator seeded by the run's seed, the step and its purpose, so it needs no state."""
        return generator_at(device, self.args.seed, self.state.global_step, *what)

    def _trained(self, model: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def _probe(self, probe: Probe) -> dict[str, float]:
        """Measure each term's gradients on separate batches, at the weights of the current step.

        Every process does the same alone, without communication. The batches have a generator of
        their own, and dropout is off, so that the probe does not change the training.
        """
        body = self.accelerator.unwrap_model(self.model).eval()
        terms = self.engine.objective.weights
        engine = LossEngine(self.engine.objective, {t: (t,) for t in terms}, self.engine.chunk)
        data, collate = cast(Any, self.train_dataset), cast(Any, self.data_collator)
        size, generator = self.args.per_device_train_batch_size, self._generator("cpu", "probe")

        def losses() -> Iterator[Mapping[str, Tensor]]:
            for number in range(probe.batches):
                places = torch.randperm(len(data), generator=generator)[:size].tolist()
                padded = collate([data[place] for place in places])
                whole = float(max(1, self._share(padded)))
                drawn = MicroBatch(padded, whole, engine, self.view, self.row_ids)
                yield self._loss(drawn, body, self._batch(padded), "probe", number).losses

        trained = {name: each for name, each in body.named_parameters() if each.requires_grad}
        found = signal_to_noise(losses(), trained, layers=probe.layers)
        body.train()
        return found

    def _finish_step(self) -> None:
        self._micro_step = 0
        figures = self._figures.of_step() | {"progress": self._progress}
        self.engine.objective.step_done(figures)
        self._scores.close()
        self.step_done(self.state.global_step + 1, figures)

    def _refuse_unsound(self, step: StepLoss, batch: Batch, micro: MicroBatch) -> None:
        """Raise UserError for a loss that is not finite, or gate weights outside their range."""
        if bool(step.sound):
            return
        terms = ", ".join(f"{name} {float(value):g}" for name, value in step.terms.items())
        wrong = [label for label, share in step.acceptance.items() if not share.isfinite()]
        told = "".join(f"; the weights of gate '{label}' are not finite" for label in wrong)
        also = "".join(f" and gate '{label}'" for label in wrong)
        ids = ", ".join(micro.row_ids(int(i)) for i in batch.index)
        at = f"at step {self.state.global_step + 1}"
        if all(loss.isfinite() for loss in step.losses.values()):
            counts = {label: float(count) for label, count in step.outside.items()}
            refuse_outside(counts, micro.engine.objective.gates, f"{at}; rows: {ids}")
        raise TrainingDiverged(
            f"the loss is not finite {at} ({terms}){told}; rows: {ids}",
            f"check these rows{also}, or lower training.learning_rate; {RERUN}",
        )
