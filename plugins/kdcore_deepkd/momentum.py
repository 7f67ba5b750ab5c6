"""One momentum buffer for each stream of gradients (DOT; DeepKD, arXiv 2505.15133).

    v_c <- g_c + mu_c v_c                  for each stream c
    update = sum_c scale_c v_c

    sgd    scale_c = 1, or (1 - mu_c) / (1 - mu) with normalised gains. Weight decay is one more
           stream with the base momentum, as in torch.optim.SGD.
    adamw  scale_c = (1 - mu_c) / (1 - mu_c^n) / (sqrt(s / (1 - beta2^n)) + eps) after n steps,
           with s <- beta2 s + (1 - beta2) (sum_c g_c)^2; then the weight decay is added once. No
           paper gives this rule: it is AdamW with one first moment for each stream, averaged and
           bias-corrected by its own beta1 = mu_c.

The optimizer is plain SGD, theta <- theta - lr update. So with equal momenta the update equals that
of torch.optim.SGD or torch.optim.AdamW, for any schedule of lr.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kdcore import BuildContext, by_keywords
from kdcore.errors import UserError, nearest
from kdcore_deepkd.params import DeepKDParams, DOTParams, MomentumParams, PerTermParams

# Buffers without a stream. The names of streams have no space, since parts' names are identifiers.
DECAY = "weight decay"
SECOND = "second moment"

IN_CACHE = 1 << 18
"""Number of elements of each tensor that fit into a CPU's cache together."""

TensorLists: TypeAlias = dict[str, list[Tensor]]
"""Tensors by stream or buffer: one for each parameter, or for a piece of one."""


