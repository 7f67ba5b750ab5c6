"""Sound components as small as can be, and after each those that break it in one way."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdcore.method.records import LOG_ZERO, LogitBatch, Part, Row


class Built:
    """Is built as every component is, and needs neither params nor context."""

    def __init__(self, params: object = None, context: object = None) -> None:
        pass


def confidence(logits: Tensor) -> Tensor:
    return logits.softmax(-1).amax(-1)


class SoundGate(Built):
    floor = 0.1

    def __call__(self, batch: LogitBatch) -> Tensor:
        draws = torch.rand(batch.mask.shape, generator=batch.generator)
        return torch.where(draws < confidence(batch.teacher), 1.0, self.floor)


class LeaksGradient(Built):
    def __call__(self, batch: LogitBatch) -> Tensor:
        return confidence(batch.student)


class AveragesRows(Built):
    def __call__(self, batch: LogitBatch) -> Tensor:
        sure = confidence(batch.teacher)
        return (sure >= sure.mean(0, keepdim=True)).float()


class AveragesPositions(Built):
    def __call__(self, batch: LogitBatch) -> Tensor:
        sure = confidence(batch.teacher)
        return (sure >= sure.mean(1, keepdim=True)).float()


class ReadsPadding(Built):
    def __call__(self, batch: LogitBatch) -> Tensor:
        return confidence(batch.teacher) * batch.mask.float().mean(1, keepdim=True)


class DrawsGlobally(Built):
    def __call__(self, batch: LogitBatch) -> Tensor:
        return torch.rand(batch.mask.shape)


class DrawsUnevenly(Built):
    """Normal numbers are drawn by the block, so their order depends on how many are asked for."""

    def __call__(self, batch: LogitBatch) -> Tensor:
        rows = [torch.randn(row.shape, generator=batch.generator) for row in batch.mask]
        return (torch.stack(rows) > 0).float()


class ExceedsOne(Built):
    def __call__(self, batch: LogitBatch) -> Tensor:
        return 1 + confidence(batch.teacher)


class NaiveEntropy(Built):
    def __call__(self, batch: LogitBatch) -> Tensor:
        probs = batch.teacher.softmax(-1)
        return (1 + (probs * probs.log()).sum(-1)).clamp(0, 1)


class WritesLogits(Built):
    def __call__(self, batch: LogitBatch) -> Tensor:
        return batch.teacher.sub_(batch.teacher.amax(-1, keepdim=True)).exp().sum(-1).reciprocal()


class WrongSign(Built):
    def __call__(self, batch: LogitBatch) -> Tensor:
        return 1 - confidence(batch.teacher)


class HiddenCount(Built):
    """Keeps across batches what no checkpoint holds."""

    def __init__(self, params: object = None, context: object = None) -> None:
        self.seen: set[float] = set()

    def __call__(self, batch: LogitBatch) -> Tensor:
        self.seen.add(batch.progress)
        return (confidence(batch.teacher) >= 0.2 * len(self.seen)).float()


class SoundRanked(Built):
    def score(self, batch: LogitBatch) -> Tensor:
        return confidence(batch.teacher)

    def weigh(self, scores: Tensor, progress: float) -> Tensor:
        return (scores >= scores.mean()).float()


class RanksByPlace(SoundRanked):
    def weigh(self, scores: Tensor, progress: float) -> Tensor:
        return (torch.arange(len(scores)) < len(scores) / 2).float()


class NeedsScores(SoundRanked):
    def weigh(self, scores: Tensor, progress: float) -> Tensor:
        return (scores >= scores.amax() / 2).float()


class SoundLearning(Built):
    """A gate whose threshold follows the loss."""

    def __init__(self, params: object = None, context: object = None) -> None:
        self.threshold = torch.tensor(0.0)

    def __call__(self, batch: LogitBatch) -> Tensor:
        return (confidence(batch.teacher) >= self.threshold).float()

    def step_done(self, metrics: Mapping[str, float]) -> None:
        self.threshold = 0.5 * self.threshold + 0.1 * metrics["loss"]

    def state_dict(self) -> dict[str, Tensor]:
        return {"threshold": self.threshold}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.threshold = state["threshold"]


class ForgetsThreshold(SoundLearning):
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass


def out(part: Part) -> Tensor:
    return part.student <= LOG_ZERO / 8


class SoundSplitter(Built):
    """Weighs a part by the teacher's confidence, and keeps the remainder as another part."""

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(f"{name}_{half}" for name in names for half in ("sure", "unsure"))

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        return {
            f"{name}_{half}": replace(part, weight=part.weight * weight)
            for name, part in parts.items()
            for half, weight in self.halves(part).items()
        }

    def halves(self, part: Part) -> dict[str, Tensor]:
        sure = confidence(part.teacher)
        return {"sure": sure, "unsure": 1 - sure}


class LiesAboutParts(SoundSplitter):
    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return names


class UndetachedWeight(SoundSplitter):
    def halves(self, part: Part) -> dict[str, Tensor]:
        sure = confidence(part.student)
        return {"sure": sure, "unsure": 1 - sure}


class AveragesWeights(SoundSplitter):
    def halves(self, part: Part) -> dict[str, Tensor]:
        sure = confidence(part.teacher).mean(0, keepdim=True).expand(part.weight.shape)
        return {"sure": sure, "unsure": 1 - sure}


