"""docs/library.md: its Python runs from top to bottom, and its subclasses train as a plain loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTConfig

from kdcore import DistillationLoss
from tests.fixtures.pages import BLOCKS, ROOT
from tests.tiny.tiny_chat_models import saved, tiny_model

PAGE = ROOT / "docs" / "library.md"
TRAINING: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "optim": "sgd",
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models that the page names, and the working directory."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("teacher", "student")):
        saved(tiny_model(seed=seed), tmp_path / "path" / "to" / name)
    return tmp_path


class Loader(list[dict[str, Any]]):
    """Batches that are new dicts in each iteration, as those of a DataLoader."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (dict(batch) for batch in super().__iter__())


def rows() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    made = []
    for length in (6, 8, 7, 8, 6, 8, 8, 7):
        tokens = torch.randint(3, 50, (length,))
        padded = torch.cat([tokens, torch.zeros(8 - length, dtype=torch.int64)])
        seen = (torch.arange(8) < length).long()
        labels = padded.masked_fill((seen == 0) | (torch.arange(8) < 2), -100)
        made.append({"input_ids": padded, "attention_mask": seen, "labels": labels})
    return made


def batches() -> list[dict[str, Any]]:
    every = rows()
    pairs = [every[place : place + 2] for place in range(0, len(every), 2)]
    return [{name: torch.stack([row[name] for row in pair]) for name in pair[0]} for pair in pairs]


def conversations() -> Dataset:
    """Chats as TRL takes them."""
    said = {
        "prompt": [{"role": "user", "content": "the mat of the teacher?"}],
        "completion": [{"role": "assistant", "content": "the teacher sat on the mat"}],
    }
    return Dataset.from_list([said] * 8)


def page_of(folder: Path) -> dict[str, Any]:
    """What the page leaves with the data that its reader has."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "path" / "to" / "student")
    return page(
        loader=Loader(batches()), rows=rows(), conversations=conversations(), tokenizer=tokenizer
    )


def page(**given: Any) -> dict[str, Any]:
    """What the page's blocks leave, run one after the other with these names."""
    names = dict(given)
    for block in BLOCKS:
        if block.page == PAGE and block.language == "python":
            exec(compile(block.text, str(block), "exec"), names)  # noqa: S102
    return names


def plain(folder: Path) -> dict[str, torch.Tensor]:
    """The weights after the two steps by a loop that is written out."""
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder / "path" / "to" / name)
        for name in ("teacher", "student")
    )
    loss_of = DistillationLoss(gates=["speckd"], normalize="token")
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    every = batches()
    for step in range(2):
        both = every[2 * step : 2 * step + 2]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in both)
        for batch in both:
            labels = batch.pop("labels")
            with torch.no_grad():
                taught = teacher(**batch).logits
            loss_of(student(**batch).logits, taught, labels, num_items=tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(student.named_parameters())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("DistillationTrainer", TrainingArguments), ("DistillationSFTTrainer", SFTConfig)],
)
def test_the_page_runs_and_its_trainers_train_as_a_plain_loop(
    folder: Path, name: str, arguments: Any
) -> None:
    names = page_of(folder)
    fresh = AutoModelForCausalLM.from_pretrained(folder / "path" / "to" / "student")
    given = {key: [row[key].tolist() for row in rows()] for key in rows()[0]}
    own: dict[str, Any] = {}
    if arguments is SFTConfig:
        own = {"dataset_kwargs": {"skip_prepare_dataset": True}, "bf16": False}
    trainer = names[name](
        model=fresh,
        args=arguments("again", train_sampling_strategy="sequential", **TRAINING, **own),
        train_dataset=Dataset.from_dict(given),
        teacher=names["teacher"],
        loss_of=DistillationLoss(gates=["speckd"], normalize="token"),
    )
    trainer.train()
    for key, value in plain(folder).items():
        torch.testing.assert_close(dict(fresh.named_parameters())[key], value)
