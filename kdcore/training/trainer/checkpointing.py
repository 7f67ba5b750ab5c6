"""The checkpoints of a training: the `_save_*` and `_load_*` pairs of transformers.Trainer.

They add the state of the policy and of stateful components, and write no pickle. Of a model that
FSDP shards, each process writes its own shards, and reads them again: whole weights would not fit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kdcore.method.loss_engine import LossEngine
from kdcore.method.objective import owned
from kdcore.method.protocols import MomentumPolicy
from kdcore.models.device import moved
from kdcore.runs.whole_files import naming
from kdcore.training.trainer import checkpoint as checkpoint_state
from kdcore.training.trainer.matching import without_matchers
from kdcore.training.trainer.shards import (
    file_of_process,
    gathered,
    read_weights,
    shards_of,
    shards_of_weights,
)
from kdcore.training.views import View

STATE_FILE = "kdcore_state.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
SCHEDULER_FILE = "scheduler.json"
WEIGHTS_FILE = "weights.safetensors"
MOMENTA_FILE = "momenta.safetensors"


def remove_oldest(folder: Path, step: int, limit: int) -> None:
    """Remove the checkpoints of the earliest steps.

    Those of later steps than the present one go first: they are the remains of a killed process,
    since a resumed run begins at the last complete checkpoint.

    Args:
        folder: The run folder.
        step: The step of the newest checkpoint, which stays.
        limit: The number of checkpoints that stay.
    """
    steps = {
        path: int(number)
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.rpartition("-")[2]).isdecimal()
    }
    for path in sorted(steps, key=lambda path: (steps[path] <= step, steps[path]))[:-limit]:
        shutil.rmtree(path, ignore_errors=True)


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints hold the state of a method too.

    Attributes:
        engine: The loss engine.
        policy: The momentum policy.
        view: Runs the model and its teacher.
    """

    engine: LossEngine
    policy: MomentumPolicy
    view: View

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Gather the weights of a sharded model, in every process at once; otherwise None.

        Only the main process keeps them.
        """
        if not self._shards_state:
            return None
        kept: dict[str, Tensor] = {}
        for name, each in self.accelerator.unwrap_model(self.model).state_dict().items():
            whole = gathered(each)
            if self.args.should_save:
                kept[name] = whole.cpu()
        return kept

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.engine.objective.matchers:  # the state of the objective has their weights
            model = cast(nn.Module, self.model)
            state_dict = without_matchers(state_dict or model.state_dict())
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or str(self.args.output_dir))
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that kdcore never reads

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, and remove those beyond the limit by their steps.

        The Trainer goes by their times, and would remove the one that it has just written if the
        clock went back.
        """
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with naming(folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit:
            remove_oldest(folder, step, limit)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, unless it is sharded: its shards are written with the optimizer's."""
        if not self._shards_state:
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        if self._shards_state:
            read_weights(self._own(Path(checkpoint), WEIGHTS_FILE), model)
        elif checkpoint_state.has_other_names(Path(checkpoint), cast(nn.Module, self.model)):
            checkpoint_state.read_converted(Path(checkpoint), cast(Any, self.model))
        else:
            super()._load_from_checkpoint(checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn of missing weights, but not of those that a checkpoint has by another name or file.

        Tied weights are stored once, and those of matchers with the state of the objective.
        """
        state = cast(nn.Module, self.model).state_dict()
        missing: dict[str, Any] = dict.fromkeys(load_result.missing_keys)
        loaded = {each.data_ptr() for name, each in state.items() if name not in missing}
        others = [n for n in without_matchers(missing) if state[n].data_ptr() not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=others))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"policy/{k}": v for k, v in self.policy.state_dict().items()}
        if self._shards_state or self.args.should_save:
            checkpoint_state.write_optimizer(self._own(folder, OPTIMIZER_FILE), self.optimizer)
        if self._shards_state:
            model = self.accelerator.unwrap_model(self.model)
            checkpoint_state.write(self._own(folder, WEIGHTS_FILE), shards_of_weights(model))
            checkpoint_state.write(self._own(folder, MOMENTA_FILE), shards_of(state))
            state = {}
            self.accelerator.wait_for_everyone()  # before a file says that the checkpoint is whole
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            (folder / SCHEDULER_FILE).write_text(json.dumps(scheduler.state_dict()))
            state |= {f"teacher/{k}": v for k, v in self.view.state_dict().items()}
            state |= self.engine.objective.state_dict()
            checkpoint_state.write(folder / STATE_FILE, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        checkpoint_state.read_optimizer(self._own(folder, OPTIMIZER_FILE), self.optimizer)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(json.loads((folder / SCHEDULER_FILE).read_text()))
        state, _ = checkpoint_state.read(folder / STATE_FILE)
        if self._shards_state:
            state |= checkpoint_state.read(self._own(folder, MOMENTA_FILE))[0]
        state = {name: moved(tensor, self.args.device) for name, tensor in state.items()}
        self.policy.load_state_dict(owned("policy", state))
        self.view.load_state_dict(owned("teacher", state))
        self.engine.objective.load_state_dict(state)

    def _own(self, folder: Path, name: str) -> Path:
        """A file of a checkpoint, of which each process has its own if the model is sharded."""
        place = self.args.process_index, self.args.world_size
        return file_of_process(folder / name, *place) if self._shards_state else folder / name

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        checkpoint_state.write_randomness(self._randomness_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._randomness_file(checkpoint).exists():
            checkpoint_state.read_randomness(self._randomness_file(checkpoint))

    def _randomness_file(self, folder: str) -> Path:
        return Path(folder) / f"randomness-{self.args.process_index}.safetensors"

    @property
    def _shards_state(self) -> bool:
        """Whether FSDP shards the model, its momenta and the optimizer's state."""
        return bool(self.is_fsdp_enabled)
