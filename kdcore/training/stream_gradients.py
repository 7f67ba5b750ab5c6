"""The gradient of each stream of terms, which a momentum policy combines into one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kdcore.method.protocols import MomentumPolicy

_BUCKET = 2**24
"""Numbers that processes exchange at once: 64 MiB of float32."""


def _writable(found: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    """A gradient for each parameter that may be changed in place.

    Autograd returns one tensor for two parameters that are added, and one number for all elements
    of a parameter that is summed.
    """
    grads: dict[int, Tensor] = {}
    for parameter, grad in zip(parameters, found, strict=True):
        if grad is None:
            grad = torch.zeros_like(parameter)
        elif id(grad) in grads or 0 in grad.stride():
            grad = grad.clone(memory_format=torch.contiguous_format)
        grads[id(grad)] = grad
    return list(grads.values())


class StreamGradients:
    """Each stream's gradient, summed over the micro-batches of a step.

    Args:
        policy: Combines the streams' gradients into one.
        streams: Stream -> its terms, as the policy gave them.
    """

    def __init__(self, policy: MomentumPolicy, streams: Mapping[str, Sequence[str]]) -> None:
        self.policy, self.streams = policy, streams
        self.sums: dict[str, list[Tensor]] = {}

    def add(self, losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> None:
        """One backward for each stream; ``.grad`` is left alone, or empty if it is sharded.

        Args:
            losses: Stream -> [] loss.
            parameters: The trained parameters, the same ones in every call of a step.
        """
        # FSDP computes with other tensors than these, and reduces a gradient on its way to .grad.
        gradients_of = _by_backward if _sharded(parameters) else _by_autograd
        for place, (stream, loss) in enumerate(losses.items()):
            found = gradients_of(loss, parameters, more=place + 1 < len(losses))
            grads = _writable(found, parameters)
            if stream in self.sums:
                torch._foreach_add_(self.sums[stream], grads)
            else:
                self.sums[stream] = grads

    def combine(self, parameters: Sequence[Tensor]) -> None:
        """Gradients of the streams -> policy -> ``.grad``, where clipping and optimizer find it.

        Sums are averaged over the processes first, unless FSDP has done so. Without any, the only
        stream's gradient is what ``loss.backward()`` left in ``.grad``.

        Args:
            parameters: As for `add`.
        """
        gradients: Mapping[str, Sequence[Tensor]] = self.sums
        if self.sums and not _sharded(parameters):
            _mean_over_processes([grad for grads in self.sums.values() for grad in grads])
        elif not self.sums:
            (stream,) = self.streams
            gradients = {
                stream: [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            }
        with torch.no_grad():
            combined = self.policy.combine(gradients, parameters)
        for parameter, gradient in zip(parameters, combined, strict=True):
            parameter.grad = gradient
        self.sums = {}


def _sharded(parameters: Sequence[Tensor]) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in parameters)


def _by_autograd(
    loss: Tensor, parameters: Sequence[Tensor], *, more: bool
) -> Sequence[Tensor | None]:
    """The gradients of a loss; ``more``: whether its graph has another backward pass."""
    return torch.autograd.grad(loss, parameters, retain_graph=more, allow_unused=True)


def _by_backward(
    loss: Tensor, parameters: Sequence[Tensor], *, more: bool
) -> Sequence[Tensor | None]:
    """The gradients of a loss, taken out of ``.grad``."""
    loss.backward(retain_graph=more)  # type: ignore[no-untyped-call]
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def _mean_over_processes(tensors: Sequence[Tensor]) -> None:
    """Average in place, one all-reduce for each bucket: a copy of all of them would not fit."""
    processes = torch.distributed
    if not (processes.is_available() and processes.is_initialized()):
        return
    if processes.get_world_size() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        processes.all_reduce(flat)
        flat /= processes.get_world_size()
        pieces = torch.split(flat, [tensor.numel() for tensor in bucket])
        for tensor, piece in zip(bucket, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype in their order, `_BUCKET` numbers at once, or one that is larger."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(each.numel() for each in bucket) + tensor.numel() > _BUCKET
        if bucket and (full or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
