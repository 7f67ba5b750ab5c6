"""GOLD's hybrid loss: compare the classes that both vocabularies have, and sort the others.

With p the teacher and q the student over the classes S that both have, and over those O that one of
them has alone,

    L = |S| / V D(p_S, q_S) + (1 - |S| / V) sum_i |p_O(i) - q_O(i)|,   V the teacher's classes

The first is the part ``shared``, the second ``own``, whose divergence is ``total_variation`` with
the weight 2. Source: GOLD of trl, ``uld_use_hybrid_loss``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcore import BuildContext, LogitBatch, Part, UserError, by_keywords
from kdcore_alignment import params
from kdcore_alignment.sorted_classes import as_wide, descending, rests_of

SHARED, OWN = "shared", "own"


@dataclass(frozen=True, slots=True)
class Classes:
    """The numbers of the classes on the device of the logits: shared ones in one order."""

    shared: tuple[Tensor, Tensor]
    own: tuple[Tensor, Tensor]


class Gold:
    """Splitter of the classes that both models have from those of one of them."""

    joins_tokenizers = True

    @by_keywords(params.Gold)
    def __init__(self, params: params.Gold, context: BuildContext) -> None:
        self.adaptive = params.adaptive
        self.reads_spans = params.merge != "none"
        self._pairs: list[tuple[int, int]] | None = None
        self._found: dict[tuple[int, int, torch.device], Classes] = {}

    def bind(self, student: Sequence[Hashable], teacher: Sequence[Hashable]) -> None:
        """Find the classes of equal meaning; unbound, classes of equal number are equal.

        Of several classes with one meaning, e.g. a byte and its character, the last one counts.
        """
        ours = {meaning: number for number, meaning in enumerate(student)}
        theirs = {meaning: number for number, meaning in enumerate(teacher)}
        self._pairs = [(ours[each], theirs[each]) for each in ours if each in theirs]
        if not self._pairs:
            raise UserError(
                "splitter 'gold' compares the tokens that both tokenizers have, and there are none",
                "use the splitter uld",
                "method.splitters",
            )

    def parts(self, names: tuple[str, ...]) -> tuple[str, ...]:
        if names != ("kd",):
            raise UserError(
                "splitter 'gold' compares whole vocabularies, and an earlier splitter has cut the "
                "knowledge already",
                "write gold before the other splitters, once",
                "method.splitters",
            )
        return (SHARED, OWN)

    def __call__(self, parts: Mapping[str, Part], batch: LogitBatch) -> dict[str, Part]:
        (part,) = parts.values()
        logp = part.compared
        if self.reads_spans and (rests := rests_of(logp[0], batch)) is not None:
            logp = logp[0] + rests[0][..., None], logp[1] + rests[1][..., None]
        classes = self.classes(*logp)
        shared, own = (
            [each.index_select(-1, those) for each, those in zip(logp, numbers, strict=True)]
            for numbers in (classes.shared, classes.own)
        )
        own = [descending(each) for each in own]
        share = shared[1].shape[-1] / logp[1].shape[-1]
        factors = (share, 1 - share) if self.adaptive else (1.0, 1.0)
        return {
            name: replace(
                part, student=ours, teacher=theirs, weight=factor * part.weight, log_probs=True
            )
            for name, (ours, theirs), factor in zip(
                (SHARED, OWN), (shared, as_wide(*own)), factors, strict=True
            )
        }

    def classes(self, student: Tensor, teacher: Tensor) -> Classes:
        """The classes of these logits; those that a model has beyond its tokenizer are its own."""
        wide, device = (student.shape[-1], teacher.shape[-1]), student.device
        key = (*wide, device)
        if key not in self._found:
            pairs = self._pairs or [(number, number) for number in range(min(wide))]
            kept = [pair for pair in pairs if pair[0] < wide[0] and pair[1] < wide[1]]
            shared = torch.tensor(kept, dtype=torch.int64).view(-1, 2).T
            own = []
            for numbers, width in zip(shared, wide, strict=True):
                alone = torch.ones(width, dtype=torch.bool)
                alone[numbers] = False
                own.append(alone.nonzero()[:, 0].to(device))
            ours, theirs = shared.to(device)
            self._found[key] = Classes((ours, theirs), (own[0], own[1]))
        return self._found[key]
