"""The logits of a teacher with another tokenizer, at the positions of the student.

The learned tokens of both are cut into spans: a span ends where both tokenizations have a border in
the same text. At one position of each span the two distributions are compared, and the engine gives
the student's other positions the weight 0. A token of the student that has no counterpart is a span
of its own, which is not compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcore.method.logits import RepeatedLogits
from kdcore.method.positions import cuts

ALIGNED = "aligned"
"""The name in the figures of the share of a student's tokens at which a teacher with another
tokenizer is compared."""


@dataclass(frozen=True, slots=True)
class AlignedLogits(RepeatedLogits):
    """The teacher's logits at the student's N learned positions: a `TeacherLogits`.

    ``once`` has its logits at its own M learned positions, and ``place`` the one that each of the
    student's is compared with: not decreasing within a row, and any where nothing is compared.

    Attributes:
        labels: [M] int64, the teacher's tokens there.
        own_span: [M] int64, the number of the span of each, or -1 for a token without counterpart.
        span: [N] int64, the number of the span of each of the student's positions, not decreasing.
        span_on_cpu: [N] int64, the same on the CPU.
        compared: [N] bool, the positions at which the distributions are compared.
    """

    labels: Tensor
    own_span: Tensor
    span: Tensor
    span_on_cpu: Tensor
    compared: Tensor

    @property
    def states(self) -> dict[int, Tensor]:
        """The hidden states that matchers read, as in `kdcore.method.logits.HiddenLogits`."""
        own: Mapping[int, Tensor] = getattr(self.once, "states", {})
        return {number: states[self.place] for number, states in own.items()}

    @torch.no_grad()
    def rest(self, tau: float, length: int) -> Tensor:
        """The log-prob of what a span has beside the token that is compared.

        Args:
            tau: Temperature.
            length: Number of positions whose logits exist at a time.

        Returns:
            [N] float32, the sum of the teacher's log-probs of the other tokens of its span.
        """
        logp = torch.zeros(len(self.labels), device=self.labels.device)
        for chunk in cuts(len(self.labels), length):
            scaled = (self.once.logits(chunk) / tau).log_softmax(-1)
            logp[chunk] = scaled.gather(-1, self.labels[chunk, None])[:, 0]
        spans = int(self.span_on_cpu[-1]) + 1 if len(self.span_on_cpu) else 0
        whole = logp.new_zeros(spans + 1)  # the last one for tokens without counterpart
        whole.index_add_(0, self.own_span.where(self.own_span >= 0, spans), logp)
        rest = whole[self.span] - logp[self.place]
        return rest.where(self.compared, 0.0).clamp(max=0.0)
