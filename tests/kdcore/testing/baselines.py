"""A sound baseline, and faulty ones with the faults that their names say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kdcore.decoding.baseline import DecodedBatch, DecodingSettings
from kdcore_baselines.decoders.transformers_generate import Generate


class SoundBaseline(Generate):
    """Plain `generate` by another name."""


class AnswersInReverse(Generate):
    def decode(self, prompts: Sequence[Sequence[int]], seed: int) -> DecodedBatch:
        found = super().decode(prompts, seed)
        assert found.answers is not None
        return replace(found, answers=found.answers[::-1])


class DropsTheEnd(Generate):
    def decode(self, prompts: Sequence[Sequence[int]], seed: int) -> DecodedBatch:
        found = super().decode(prompts, seed)
        ends = self.settings.ends
        answers = [[each for each in row if each not in ends] for row in found.answers or []]
        return DecodedBatch(sum(map(len, answers)), answers)


class IgnoresTheSeed(Generate):
    def decode(self, prompts: Sequence[Sequence[int]], seed: int) -> DecodedBatch:
        return super().decode(prompts, 0)


class StartsOnce(Generate):
    def start(self, settings: DecodingSettings) -> None:
        if not hasattr(self, "settings"):
            super().start(settings)


class ReadsTheLastAnswer(Generate):
    last = 0

    def decode(self, prompts: Sequence[Sequence[int]], seed: int) -> DecodedBatch:
        found = super().decode([[*each[:-1], each[-1] + self.last] for each in prompts], seed)
        self.last = 1
        return found
