"""A spec's training section as the Trainer's arguments."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from datetime import timedelta
from typing import Any, get_type_hints

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from pydantic import TypeAdapter, ValidationError
from torch.optim import SGD
from transformers import TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.utils.import_utils import is_liger_kernel_available

from kdcore.components.optional_packages import missing_package
from kdcore.errors import UserError, first_line, in_field, nearest
from kdcore.models.device import CPU, default_device, pins_memory
from kdcore.runs.folder import Run
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.training import TrainingSpec
from kdcore.specs.reading.mistakes import shown, wanted
from kdcore.specs.train_drafter import TrainedSpec

_OPTIMIZER = {"adamw": "adamw_torch_fused", "sgd": "sgd"}

_SCHEDULE = {"multi_step": "constant_with_warmup"}
"""Schedules that transformers does not have -> the one that `StepDecay` multiplies."""

SET_BY = {
    "output_dir": "run",
    "max_steps": "training.steps",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulation",
    "learning_rate": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "warmup_steps": "training.warmup",
    "optim": "training.optimizer",
    "optim_args": "training.momentum",
    "adam_beta1": "training.betas",
    "adam_beta2": "training.betas",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.clip",
    "bf16": "training.precision",
    "seed": "seed",
    "data_seed": "seed",
    "save_strategy": "training.save_every",
    "save_steps": "training.save_every",
    "save_total_limit": "training.keep",
    "logging_steps": "training.log_every",
    "eval_strategy": "training.eval_every",
    "eval_steps": "training.eval_every",
    "report_to": "training.report_to",
}
"""Fields of the Trainer that a field of the spec sets -> that field."""

_UNREAD = {
    **dict.fromkeys(
        ("label_smoothing_factor", "average_tokens_across_devices", "torch_empty_cache_steps"),
        "kdcore computes the loss and makes the step itself",
    ),
    **dict.fromkeys(
        (
            "per_device_eval_batch_size",
            "prediction_loss_only",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "batch_eval_metrics",
            "include_for_metrics",
            "label_names",
            "bf16_full_eval",
            "fp16_full_eval",
        ),
        "kdcore measures the held-out rows itself, see the fields of evaluation",
    ),
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict"), "only training scripts of transformers read it"
    ),
    **dict.fromkeys(
        ("metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
        "set training.keep_best, which works with any figure and any save_every",
    ),
}
"""Fields without effect -> reason: `DistillationTrainer` replaces the code that reads them."""


def training_arguments(spec: TrainedSpec, run: Run) -> TrainingArguments:
    """Build the Trainer's arguments.

    Args:
        spec: The spec of the run.
        run: The run, whose folder the Trainer writes to.

    Returns:
        The arguments.

    Raises:
        UserError: ``training.trainer`` sets a field that is unknown, that kdcore or another field
            of the spec decides, that has no effect, or a value of the wrong type; or
            ``training.report_to`` names a tracker that is not installed.
    """
    training = spec.training
    _refuse_deepspeed(training)
    ours: dict[str, Any] = {
        "output_dir": str(run.folder),
        "max_steps": training.steps or -1,
        "num_train_epochs": training.epochs,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": _SCHEDULE.get(training.schedule, training.schedule),
        "warmup_steps": training.warmup,
        "optim": _OPTIMIZER[training.optimizer],
        "optim_args": f"momentum={training.momentum}" if training.optimizer == "sgd" else None,
        "adam_beta1": training.betas[0],
        "adam_beta2": training.betas[1],
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.clip,
        "bf16": training.precision == "bf16",
        "seed": spec.seed,
        "data_seed": spec.seed,
        "save_strategy": "steps" if training.save_every else "no",
        "save_steps": training.save_every or 1,
        "save_total_limit": training.keep,
        "logging_steps": training.log_every,
        "eval_strategy": "steps" if training.eval_every else "no",
        "eval_steps": training.eval_every,
        "report_to": training.report_to or "none",
        "remove_unused_columns": False,  # the collator's keys are not the model's
        "logging_nan_inf_filter": False,  # a loss that is not finite stops the run
        "disable_tqdm": True,
        # A checkpoint without optimizer cannot be resumed, and another batch size is another run.
        "save_only_model": False,
        "resume_from_checkpoint": None,
        "load_best_model_at_end": False,
        "auto_find_batch_size": False,
        "push_to_hub": False,  # nothing leaves the run folder
    }
    on_cpu = _on_cpu(spec)
    pinned = not on_cpu and pins_memory(default_device())
    free = {"dataloader_pin_memory": pinned, "use_cpu": on_cpu}
    known = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    for name, value in training.trainer.items():
        field = f"training.trainer.{name}"
        if name in ours:
            other = SET_BY.get(name)
            by = other or "kdcore, which needs its value"
            cure = f"remove it, and set {other}" if other else "remove it"
            raise UserError(f"{field} is already set by {by}", cure, field)
        if name in _UNREAD:
            raise UserError(f"{field} would have no effect: {_UNREAD[name]}", "remove it", field)
        if name not in known:
            raise UserError(
                f"{field} is not a field of transformers.TrainingArguments",
                nearest(name, known.keys() - ours.keys() - _UNREAD.keys()),
                field,
            )
        _refuse_other_type(known[name], value)
    if training.trainer.get("use_liger_kernel") and not is_liger_kernel_available():
        field = "training.trainer.use_liger_kernel"
        with in_field(field):
            raise missing_package(field, "liger-kernel", instead="remove it")
    trackers = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in sorted({*training.report_to} - {*trackers, "all"}):
        if name not in INTEGRATION_TO_CALLBACK:
            cure = nearest(name, INTEGRATION_TO_CALLBACK)
            raise UserError(
                f"training.report_to: unknown tracker '{name}'", cure, "training.report_to"
            )
        package = name.replace("_", "-")
        with in_field("training.report_to"):
            raise missing_package(f"training.report_to: {name}", package, instead="remove it")
    try:
        arguments = TrainingArguments(**ours, **(free | training.trainer))
    except (ValueError, TypeError, ImportError) as fault:
        raise UserError(
            f"transformers rejects the training section: {first_line(fault)}",
            "change the field that the reason names",
        ) from fault
    _refuse_what_fails_later(arguments)
    # On one process that sees several devices the Trainer would wrap the model in DataParallel,
    # whose replicas the view has never seen.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    whole = DistributedType.NO, DistributedType.MULTI_CPU
    if arguments.fsdp and processes(spec).distributed_type in whole:
        raise UserError(
            "training.trainer.fsdp shards the model, which needs several processes on accelerators",
            "start several processes on accelerators (accelerate launch), or remove fsdp",
            "training.trainer.fsdp",
        )
    _refuse_first_fsdp(arguments)
    return arguments


def shards_the_model(training: TrainingSpec) -> bool:
    """Whether the spec, or accelerate's launcher, has FSDP shard the trained model."""
    return bool(training.trainer.get("fsdp")) or os.environ.get("ACCELERATE_USE_FSDP") == "true"


