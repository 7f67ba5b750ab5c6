"""The loss of one stream of terms, whose gradients are computed chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from kdcore.method.known_gradients import known
from kdcore.method.logits import HiddenLogits
from kdcore.method.positions import LearnedChunk


class StreamLoss:
    """The sum of one stream's losses, and its gradients at the hidden states and the head.

    Args:
        student: Logits of the student at the N masked positions.
    """

    def __init__(self, student: HiddenLogits) -> None:
        self._student = student
        self._value = torch.zeros((), device=student.hidden.device)
        self._of_hidden = torch.zeros_like(student.hidden)
        self._of_head = [torch.zeros_like(parameter) for parameter in student.head.parameters]

    def add(self, loss: Tensor, learned: LearnedChunk, *, retain_graph: bool) -> None:
        """Add the loss of one chunk.

        Args:
            loss: Scalar with a graph down to the leaves of the chunk.
            learned: The chunk.
            retain_graph: Whether another stream reads the same graph.
        """
        self._value += loss.detach()
        hidden, linear = learned.hidden, learned.linear
        # unused: a stream of features alone does not reach the head, others no features
        to_hidden, *to_linear = torch.autograd.grad(
            loss,
            [hidden] if linear is None else [hidden, linear],
            retain_graph=retain_graph,
            allow_unused=True,
        )
        with torch.no_grad():
            for found in to_linear:
                if found is not None:
                    through = self._through_head(found, hidden.detach())
                    to_hidden = through if to_hidden is None else to_hidden + through
            if to_hidden is not None:
                self._of_hidden[learned.place][learned.kept] = to_hidden

    def _through_head(self, to_linear: Tensor, hidden: Tensor) -> Tensor:
        """Add to the head's gradients, in place since they are large.

        Args:
            to_linear: [C, V] gradient of the loss at the head's linear output.
            hidden: [C, H] hidden states.

        Returns:
            [C, H] the gradient at the hidden states.
        """
        weight = self._student.head.weight
        assert weight is not None, "an identity has no linear output of its own"
        for total in self._of_head:
            if total.dim() == 1:
                total += to_linear.sum(0)
            elif total.dtype == to_linear.dtype:
                total.addmm_(to_linear.mT, hidden.to(total.dtype))
            else:
                total += to_linear.mT @ hidden.to(to_linear.dtype)
        return (to_linear @ weight.to(to_linear.dtype)).to(hidden.dtype)

    def attached(self) -> Tensor:
        """The sum, as a scalar whose backward passes the gradients on to body and head."""
        graph = [self._student.hidden, *self._student.head.parameters]
        grads = [self._of_hidden, *self._of_head]
        return known(self._value, grads, graph)
