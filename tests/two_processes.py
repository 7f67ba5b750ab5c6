"""Trains under torch.distributed.run and leaves the weights; see test_several_processes."""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.test_training import trainer

folder, method = Path(sys.argv[1]), json.loads(sys.argv[2])
made = trainer(folder, method, per_device_train_batch_size=3, gradient_accumulation_steps=2)
made.train()
if made.args.process_index == 0:
    (folder / "log.json").write_text(json.dumps(made.state.log_history))
    model = made.accelerator.unwrap_model(made.model)
    save_file({k: v.contiguous() for k, v in model.named_parameters()}, folder / "weights")