def several_shards(spec: DistillSpec) -> bool:
    """Whether FSDP shards the student over several processes."""
    return shards_the_model(spec.training) and processes(spec).num_processes > 1


def _refuse_first_fsdp(arguments: TrainingArguments) -> None:
    """Raises UserError for version 1, which the spec or accelerate's launcher asks for.

    It flattens the weights of a layer into one, where momenta and checkpoints need each of them.
    """
    by_launcher = not arguments.fsdp and os.environ.get("ACCELERATE_USE_FSDP") == "true"
    own: Any = arguments.fsdp_config or {}
    version = os.environ.get("FSDP_VERSION", 1) if by_launcher else own.get("version", 2)
    if int(version) < 2:
        raise UserError(
            "FSDP version 1 is not supported",
            "set training.trainer.fsdp_config.version: 2, or --fsdp_version 2 of accelerate launch",
            "" if by_launcher else "training.trainer.fsdp_config",
        )


def _refuse_deepspeed(training: TrainingSpec) -> None:
    """Raises UserError for DeepSpeed, which the spec or accelerate's launcher asks for."""
    if training.trainer.get("deepspeed") or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "DeepSpeed is not supported: its engine runs the backward pass itself, and kdcore "
            "passes gradients that it has already computed",
            "set training.trainer.fsdp: true, which shards weights, gradients and optimizer as "
            "ZeRO-3 does, and remove DeepSpeed from the spec and from accelerate's config",
        )


