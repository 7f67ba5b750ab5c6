"""Several teachers as one: the average in probabilities, a row's own teacher, and its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcore.data.best_classes import CachedLogits, best_classes
from kdcore.errors import UserError
from kdcore.method.logits import Head, HiddenLogits, TeacherLogits
from kdcore.method.records import Batch
from kdcore.training.teachers.kinds import Teacher
from kdcore.training.teachers.mixture import Mixture
from kdcore.training.teachers.row_weights import RowWeights

B, T, V = 5, 6, 37
NAMES = ("math", "chat", "wide")


@dataclass(frozen=True)
class Known(Teacher):
    """A teacher with the logits [rows, T, V'] that it is given; it counts the rows it is asked."""

    known: Tensor
    asked: list[int] = field(default_factory=list)
    requested: list[int] = field(default_factory=list)

    @property
    def prefetch(self) -> int:
        return 1

    @property
    def has_any(self) -> bool:
        return True

    def logits(self, batch: Batch, progress: float) -> TeacherLogits:
        self.asked.extend(batch.index.tolist())
        here = self.known[batch.index].flatten(0, 1)[batch.positions]
        return HiddenLogits(here, Head(), here.shape[-1])

    def of_any(self, batch: Batch) -> TeacherLogits:
        return self.logits(batch, 1.0)

    def request(self, padded: Any, progress: float) -> None:
        self.requested.extend(padded["index"].tolist())


@dataclass(frozen=True)
class Stored(Known):
    """The same of which only the top 4 classes are known."""

    def logits(self, batch: Batch, progress: float) -> TeacherLogits:
        here = self.known[batch.index].flatten(0, 1)[batch.positions]
        ids, logp, tail = best_classes(here, 4)
        return CachedLogits(ids, logp.float(), tail.float(), here.shape[-1])


def batch(*said: str) -> Batch:
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(B, T, generator=generator) < 0.6
    index = torch.randperm(B, generator=generator)
    inputs = {"input_ids": torch.zeros(B, T, dtype=torch.int64)}
    return Batch(inputs, torch.zeros(B, T, dtype=torch.int64), mask, index, teachers=said)


def three(kind: type[Known] = Known) -> dict[str, Known]:
    """Teachers with different widths of the vocabulary, of which V classes are shared."""
    generator = torch.Generator().manual_seed(0)
    widths = (V, V, V + 3)
    return {
        name: kind(5 * torch.randn(B, T, width, generator=generator))
        for name, width in zip(NAMES, widths, strict=True)
    }


def expected(teachers: dict[str, Known], asked: Batch, weights: list[list[float]]) -> Tensor:
    """[N, V] float64 probabilities of the averages, over the shared classes."""
    whole = torch.zeros(B, T, V, dtype=torch.float64)
    for number, teacher in enumerate(teachers.values()):
        everywhere = Batch({}, asked.labels, torch.ones_like(asked.mask), asked.index)
        found = teacher.logits(everywhere, 0.0).logits(slice(0, B * T))
        shared = found.double()[:, :V].softmax(-1).view(B, T, V)
        whole += torch.tensor(weights).double()[:, number, None, None] * shared
    return whole.flatten(0, 1)[asked.positions]


def in_chunks(found: TeacherLogits, count: int, length: int) -> Tensor:
    starts = range(0, count, length)
    return torch.cat([found.logits(slice(n, min(n + length, count))) for n in starts])


@pytest.mark.parametrize("kind", [Known, Stored])
@pytest.mark.parametrize("length", [1, 4, 100])
def test_the_average_is_that_of_probabilities(kind: type[Known], length: int) -> None:
    said = ("", "chat", '{"math": 1, "wide": 3}', "", '{"wide": 2.5}')
    weights = [[0.5, 0.3, 0.2], [0, 1, 0], [0.25, 0, 0.75], [0.5, 0.3, 0.2], [0, 0, 1]]
    teachers, asked = three(kind), batch(*said)
    average = {"math": 5.0, "chat": 3.0, "wide": [(0.0, 0.0), (1.0, 4.0)]}
    mixture = Mixture(teachers, RowWeights(NAMES, average), V)
    found = in_chunks(mixture.logits(asked, 0.5), len(asked.positions), length)
    torch.testing.assert_close(
        found.double().log_softmax(-1),
        expected(teachers, asked, weights).log(),
        rtol=1e-5,
        atol=2e-6,
    )


def test_logits_of_unlikely_classes_do_not_underflow() -> None:
    """exp of -120 is 0 in float32: a sum of probabilities would lose the class."""
    teachers = {name: Known(torch.zeros(B, T, V)) for name in ("math", "chat")}
    teachers["math"].known[..., 0], teachers["chat"].known[..., 0] = -120.0, -150.0
    asked = batch()
    mixture = Mixture(teachers, RowWeights(("math", "chat"), {}), V)
    found = mixture.logits(asked, 0.0).logits(slice(0, 100))
    wanted = expected(teachers, asked, [[0.5, 0.5]] * B).log()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)


