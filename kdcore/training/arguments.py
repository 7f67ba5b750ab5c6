"""A spec's training section in the words of transformers.TrainingArguments."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, get_type_hints

from accelerate import PartialState
from accelerate.utils import DistributedType
from pydantic import TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from kdcore.errors import UserError, nearest
from kdcore.models.device import CPU, default_device
from kdcore.runs.folder import Run
from kdcore.specs.reading.mistakes import shown, wanted
from kdcore.specs.train_drafter import TrainedSpec

_OPTIMIZER = {"adamw": "adamw_torch_fused", "sgd": "sgd"}

_UNREAD = {
    **dict.fromkeys(
        ("label_smoothing_factor", "average_tokens_across_devices", "torch_empty_cache_steps"),
        "kdcore makes the loss and takes the step itself",
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
        "held-out rows are measured by kdcore: see evaluation:",
    ),
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict"), "a script would read it, and there is none"
    ),
}
"""Fields that nothing would read, since `DistillationTrainer` replaces what reads them -> why."""


def training_arguments(spec: TrainedSpec, run: Run) -> TrainingArguments:
    """What the Trainer is told.

    Raises UserError when ``training.trainer`` names an unknown field, one that the framework or
    another field of the spec decides or that would have no effect, or has a value of another type
    than the field's, and for a tracker that is not there.
    """
    training = spec.training
    ours: dict[str, Any] = {
        "output_dir": str(run.folder),
        "max_steps": training.steps or -1,
        "num_train_epochs": training.epochs,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.accumulation,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule,
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
        # a checkpoint without the optimiser cannot be resumed, and a smaller batch is another run
        "save_only_model": False,
        "resume_from_checkpoint": None,
        "load_best_model_at_end": False,
        "auto_find_batch_size": False,
        "push_to_hub": False,  # nothing leaves the run folder
    }
    free = {"dataloader_pin_memory": False, "use_cpu": _on_cpu(spec)}
    known = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    for name, value in training.trainer.items():
        if name in ours:
            raise UserError(
                f"training.trainer.{name} is decided by kdcore or by the spec's own fields",
                "remove it, or set the field of training: (or seed, run) that means the same",
            )
        if name in _UNREAD:
            raise UserError(
                f"training.trainer.{name} would have no effect: {_UNREAD[name]}", "remove it"
            )
        if name not in known:
            raise UserError(
                f"transformers.TrainingArguments has no '{name}'",
                nearest(name, known.keys() - ours.keys() - _UNREAD.keys()),
            )
        _refuse_other_type(known[name], value)
    trackers = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in {*training.report_to} - {*trackers, "all"}:
        raise UserError(
            f"training.report_to: there is no tracker '{name}', or it is not installed",
            f"install it; installed: {', '.join(trackers) or 'none'}",
        )
    try:
        arguments = TrainingArguments(**ours, **(free | training.trainer))
    except (ValueError, TypeError, ImportError) as fault:
        raise UserError(
            f"transformers refuses the training section: {str(fault).splitlines()[0]}",
            "change the field it names",
        ) from fault
    # On one process that sees several devices the Trainer would wrap the model in DataParallel,
    # whose replicas the view has never seen.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    whole = DistributedType.NO, DistributedType.MULTI_CPU
    if arguments.fsdp and processes(spec).distributed_type in whole:
        raise UserError(
            "training.trainer.fsdp asks for a sharded model, and this is one process, or processes "
            "on the CPU, which accelerate does not shard over",
            "start several processes on accelerators (accelerate launch), or remove it",
        )
    return arguments


def _refuse_other_type(field: dataclasses.Field[Any], value: Any) -> None:
    """Raises UserError. transformers looks at few values, and would fail in the middle of a run."""
    if value is field.metadata.get("const", ...):  # a flag's, whatever the type says
        return
    known: TypeAdapter[Any] = TypeAdapter(get_type_hints(TrainingArguments)[field.name])
    try:
        known.validate_json(json.dumps(value), strict=True)
    except ValidationError as wrong:
        kinds = dict.fromkeys(wanted(each) or "another value" for each in wrong.errors())
        raise UserError(
            f"training.trainer.{field.name} must be {' or '.join(kinds)}, not {shown(value)}",
            "`transformers.TrainingArguments` says what it may be",
        ) from wrong


def micro_batches(spec: TrainedSpec, rows: int) -> int:
    """How many each process walks in an epoch over so many rows.

    Raises UserError when that is none, so that nothing would be trained.
    """
    size = spec.training.batch_size
    together: int = processes(spec).num_processes
    if not spec.training.trainer.get("dataloader_drop_last"):
        return math.ceil(math.ceil(rows / size) / together)
    found = rows // (size * together)
    if not found:
        raise UserError(
            f"training.trainer.dataloader_drop_last leaves out a batch that is not full, and the "
            f"{rows} rows of data.train fill none of {size * together}: no step would be made",
            f"set training.batch_size to {max(1, rows // together)} or less, or remove "
            "dataloader_drop_last",
        )
    return found


def processes(spec: TrainedSpec) -> PartialState:
    """This process's place among those of the run, set up as the Trainer will find it."""
    return PartialState(cpu=_on_cpu(spec))


def _on_cpu(spec: TrainedSpec) -> bool:
    """Said outright where there is no accelerator, or several CPU processes would not meet."""
    return bool(spec.training.trainer.get("use_cpu", default_device() == CPU))