def _refuse_what_fails_later(arguments: TrainingArguments) -> None:
    """Raises UserError for what transformers would refuse after the models are loaded."""
    if arguments.dataloader_persistent_workers and not arguments.dataloader_num_workers:
        raise UserError(
            "training.trainer.dataloader_persistent_workers needs dataloader_num_workers above 0",
            "set training.trainer.dataloader_num_workers, or remove dataloader_persistent_workers",
            "training.trainer.dataloader_persistent_workers",
        )
    strategy = arguments.train_sampling_strategy
    if strategy in ("group_by_length", "batch_rebalance"):
        raise UserError(
            f"training.trainer.train_sampling_strategy: {strategy} is not supported, as "
            "transformers does not see the lengths of kdcore's rows",
            "replace the strategy by training.group_by_length: true",
            "training.trainer.train_sampling_strategy",
        )
    kwargs: Any = arguments.lr_scheduler_kwargs
    try:
        optimizer = SGD([torch.zeros(1)])
        get_scheduler(
            arguments.lr_scheduler_type, optimizer, 1, 2, scheduler_specific_kwargs=kwargs
        )
    except (TypeError, ValueError) as fault:
        raise UserError(
            f"training.trainer.lr_scheduler_kwargs does not fit: {first_line(fault)}",
            "use arguments of training.schedule, or remove lr_scheduler_kwargs",
            "training.trainer.lr_scheduler_kwargs",
        ) from fault


def _refuse_other_type(field: dataclasses.Field[Any], value: Any) -> None:
    """Raises UserError for a wrong type; transformers checks few, and would fail during the run."""
    if value is field.metadata.get("const", ...):  # the value of a flag, whatever its type
        return
    known: TypeAdapter[Any] = TypeAdapter(get_type_hints(TrainingArguments)[field.name])
    try:
        known.validate_json(json.dumps(value), strict=True)
    except ValidationError as wrong:
        kinds = dict.fromkeys(wanted(each) or "another value" for each in wrong.errors())
        raise UserError(
            f"training.trainer.{field.name} must be {' or '.join(kinds)}, not {shown(value)}",
            "see the documentation of `transformers.TrainingArguments`",
            f"training.trainer.{field.name}",
        ) from wrong


SLOWEST_IN_BFLOAT16 = 3e-4
"""Learning rate of AdamW below which bfloat16 weights lose more than 2 % of their updates."""


def lost_updates(spec: DistillSpec, dtype: torch.dtype) -> str | None:
    """A warning if the student's weights are too coarse for the size of their updates.

    Measured with AdamW at weights of standard deviation 0.02, which keep 99 % of an update at a
    learning rate of 3e-4, 87 % at 1e-4, 31 % at 3e-5 and 14 % at 1e-5.

    Args:
        spec: The spec of the run.
        dtype: The dtype of the student's weights.

    Returns:
        The warning; None if the weights are in float32, or adapters alone are trained.
    """
    student, rate = spec.student, spec.training.learning_rate
    coarse = dtype == torch.bfloat16 and student.lora is None  # peft's adapters are float32
    if not coarse or (spec.training.optimizer == "adamw" and rate >= SLOWEST_IN_BFLOAT16):
        return None
    return (
        "student.dtype bfloat16 loses updates smaller than about 1/500 of a weight, which is most "
        f"of them at a small learning rate (here {rate:g}): set student.dtype: float32, and "
        "training.precision: bf16 for the speed"
    )


def micro_batches(spec: TrainedSpec, rows: int) -> int:
    """Count the micro-batches that each process reads in an epoch.

    Args:
        spec: The spec of the run.
        rows: Number of training rows.

    Returns:
        The number of micro-batches, at least 1.

    Raises:
        UserError: No batch is full and incomplete ones are dropped, so the run would make no step.
    """
    size = spec.training.batch_size
    together: int = processes(spec).num_processes
    if not spec.training.trainer.get("dataloader_drop_last"):
        return math.ceil(math.ceil(rows / size) / together)
    found = rows // (size * together)
    if not found:
        raise UserError(
            f"training.trainer.dataloader_drop_last drops incomplete batches, and the {rows} rows "
            f"of data.train do not fill a batch of {size * together}: the run would make no step",
            f"set training.batch_size to {max(1, rows // together)} or less, or remove "
            "dataloader_drop_last",
            "training.trainer.dataloader_drop_last",
        )
    return found


def processes(spec: TrainedSpec) -> PartialState:
    """Return accelerate's state of the run's processes, set up as the Trainer will need it.

    The first call connects the processes. They wait for each other as long as
    ``training.trainer.ddp_timeout`` says, whose type `training_arguments` checks.
    """
    asked = spec.training.trainer.get("ddp_timeout")
    seconds = asked if type(asked) is int and asked > 0 else TrainingArguments.ddp_timeout
    return PartialState(cpu=_on_cpu(spec), timeout=timedelta(seconds=seconds))


def _on_cpu(spec: TrainedSpec) -> bool:
    """Whether to train on the CPU; stated explicitly, or CPU processes would not connect."""
    return bool(spec.training.trainer.get("use_cpu", default_device() == CPU))