def test_a_row_of_one_teacher_has_its_logits_to_the_bit_and_runs_no_other() -> None:
    said = ("math", "chat", "math", "wide", "chat")
    teachers, asked = three(), batch(*said)
    found = Mixture(teachers, RowWeights(NAMES, {}), V).logits(asked, 0.0)
    whole = found.logits(slice(0, len(asked.positions)))
    rows = asked.positions // T
    for name, teacher in teachers.items():
        own = [said[row] == name for row in rows.tolist()]
        alone = teacher.known[asked.index].flatten(0, 1)[asked.positions][own]
        assert torch.equal(whole[own], alone[:, :V])
        taught = [each == name for each in said]
        assert teacher.asked == asked.index[taught].tolist()


def test_a_weight_of_zero_at_a_time_of_the_training_runs_no_teacher() -> None:
    teachers, asked = three(), batch()
    weights = RowWeights(NAMES, {"math": [(0.0, 1.0), (0.5, 0.0)], "chat": 1.0})
    mixture = Mixture(teachers, weights, V)
    mixture.logits(asked, 0.75)
    assert [len(teacher.asked) for teacher in teachers.values()] == [0, B, 0]
    assert weights.counts(["", "math", "wide"]) == {
        "math": (1, 1),
        "chat": (0, 1),
        "wide": (1, 0),
    }
    for teacher in teachers.values():
        teacher.asked.clear()
    mixture.of_any(asked)  # the average of the last step
    assert [len(teacher.asked) for teacher in teachers.values()] == [0, B, 0]


def test_rows_are_requested_of_their_teachers() -> None:
    teachers, index = three(), torch.arange(B)
    padded = {
        "mask": torch.ones(B, T).bool(),
        "index": index,
        "teachers": ["math", "chat", "", "wide", '{"math": 1, "chat": 1}'],
    }
    Mixture(teachers, RowWeights(NAMES, {"wide": 1.0}), V).request(padded, 0.0)
    asked = {name: teacher.requested for name, teacher in teachers.items()}
    assert asked == {"math": [0, 4], "chat": [1, 4], "wide": [2, 3]}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("maths", "row-1 names the unknown teacher 'maths'"),
        ('{"math": 1, "gpt": 1}', "row-1 names the unknown teacher 'gpt'"),
        ('{"math": -1}', "row-1 has the teacher weights"),
        ('{"math": 0}', "row-1 has the teacher weights"),
        ('{"math": "much"}', "row-1 has the teacher weights"),
        ("{math", "row-1 names the unknown teacher '{math'"),
        ("{}", "row-1 has the teacher weights"),
    ],
)
def test_what_a_row_cannot_say_of_its_teachers(said: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        RowWeights(NAMES, {}).refuse([("row-0", "math"), ("row-1", said)])
    assert refused.value.cause.startswith(message)
