"""How often a loop makes the host wait for the device: no more than is known, by line."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, TrainingArguments

from kdcore.components.registry import installed
from kdcore.data.batching.anchors import at_anchors, known
from kdcore.data.responses.continuation import continue_prompts
from kdcore.data.responses.endpoint.teacher import ServedTeacher
from kdcore.data.rows import collate
from kdcore.decoding.loop import Decoder, Stop
from kdcore.method.loss_engine import LossEngine
from kdcore.models.assembly import Assembly
from kdcore.models.loading.loaded import LoadedModel
from kdcore.specs.parts.teachers import ServedTeacherSpec
from kdcore.specs.parts.training import MethodSpec
from kdcore.testing.decoding import tiny_target
from kdcore.training.loss import DistillationLoss
from kdcore.training.method import build_objective
from kdcore.training.teachers.kinds import RequestedTeacher
from kdcore.training.teachers.mixture import Mixture
from kdcore.training.teachers.row_weights import RowWeights
from kdcore.training.trainer.trainer import DistillationTrainer
from kdcore.training.views import DrafterView
from kdcore_baselines.drafters.untrained import Nothing
from kdcore_baselines.drafting_components import DynamicParams
from kdcore_baselines.trees import Backbone, Dynamic
from kdcore_baselines.verifiers import Greedy, Sampling
from kdcore_compiled.engine import CompiledEngine
from kdcore_compiled.plugin import CompiledParams
from tests.device.mock_device import DEVICE, MockDevice
from tests.device.test_components import chosen
from tests.fixtures.apps.endpoint_app import Endpoint, served
from tests.kdcore.training.trainer.test_trainer import DEEPKD, rows, trainer
from tests.tiny.drafters import Pauses
from tests.tiny.targets import padded, prompts, tiny, tokenizer_of
from tests.tiny.trained_drafters import unbound


def now_and_then(tree: Backbone) -> Any:
    tree.account = Pauses(False, True)  # type: ignore[attr-defined]
    return tree


DRAFTED: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "nothing": (lambda: Nothing(None, None), lambda: None),  # type: ignore[arg-type]
    "medusa": (lambda: unbound("medusa", depth=2).eval(), lambda: Backbone(3)),
    "fasteagle": (lambda: unbound("fasteagle", depth=2).eval(), lambda: Backbone(1)),
    "fasteagle now and then": (
        lambda: unbound("fasteagle", depth=2).eval(),
        lambda: now_and_then(Backbone(1)),
    ),
    "p_eagle": (lambda: unbound("p_eagle", depth=2, layers=2).eval(), lambda: Backbone(1)),
    "dflash": (lambda: unbound("dflash", depth=2, layers=2).eval(), lambda: Backbone(1)),
    "eagle3": (
        lambda: unbound("eagle3", depth=2).eval(),
        lambda: Dynamic(DynamicParams(beams=2, nodes=5), None),  # type: ignore[arg-type]
    ),
}
"""Drafters, each with a tree that knows its depth; one is asked in every other round."""


@pytest.mark.parametrize(
    "suite", [s for s in chosen({"drafter"}) if s.values[0].name not in DRAFTED]
)
def test_a_round_of_another_drafter_waits_for_its_own_search_too(
    suite: Any, device: MockDevice
) -> None:
    drafter, target = suite.component(), tiny_target.target().to(DEVICE)
    drafter.bind(target, tiny_target.tokenizer())
    verifier = Greedy(None, None)  # type: ignore[arg-type]
    ids, real = (each.to(DEVICE) for each in tiny_target.padded(tiny_target.PROMPTS))
    rounds = Decoder(target, drafter, verifier).stream(ids, real, Stop(6))
    next(rounds)
    device.waits.found.clear()
    count = sum(1 for _ in rounds)
    assert device.waits.found.total() <= 2 * count, device.waits.table(count)


COMPILED = ("nothing", "medusa", "fasteagle", "fasteagle now and then", "p_eagle", "eagle3")
"""Those whose passes, or whose target's alone, the engine compiled runs."""