class StreamMomentum:
    """Arithmetic that all policies share; they differ only in the momentum of each term.

    Args:
        params: Parameters of the policy.
        momenta: Momentum by term.
        rest: Momentum of the other terms.
        decay: Momentum of the weight decay.
    """

    owns_momentum = True

    def __init__(
        self, params: MomentumParams, momenta: Mapping[str, float], rest: float, decay: float
    ) -> None:
        self.params = params
        self._momenta = momenta
        self._rest = rest
        self._mu = {DECAY: _rounded(decay)}
        self._buffers: dict[str, list[Tensor]] = {}
        self._steps = 0

    def streams(self, terms: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Group the terms of equal momentum into streams named like "task+non_target".

        Args:
            terms: Names of the terms of the loss.

        Returns:
            The terms of each stream, by its name.
        """
        together: dict[float, list[str]] = {}
        for term in terms:
            mu = _rounded(self._momenta.get(term, self._rest))
            together.setdefault(mu, []).append(term)
        self._mu.update({"+".join(names): mu for mu, names in together.items()})
        return {"+".join(names): tuple(names) for names in together.values()}

    @torch.no_grad()
    def combine(
        self, gradients: Mapping[str, Sequence[Tensor]], parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        streams = {name: list(gradient) for name, gradient in gradients.items()}
        self._steps += 1
        if self.params.clip is not None:
            _clip(streams, self.params.clip)
        update = next(iter(streams.values()))  # the sum reuses the first stream's memory
        streams = {name: _shards(gradient) for name, gradient in streams.items()}
        kernel = {"sgd": self._heavy_ball, "adamw": self._adamw}[self.params.kernel]
        names = [*streams, *self._of_no_stream(streams)]
        buffers = {name: self._buffer(name, _shards(update)) for name in names}
        for piece in _pieces([*streams.values(), *buffers.values(), _shards(parameters)]):
            gradient = dict(zip(streams, piece, strict=False))
            buffer = dict(zip(buffers, piece[len(streams) :], strict=False))
            kernel(gradient, buffer, piece[-1])
        return update

    def _of_no_stream(self, streams: Iterable[str]) -> list[str]:
        if self.params.kernel == "adamw":
            return [SECOND]
        return [DECAY] if self.params.weight_decay and not self._with_decay(streams) else []

    def _with_decay(self, streams: Iterable[str]) -> str | None:
        """Return the stream with the momentum of the weight decay, or None."""
        return next((name for name in streams if self._mu[name] == self._mu[DECAY]), None)

    def _heavy_ball(
        self, gradient: TensorLists, buffer: TensorLists, parameters: list[Tensor]
    ) -> None:
        decay, same = self.params.weight_decay, self._with_decay(gradient)
        if decay and same:
            torch._foreach_add_(gradient[same], parameters, alpha=decay)
        elif decay:
            gradient[DECAY] = list(torch._foreach_mul(parameters, decay))
        for name, g in gradient.items():
            torch._foreach_copy_(g, self._advance(name, buffer[name], g))
            if self.params.normalise_gain:
                torch._foreach_mul_(g, (1 - self._mu[name]) / (1 - self.params.mu))
        _sum_in_place(gradient.values())

    def _adamw(self, gradient: TensorLists, buffer: TensorLists, parameters: list[Tensor]) -> None:
        beta2, total = self.params.beta2, _sum(gradient.values())
        torch._foreach_mul_(buffer[SECOND], beta2)
        torch._foreach_addcmul_(buffer[SECOND], total, total, value=1 - beta2)
        for name, g in gradient.items():
            mu = self._mu[name]
            torch._foreach_copy_(g, self._advance(name, buffer[name], g))
            torch._foreach_mul_(g, (1 - mu) / (1 - mu**self._steps))
        update = _sum_in_place(gradient.values())
        root = torch._foreach_div(buffer[SECOND], 1 - beta2**self._steps)
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, self.params.eps)
        torch._foreach_div_(update, root)
        if self.params.weight_decay:
            torch._foreach_add_(update, parameters, alpha=self.params.weight_decay)

    def _advance(self, name: str, buffer: list[Tensor], gradient: list[Tensor]) -> list[Tensor]:
        """Update a stream's buffer in place, v <- g + mu v, and return it."""
        torch._foreach_mul_(buffer, self._mu[name])
        torch._foreach_add_(buffer, gradient)
        return buffer

    def _buffer(self, name: str, like: list[Tensor]) -> list[Tensor]:
        """Return a buffer by name, zero at the first step, on the device of its parameters."""
        if name not in self._buffers and self._steps > 1:
            raise UserError(
                f"the checkpoint has no momentum buffer '{name}', only "
                + ", ".join(f"'{known}'" for known in self._buffers),
                "resume with the terms, momenta and weight decay of the original run",
            )
        kept = self._buffers.get(name) or [torch.zeros_like(tensor) for tensor in like]
        self._buffers[name] = [v.to(tensor) for v, tensor in zip(kept, like, strict=True)]
        return self._buffers[name]

    def norms(self) -> dict[str, float]:
        """Compute the L2 norm of each buffer.

        Returns:
            The norms by the name of the buffer.
        """
        total = torch.nn.utils.get_total_norm
        return {name: float(total(buffer)) for name, buffer in self._buffers.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Copy the state for a checkpoint.

        Returns:
            The number of steps (float64), and the tensors of each buffer as "name.index".
        """
        state = {
            f"{name}.{index}": tensor.clone()
            for name, buffer in self._buffers.items()
            for index, tensor in enumerate(buffer)
        }
        return {"steps": torch.tensor(float(self._steps), dtype=torch.float64), **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state; the tensors are copied, so that the caller may keep them.

        Args:
            state: State from `state_dict`.
        """
        self._steps = int(state["steps"])
        self._buffers = {}
        keys = [key.rpartition(".") for key in state if key != "steps"]
        for name, _, index in sorted(keys, key=lambda key: (key[0], int(key[2]))):
            self._buffers.setdefault(name, []).append(state[f"{name}.{index}"].clone())


class PerTerm(StreamMomentum):
    """Momentum policy with the momentum of each term from the spec."""

    @by_keywords(PerTermParams)
    def __init__(self, params: PerTermParams, context: BuildContext) -> None:
        super().__init__(params, params.overrides, rest=params.mu, decay=params.mu)

    def streams(self, terms: Sequence[str]) -> dict[str, tuple[str, ...]]:
        for term in self._momenta:
            if term not in (*terms, "task"):
                raise UserError(
                    f"overrides sets a momentum for unknown term '{term}'",
                    nearest(term, terms),
                )
        return super().streams(terms)


class DOT(StreamMomentum):
    """Momentum policy of DOT: mu - d for the task, mu + d for every part of the distillation.

    The paper's equations have no weight decay. The released code adds it to the task's gradient,
    so that it accumulates at mu - d; ``variant: released`` does the same.
    """

    @by_keywords(DOTParams)
    def __init__(self, params: DOTParams, context: BuildContext) -> None:
        momenta = params.momenta()
        decay = momenta["task"] if params.variant == "released" else params.mu
        super().__init__(params, {"task": momenta["task"]}, rest=momenta["kd"], decay=decay)


class DeepKDMomentum(StreamMomentum):
    """Momentum policy of DeepKD: mu + d for task and non_target, mu - d for target, mu for others.

    The paper makes its claim about these three terms only.

    The released code multiplies the task's buffer by the target's momentum, and applies the weight
    decay to the target's buffer only. ``variant: released`` does the same, with one difference: the
    released code takes the decay of parameters that the other two buffers have already moved in the
    step, a difference of order lr weight_decay. The splitters have the rest of the released code.
    """

    @by_keywords(DeepKDParams)
    def __init__(self, params: DeepKDParams, context: BuildContext) -> None:
        momenta = params.momenta()
        decay = momenta["target"] if params.variant == "released" else params.mu
        super().__init__(params, momenta, rest=params.mu, decay=decay)


def _shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's shards, in the memory of the tensors, of those that FSDP shards."""
    return [each.to_local() if isinstance(each, DTensor) else each for each in tensors]


def _pieces(lists: Sequence[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Yield corresponding tensors: whole, or on a CPU in pieces of `IN_CACHE` elements.

    The result of one operation is then still in the cache when the next one reads it.
    """
    of_cpu = all(t.device.type == "cpu" and t.is_contiguous() for each in lists for t in each)
    if not of_cpu:
        yield list(lists)
        return
    for tensors in zip(*lists, strict=True):
        cut = (tensor.view(-1).split(IN_CACHE) for tensor in tensors)
        for pieces in zip(*cut, strict=True):
            yield [[piece] for piece in pieces]


def _rounded(mu: float) -> float:
    """Round a momentum, so that 0.9 + 0.075 equals 0.975."""
    return round(mu, 12)


def _clip(streams: Mapping[str, list[Tensor]], largest: float) -> None:
    """Scale all streams by one factor, which clips their sum like torch's clip_grad_norm_."""
    total = torch.nn.utils.get_total_norm(_sum(streams.values()))
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if norm + 1e-6 > largest:
        for gradient in streams.values():
            torch._foreach_mul_(gradient, largest / (norm + 1e-6))


def _sum(streams: Iterable[list[Tensor]]) -> list[Tensor]:
    """Sum the streams; the sum of a single stream shares its memory."""
    total, *others = streams
    for other in others:
        total = list(torch._foreach_add(total, other))
    return total


def _sum_in_place(streams: Iterable[list[Tensor]]) -> list[Tensor]:
    """Sum the streams into the memory of the first one."""
    first, *others = streams
    for other in others:
        torch._foreach_add_(first, other)
    return first
