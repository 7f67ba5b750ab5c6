"""What a spec would do, held against tiny models and data whose sizes are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kdcore.errors import Mistakes, UserError
from kdcore.jobs.preflight import estimates
from kdcore.jobs.preflight.distill import preflight
from kdcore.jobs.preflight.report import Report
from kdcore.models.loading.load import load_model, load_student
from kdcore.specs.distill import DistillSpec
from kdcore.specs.reading.file import placing, read_spec
from tests.fixtures.json_lines import write_lines
from tests.tiny.tiny_chat_models import saved, tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"the mat {i}", "response": "for the teacher" * (1 + i % 3)} for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its data, and a spec that names them."""
    home = tmp_path_factory.mktemp("preflight")
    saved(tiny_model(), home / "teacher")
    write_lines(home / "train.jsonl", ROWS)
    (home / "spec.yaml").write_text(
        f"""
job: distill
run: {home / "run"}
teacher: {{model: {home / "teacher"}}}
student: {{layers: [0, 2]}}
data:
  train: {{name: chat, path: train.jsonl}}
training: {{batch_size: 2, epochs: 3}}
"""
    )
    return home


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of known speed."""
    monkeypatch.setattr(estimates, "throughput", lambda **_: 1e6)


def spec(folder: Path, *sets: str) -> DistillSpec:
    read = read_spec(folder / "spec.yaml", sets)
    assert isinstance(read, DistillSpec)
    return read


def report(folder: Path, *sets: str) -> Report:
    return preflight(spec(folder, *sets))


def lengths(template_of: Any, responses: list[str]) -> list[int]:
    """Positions of each row, counted from the rendered text."""
    counts = []
    for row, response in zip(ROWS, responses, strict=True):
        turns = [("user", row["prompt"]), ("assistant", response)]
        messages = [{"role": role, "content": text} for role, text in turns]
        text = template_of.apply_chat_template(messages, tokenize=False).rstrip("\n")
        counts.append(len(template_of(text)["input_ids"]) - 1)
    return counts


def test_the_data_is_counted(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    sizes = lengths(tokenizer, [row["response"] for row in ROWS])
    learned = [len(tokenizer(row["response"])["input_ids"]) + 1 for row in ROWS]
    found = report(folder).train
    assert (found.rows, found.sampled, found.generated) == (6, 6, 0)
    assert found.tokens == pytest.approx(sum(sizes) / 6)
    assert found.learned == pytest.approx(sum(learned) / 6)
    assert (found.longest, found.cut, found.empty) == (max(sizes), 0, 0)

    limit = sorted(sizes)[2]
    cut = report(folder, f"data.max_length={limit}").train
    assert cut.longest == limit
    assert cut.cut == sum(size > limit for size in sizes) / 6
    kept = [max(0, n - max(0, size - limit)) for n, size in zip(learned, sizes, strict=True)]
    assert cut.learned == pytest.approx(sum(kept) / 6)
    with pytest.raises(UserError, match="none of the 6 rows"):
        report(folder, "data.max_length=20")


def test_responses_to_come_are_counted_at_their_longest(folder: Path) -> None:
    nothing = lengths(tiny_tokenizer(), [""] * 6)
    found = report(folder, "data.responses={by: teacher, max_new_tokens: 50}")
    assert (found.train.generated, found.train.learned) == (6, 50)
    assert found.train.tokens == pytest.approx(sum(nothing) / 6 + 49)  # the end token is one of 50
    cut = report(folder, "data.responses={by: teacher, max_new_tokens: 50}", "data.max_length=70")
    assert cut.train.learned == pytest.approx(sum(70 - size + 1 for size in nothing) / 6)
    assert found.seconds["responses"] > 0
    assert "(the teacher's response)" in "".join(text for text, _ in found.example)


def test_a_large_source_is_judged_by_a_sample(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = report(folder).train
    monkeypatch.setattr("kdcore.jobs.preflight.rows.SAMPLE", 2)
    found = report(folder).train
    assert (found.rows, found.sampled) == (6, 2)  # the first and the fourth, which are alike
    assert found.tokens < whole.tokens


def test_the_example_shows_what_is_learned(folder: Path) -> None:
    example = report(folder).example
    assert "".join(text for text, _ in example) == (
        "<|im_start|>system\nYou are helpful<|im_end|>\n<|im_start|>user\nthe mat 0<|im_end|>\n"
        "<|im_start|>assistant\nfor the teacher<|im_end|>"
    )
    learned = "".join(text for text, is_learned in example if is_learned)
    assert learned == "for the teacher<|im_end|>"


def test_steps_are_those_of_the_trainer(folder: Path) -> None:
    assert report(folder).steps == 9
    assert report(folder, "training.accumulation=2").steps == 6
    assert report(folder, "training.batch_size=4", "training.epochs=0.5").steps == 1
    assert report(folder, "training.steps=5").steps == 5


def test_memory_and_time(folder: Path) -> None:
    asked = spec(folder)
    teacher = load_model(asked.teacher)
    student = load_student(asked.student, teacher)
    weights = 4 * sum(p.numel() for p in student.model.parameters())
    found = report(folder)
    assert found.memory["teacher"] == 4 * sum(p.numel() for p in teacher.model.parameters())
    assert found.memory["student"] == found.memory["gradients"] == weights
    assert found.memory["optimizer"] == 2 * weights
    assert found.memory["momentum policy"] == 0
    assert found.seconds["measuring"] == found.seconds["responses"] == 0

    # a teacher's forward, a student's, and two backwards: per row, and at the head per answer
    head = student.model.get_output_embeddings().weight.numel()  # tied: the input's too
    bodies = [sum(p.numel() for p in m.model.parameters()) - head for m in (teacher, student)]
    row = (bodies[0] + 3 * bodies[1]) * found.train.tokens + 4 * head * found.train.learned
    assert found.seconds["training"] == pytest.approx(9 * 2 * 2 * row / 1e6)

    separate = report(
        folder,
        "method.splitters=[target_split]",
        "method.momentum=deepkd",
        "training.optimizer=sgd",
        "training.momentum=0",
        "training.clip=0",
    )
    assert len(separate.streams) == 2
    assert separate.memory["gradients"] == 3 * weights
    assert separate.memory["momentum policy"] == 2 * weights
    assert separate.memory["optimizer"] == 0
    looked = report(folder, "training.probe_every=4", "training.probe_batches=3")
    assert looked.memory["probing"] == 5 * weights
    assert looked.seconds["probing"] == pytest.approx(found.seconds["training"] * 2 * 3 / 9)
    assert found.memory["probing"] == found.seconds["probing"] == 0
    adapters = report(folder, "student.lora.r=2")
    assert adapters.memory["gradients"] < weights / 2
    assert adapters.memory["student"] > weights


def test_matchers_cost_memory_and_time(folder: Path) -> None:
    plain = report(folder)
    assert plain.memory["matchers"] == 0
    width, positions = 16, 2 * plain.train.longest
    asked = "{name: hidden, pairs: [[1, 1], [-1, -1]], projection: always}"
    hidden = report(folder, f"method.matchers=[{asked}]")
    own = 4 * (width * width + width)  # one projection for both pairs, trained with the student
    assert hidden.memory["matchers"] == own + positions * 2 * 2 * width * 4
    assert hidden.memory["gradients"] == plain.memory["gradients"] + own
    more = hidden.seconds["training"] - plain.seconds["training"]
    rows = 9 * 2
    assert more == pytest.approx(rows * 6 * 2 * plain.train.learned * own / 4 / 1e6)

    maps = report(folder, "method.matchers=[attention]", "training.chunk=7")
    chunk = 4 * 4 * 7 * plain.train.longest * (2 + 2)  # copies x bytes x queries x keys x heads
    assert maps.memory["matchers"] == 2 * positions * 2 * width * 4 + chunk
    more = maps.seconds["training"] - plain.seconds["training"]
    assert more == pytest.approx(rows * 8 * plain.train.learned * plain.train.tokens * width / 1e6)


def told(folder: Path, *sets: str) -> list[str]:
    """The warnings, but that of the system turn that the tiny template adds."""
    return [line for line in report(folder, *sets).warnings if "chat template" not in line]


def test_coarse_weights_with_small_updates_are_told(folder: Path) -> None:
    coarse = ["student.dtype=bfloat16", "training.learning_rate=1e-5"]
    (said,) = told(folder, *coarse)
    assert "bfloat16" in said and "training.precision: bf16" in said and "1e-05" in said
    assert not told(folder, "training.learning_rate=1e-5")
    assert not told(folder, coarse[0], "training.learning_rate=1e-3")
    (adapters,) = told(folder, *coarse, "student.lora.r=2")
    assert "bfloat16" not in adapters  # peft's adapters are float32
    assert told(folder, coarse[0], "training.optimizer=sgd")


def test_what_lora_trains_is_counted_and_adapters_of_a_cut_student_are_told(folder: Path) -> None:
    sets = ["student.lora.r=2", "student.lora.targets=[q_proj]"]
    found = report(folder, *sets)
    width = found.models["student"].hidden
    assert found.adapted == 2 * 2 * (width + width)  # two layers, an A and a B of rank 2
    (said,) = told(folder, *sets)
    assert "lost layers" in said
    assert not told(folder, "student={model: teacher, lora: {r: 2}}")
    assert report(folder).adapted is None


def test_a_run_of_hours_without_checkpoints_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "throughput", lambda **_: 1e3)
    assert "training.save_every is not set" in told(folder)[0]
    assert not told(folder, "training.save_every=2")


def test_heldout_rows_that_are_trained_on_are_told(folder: Path, tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1], {"prompt": ROWS[2]["prompt"], "response": "another"}]
    write_lines(tmp_path / "held.jsonl", rows)
    named = f"data.heldout={{name: chat, path: {tmp_path / 'held.jsonl'}}}"
    (said,) = told(folder, named)
    assert said.startswith("2 of 3 held-out rows are also in data.train")
    (said,) = told(folder, named, "data.responses.by=teacher", "training.save_every=2")
    assert said.startswith("3 of 3 held-out rows are also in data.train")
    assert not told(folder, "data.heldout=20 %")


def test_layers_of_a_smaller_model_are_told(folder: Path) -> None:
    found = report(folder, "student.layers=[0, 1]")
    assert any("ends at layer 1, and the model has the layers 0 to 3" in w for w in found.warnings)
    student = found.models["student"]
    assert (student.layers, student.cut_from) == (2, 4)
    for spread in ("[0, 2]", "[1, -1]"):
        warnings = report(folder, f"student.layers={spread}").warnings
        assert not any("ends at layer" in line for line in warnings)


def test_text_that_the_template_adds_is_told(folder: Path, tmp_path: Path) -> None:
    assert any("'system You are helpful'" in line for line in report(folder).warnings)
    assert not report(folder, "data.train.system=Be brief.").warnings
    plain = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    prompt = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (tmp_path / "plain.jinja").write_text(plain + prompt)
    assert not report(folder, f"teacher.template={tmp_path / 'plain.jinja'}").warnings
    told = [{"function": {"name": "look", "description": "looks for a city by its name"}}]
    write_lines(tmp_path / "tools.jsonl", [row | {"tools": told} for row in ROWS])
    (tmp_path / "tools.jinja").write_text("{{ tools | tojson }}" + plain + prompt)
    sets = f"teacher.template={tmp_path / 'tools.jinja'}", f"data.train.path={tmp_path}/tools.jsonl"
    assert not report(folder, *sets).warnings, "the tools are in the data"


def test_all_mistakes_are_told_with_their_fields(folder: Path, tmp_path: Path) -> None:
    """A missing tracker does not hide the rows, nor these the layers; each is told once."""
    (tmp_path / "thread.jsonl").write_text('{"thread": [{"who": "a", "says": "b"}]}\n')
    sets = [
        "training.report_to=[swanlab]",
        f"data.train.path={tmp_path / 'thread.jsonl'}",
        f"data.heldout={{name: chat, path: {tmp_path / 'none.jsonl'}}}",
        "student.layers=[9]",
    ]
    with pytest.raises(Mistakes) as raised:
        report(folder, *sets)
    found = {mistake.field: mistake for mistake in raised.value.found}
    assert [*found] == ["training.report_to", "data.train", "data.heldout", "student.layers"]
    assert found["student.layers"].cure.endswith("; or remove layers, which keeps all of them")
    assert found["training.report_to"].cure == "run: pip install swanlab, or remove it"
    assert "messages: thread, role: who, content: says" in found["data.train"].cure
    with pytest.raises(Mistakes) as placed, placing(folder / "spec.yaml", sets):
        raise raised.value
    located = placed.value.cause.splitlines()
    file = folder / "spec.yaml"
    assert [line.partition("=")[0] for line in located] == [
        "--set data.heldout",
        "--set student.layers",
        "--set training.report_to",
        f"{file}:7: data.train: thread.jsonl:1 has no prompt; its fields are thread",
    ]


def test_everything_that_was_chosen_is_named(folder: Path) -> None:
    found = report(folder, "method.gates=[{name: inverted, gate: speckd}]", "method.terms.task=0.5")
    chosen = [(kind, name) for kind, name, _ in found.components]
    assert chosen == [
        ("source (train)", "chat"),
        ("gate", "inverted"),
        ("gate", "speckd"),
        ("divergence", "forward_kl"),
        ("momentum", "shared"),
    ]
    assert found.terms == {"task": 0.5, "kd": 1.0}
    assert found.classes == len(tiny_tokenizer())
    assert {who: facts.layers for who, facts in found.models.items()} == {
        "teacher": 4,
        "student": 2,
    }


JUDGED = ["data.heldout={name: chat, path: train.jsonl}", "evaluation.answers=[exact_match]"]


@pytest.mark.parametrize(
    ("sets", "field", "cause", "cure"),
    [
        (
            ["method.splitters=[target_split]", "method.momentum=deepkd"],
            "training.optimizer",
            "momentum policy 'deepkd' computes the whole update",
            "set training.optimizer: sgd, training.momentum: 0.0, training.clip: 0.0",
        ),
        (
            ["method.terms.target=1"],
            "method.terms",
            "method.terms sets a weight for unknown term 'target'",
            "use one of: feature, kd, label, task",
        ),
        (
            ["student.layers=[0, 9]"],
            "student.layers",
            "layers [9] do not exist",
            "use indices from 0 to 3",
        ),
        (
            ["data.train.path=none.jsonl"],
            "data.train",
            "none.jsonl cannot be read",
            "the spec's folder",
        ),
        (
            ["training.trainer.foo=1"],
            "training.trainer.foo",
            "training.trainer.foo is not a field of transformers.TrainingArguments",
            "in all)",
        ),
        (
            ["training.trainer.fsdp=true"],
            "training.trainer.fsdp",
            "training.trainer.fsdp shards the model",
            "accelerate launch",
        ),
        (
            ["training.trainer.use_liger_kernel=true"],
            "training.trainer.use_liger_kernel",
            "requires the package liger-kernel",
            "pip install",
        ),
        (
            [
                *("method.splitters=[target_split]", "method.momentum=deepkd"),
                *("training.optimizer=sgd", "training.momentum=0", "training.clip=0"),
                "training.trainer.gradient_checkpointing=true",
                "training.trainer.gradient_checkpointing_kwargs={use_reentrant: true}",
            ],
            "training.trainer.gradient_checkpointing_kwargs",
            "use_reentrant supports one backward pass, and momentum policy 'deepkd' needs 2",
            "set use_reentrant: false",
        ),
        (
            ["training.trainer.lr_scheduler_kwargs={cycles: 2}"],
            "training.trainer.lr_scheduler_kwargs",
            "training.trainer.lr_scheduler_kwargs does not fit",
            "use arguments of training.schedule",
        ),
        (
            ["training.trainer.dataloader_persistent_workers=true"],
            "training.trainer.dataloader_persistent_workers",
            "needs dataloader_num_workers above 0",
            "set training.trainer.dataloader_num_workers",
        ),
        (
            ["training.trainer.train_sampling_strategy=group_by_length"],
            "training.trainer.train_sampling_strategy",
            "group_by_length is not supported",
            "replace the strategy by training.group_by_length: true",
        ),
        (["teacher.model=nowhere/at/all"], "teacher", "nowhere/at/all", "use a folder"),
        (JUDGED, "evaluation.answers", "does not contain a number", "remove exact_match"),
    ],
)
def test_what_would_stop_the_run_is_told_before_it(
    folder: Path, sets: list[str], field: str, cause: str, cure: str
) -> None:
    with pytest.raises(Mistakes) as caught:
        report(folder, *sets)
    (mistake,) = caught.value.found
    assert mistake.field == field
    assert cause in mistake.cause
    assert cure in mistake.cure


def test_vocabularies_are_compared_without_weights(folder: Path, tmp_path: Path) -> None:
    other = tiny_model("qwen2")
    other.tokenizer.add_tokens(["<call>"])
    other.model.resize_token_embeddings(291, mean_resizing=False)
    saved(other, tmp_path)
    with pytest.raises(UserError, match="differ in 1 tokens"):
        report(folder, f"student={{model: {tmp_path}}}")


def test_nothing_is_written(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    report(folder)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("products", [None, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_throughput_is_measured(
    monkeypatch: pytest.MonkeyPatch, weights: torch.dtype, products: torch.dtype | None
) -> None:
    monkeypatch.undo()
    speed = estimates.throughput(rows=64, width=32, weights=weights, products=products)
    assert 1e5 < speed < 1e15


def test_each_pass_has_the_speed_of_its_dtype(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast holds for the training; the held-out rows are measured in the weights' dtype."""
    monkeypatch.setattr(
        estimates,
        "throughput",
        lambda weights, products, **_: 1e8 if torch.bfloat16 in (weights, products) else 1e6,
    )
    plain = report(folder, "data.heldout=20 %").seconds
    cast = report(folder, "data.heldout=20 %", "training.precision=bf16").seconds
    assert cast["training"] == pytest.approx(plain["training"] / 100)
    assert cast["measuring"] == plain["measuring"] > 0
    small = report(folder, "data.heldout=20 %", "student.dtype=bfloat16", "teacher.dtype=bfloat16")
    assert small.seconds["measuring"] == pytest.approx(plain["measuring"] / 100)


def test_answers_to_held_out_rows_take_time(folder: Path) -> None:
    sets = ["data.heldout=20 %", "evaluation.answers=[rouge_l]", "evaluation.answer_tokens=7"]
    plain, scored = report(folder, sets[0]), report(folder, *sets)
    (student,) = (m for n, m in scored.models.items() if n == "student")
    assert plain.heldout is not None and plain.heldout.rows > 0
    more = 2 * student.parameters * 7 * plain.heldout.rows / (1e6 * estimates.DECODING)
    measurements = 2  # before the training and after it
    assert scored.seconds["measuring"] - plain.seconds["measuring"] == pytest.approx(
        measurements * more
    )