@pytest.mark.parametrize(
    ("name", "compiled"),
    [(name, False) for name in DRAFTED] + [(name, True) for name in COMPILED],
)
def test_a_round_of_decoding_waits_for_what_it_emits_alone(
    name: str, compiled: bool, device: MockDevice
) -> None:
    """Once in a while, a cache counts its slots as well: not in so few rounds."""
    target = copy.deepcopy(tiny("llama")).to(DEVICE)
    torch.manual_seed(0)
    make, tree = DRAFTED[name]
    drafter = make()
    drafter.bind(target, tokenizer_of())
    if hasattr(drafter, "tree"):
        drafter.tree = tree()
    verifier: Any = Sampling(None, None) if name == "medusa" else Greedy(None, None)  # type: ignore[arg-type]
    engine = None
    if compiled:
        engine = CompiledEngine(CompiledParams())
        engine.bind(target, drafter.layers)
        if name != "nothing":
            drafter.use_engine(engine)
    decoder = Decoder(target, drafter, verifier, engine=engine)
    ids, real = (each.to(DEVICE) for each in padded(prompts(3)))
    with torch.compiler.set_stance("force_eager"):  # what it does around the compiled passes
        rounds = decoder.stream(ids, real, Stop(6, (1,)))
        next(rounds)  # the prompt's pass, too
        device.waits.found.clear()
        count = sum(1 for _ in rounds)
    waits = device.waits.ours
    assert count > 2
    assert {(wait.what, n) for wait, n in waits.items()} == {("tolist", count)}, device.waits.table(
        count
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_answer_waits_for_each_token_once(family: str, device: MockDevice) -> None:
    models = [copy.deepcopy(tiny(family)).to(DEVICE) for _ in "ab"]
    replaced: list[torch.Tensor] = []

    def choose(logits: list[torch.Tensor]) -> torch.Tensor:
        replaced.append(logits[1].argmax(-1))
        return logits[0].argmax(-1)

    made = continue_prompts(prompts(3), models, choose, ends=(1,), limits=[2, 5, 4])
    device.waits.found = Counter({w: n for w, n in device.waits.found.items() if n > 1})
    assert max(map(len, made)) == len(replaced) == 5
    assert {(wait.what, n) for wait, n in device.waits.ours.items()} == {("tolist", 5)}


STEP = 4
"""Waits of a micro-step at most: whether the loss is finite, the figures of the step, and what a
momentum policy clips by."""
METHODS: dict[str, dict[str, Any]] = {
    "kd": {"gates": []},
    "every token dropped": {
        "gates": [{"name": "speckd", "verification": "greedy", "beta": 0.0}],
        "terms": {"kd": 1.0},
    },
    "ranked": {"gates": [{"name": "student_entropy"}], "normalize": "accepted"},
    "remembered": {"gates": [{"name": "se_kd_queue"}], "normalize": "accepted"},
    "deepkd": DEEPKD,
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_step_of_training_waits_as_often_as_is_known(
    device: MockDevice, tmp_path: Path, method: dict[str, Any]
) -> None:
    """A step has several chunks, of which none makes the host wait."""
    made = trainer(tmp_path, method, use_cpu=False, max_steps=2)
    made.engine.chunk = 4
    view: Any = made.view
    view.taught_by.model.to(DEVICE)
    assert_few_waits(device, made, 2)


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "in a mixture"])
def test_a_served_teacher_reads_a_batch_without_waiting(
    device: MockDevice, tmp_path: Path, mixed: bool
) -> None:
    made = trainer(tmp_path, METHODS["kd"], use_cpu=False, max_steps=2)
    view: Any = made.view
    live = view.taught_by
    model = LoadedModel(copy.deepcopy(live.model), None, "teacher", "digest")
    live.model.to(DEVICE)
    with served(Endpoint(model)) as server:
        spec = ServedTeacherSpec(endpoint=server.url, model="tiny-chat", k=4)
        far = RequestedTeacher(ServedTeacher(spec, 61, print))
        names = ("far", "near")
        mixture = Mixture(dict(zip(names, (far, live), strict=True)), RowWeights(names, {}), 61)
        view.taught_by = mixture if mixed else far
        own: Any = made.data_collator
        made.data_collator = lambda items: own(items) | {"teachers": ["far", "near", "", "far"]}
        try:
            assert_few_waits(device, made, 2)
        finally:
            far.served.close()
    assert len(server.asked) == (2 * 3 if mixed else 2 * 4)


@pytest.mark.parametrize("name", ["fasteagle", "eagle3", "medusa", "p_eagle", "dflash"])
def test_a_step_of_a_drafter_waits_as_often_as_is_known(
    device: MockDevice, tmp_path: Path, name: str
) -> None:
    target = copy.deepcopy(tiny("llama")).to(DEVICE)
    drafter = unbound(name, depth=3, vocabulary=40)
    drafter.bind(target, tokenizer_of())
    spec, assembly, data = MethodSpec(), Assembly(installed()), rows()
    objective, policy = build_objective(spec, assembly), assembly.build(spec.momentum)
    vocabulary = drafter.vocabulary.cpu()
    made = DistillationTrainer(
        model=drafter,
        args=TrainingArguments(str(tmp_path), max_steps=2, save_strategy="no", disable_tqdm=True),
        engine=LossEngine(objective, policy.streams(tuple(objective.weights)), chunk=16),
        view=DrafterView(target, drafter),
        policy=policy,
        row_ids=str,
        logged=lambda step, figures: None,
        train_dataset=data,
        data_collator=lambda each: known(
            at_anchors(collate(each, {"input_ids": 0, "attention_mask": 0}), 3, vocabulary)
        ),
    )
    made.remove_callback(PrinterCallback)
    assert_few_waits(device, made, 2)


def assert_few_waits(device: MockDevice, made: DistillationTrainer, steps: int) -> None:
    device.waits.found.clear()
    made.train()
    assert made.state.global_step == steps
    assert 0 < device.waits.ours.total() / steps <= STEP, device.waits.table(steps)


def test_a_loop_of_ones_own_waits_as_often_as_is_known(device: MockDevice) -> None:
    """Once to index the learned positions, and once for their rows, which nobody has counted."""
    loss = DistillationLoss(gates=["speckd"], chunk=3)
    student, teacher = (torch.randn(2, 9, 20, device=DEVICE).requires_grad_() for _ in "ab")
    labels = torch.randint(20, (2, 9), device=DEVICE)
    device.waits.found.clear()
    loss(student, teacher, labels).backward()
    assert device.waits.found.total() == 2, device.waits.table()