class NaiveOdds(SoundSplitter):
    def halves(self, part: Part) -> dict[str, Tensor]:
        sure = confidence(part.teacher)
        return {"sure": sure / (1 - sure), "unsure": 1 - sure}


class HalfAWeight(SoundSplitter):
    def halves(self, part: Part) -> dict[str, Tensor]:
        sure = confidence(part.teacher)
        return {"sure": sure / 2, "unsure": 1 - sure}


class MixesTeacher(SoundSplitter):
    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        mixed = {
            name: replace(part, teacher=(part.teacher + part.student) / 2)
            for name, part in parts.items()
        }
        return {
            name: replace(part, weight=part.weight.detach())
            for name, part in super().__call__(mixed, batch).items()
        }


class ReadmitsClasses(SoundSplitter):
    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        raised = {
            name: replace(part, student=torch.where(out(part), part.student / 5e3, part.student))
            for name, part in parts.items()
        }
        return super().__call__(raised, batch)


class SoundDivergence(Built):
    """KL(teacher || student)."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (teacher.exp() * (teacher - student)).sum(-1)


class WrongWay(Built):
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student.exp() * (student - teacher)).sum(-1)


class MeanOverPositions(SoundDivergence):
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        each = super().__call__(student, teacher)
        return each.mean(1, keepdim=True).expand(each.shape)


class MeanOverRows(SoundDivergence):
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        each = super().__call__(student, teacher)
        return each.mean(0, keepdim=True).expand(each.shape)


class SumsPositions(SoundDivergence):
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().__call__(student, teacher).sum(1)


class NanAtLogZero(Built):
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        probs = teacher.exp()
        return (probs * (probs.log() - student)).sum(-1)


class CrossEntropy(Built):
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return -(teacher.exp() * student).sum(-1)


class FreezesStudent(SoundDivergence):
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().__call__(student.detach(), teacher) + 0 * student.sum(-1)


class SmoothsTeacher(Built):
    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ((teacher.exp() + 1e-3) * (teacher - student).abs()).sum(-1)


class SoundMomentum(Built):
    """A heavy ball for each term, each with a momentum of its own."""

    owns_momentum = True
    momenta: ClassVar = {"task": 0.9, "kd": 0.8}

    def __init__(self, params: object = None, context: object = None) -> None:
        self.buffers: dict[str, Tensor] = {}

    def streams(self, terms: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {term: (term,) for term in terms}

    def combine(
        self, gradients: Mapping[str, Sequence[Tensor]], parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        return [
            torch.stack([self.ball(s, i, tensors[i]) for s, tensors in gradients.items()]).sum(0)
            for i in range(len(parameters))
        ]

    def ball(self, stream: str, index: int, gradient: Tensor) -> Tensor:
        name = f"{stream}.{index}"
        buffer = self.buffers.setdefault(name, torch.zeros_like(gradient))
        return buffer.mul_(self.momenta[stream]).add_(gradient)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in self.buffers.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.buffers = {name: tensor.clone() for name, tensor in state.items()}


class ForgetsBuffers(SoundMomentum):
    def state_dict(self) -> dict[str, Tensor]:
        return {}


class GivesLiveState(SoundMomentum):
    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.buffers)


class KeepsGivenState(SoundMomentum):
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.buffers = dict(state)


class ReturnsBuffers(SoundMomentum):
    """One buffer for the sum, which is also what it gives out."""

    def combine(
        self, gradients: Mapping[str, Sequence[Tensor]], parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        sums = [torch.stack(column).sum(0) for column in zip(*gradients.values(), strict=True)]
        return [self.ball("task", i, gradient) for i, gradient in enumerate(sums)]


class DropsTerm(SoundMomentum):
    def streams(self, terms: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {term: (term,) for term in terms[:-1]}


class IgnoresStream(SoundMomentum):
    def combine(
        self, gradients: Mapping[str, Sequence[Tensor]], parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        return super().combine({"task": gradients["task"]}, parameters)


class Widens(SoundMomentum):
    def combine(
        self, gradients: Mapping[str, Sequence[Tensor]], parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        return [update.float() for update in super().combine(gradients, parameters)]


class DecaysInPlace(SoundMomentum):
    def combine(
        self, gradients: Mapping[str, Sequence[Tensor]], parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        for parameter in parameters:
            parameter.mul_(0.99)
        return super().combine(gradients, parameters)


class JoinsUnequal(SoundMomentum):
    """One buffer for terms whose momenta differ."""

    def streams(self, terms: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {"task": tuple(terms)}


class SoundSource(Built):
    def read(self) -> Sequence[str]:
        return ["a first example", "a second", "the third"]

    def encode(self, example: str, tokenizer: Any, max_length: int) -> Row:
        tokens = torch.tensor(tokenizer(example)["input_ids"][:max_length])
        labels = tokens.roll(-1)
        mask = torch.arange(len(tokens)) < len(tokens) - 1
        return Row({"input_ids": tokens}, labels, mask, example)


class Unshifted(SoundSource):
    def encode(self, example: str, tokenizer: Any, max_length: int) -> Row:
        row = super().encode(example, tokenizer, max_length)
        return replace(row, labels=row.inputs["input_ids"])
