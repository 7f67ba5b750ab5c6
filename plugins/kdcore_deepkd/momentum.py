"""One momentum buffer for each stream of gradients (DOT; DeepKD, arXiv 2505.15133).

    v_c <- g_c + mu_c v_c                  for each stream c
    update = sum_c scale_c v_c

    sgd    scale_c = 1, or (1 - mu_c) / (1 - mu) where gains are normalised. Weight decay is one
           more stream of the base momentum, as it is in torch.optim.SGD.
    adamw  scale_c = (1 - mu_c) / (1 - mu_c^n) / (sqrt(s / (1 - beta2^n)) + eps) after n steps,
           with s <- beta2 s + (1 - beta2) (sum_c g_c)^2; then the decay of the parameters is
           added, once. No paper gives this rule: it is AdamW with its first moment cut into the
           streams, each averaged and bias-corrected by its own beta1 = mu_c.

The optimiser behind is plain SGD, theta <- theta - lr update. So with equal momenta the update is
that of torch.optim.SGD, or of torch.optim.AdamW, under any schedule of lr.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from kdcore import BuildContext, by_keywords
from kdcore.errors import UserError, nearest
from kdcore_deepkd.params import DeepKDParams, DOTParams, MomentumParams, PerTermParams

# Buffers that belong to no stream. A stream's name has no space: parts' names are identifiers.
DECAY = "weight decay"
SECOND = "second moment"

IN_CACHE = 1 << 18
"""Numbers of a tensor that a CPU's cache holds together with those of the others."""

TensorLists: TypeAlias = dict[str, list[Tensor]]
"""By stream or buffer, a tensor for each parameter, or a piece of one."""


class StreamMomentum:
    """The arithmetic of every policy here; they differ only in the momentum of each term.

    momenta: {term: mu}; ``rest`` for terms it does not name, ``decay`` for the weight decay.
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
        """Terms of equal momentum together, named after them: "task+non_target"."""
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
        update = next(iter(streams.values()))  # the first stream's memory takes the sum
        kernel = {"sgd": self._heavy_ball, "adamw": self._adamw}[self.params.kernel]
        names = [*streams, *self._of_no_stream(streams)]
        buffers = {name: self._buffer(name, update) for name in names}
        for piece in _pieces([*streams.values(), *buffers.values(), list(parameters)]):
            gradient = dict(zip(streams, piece, strict=False))
            buffer = dict(zip(buffers, piece[len(streams) :], strict=False))
            kernel(gradient, buffer, piece[-1])
        return update

    def _of_no_stream(self, streams: Iterable[str]) -> list[str]:
        if self.params.kernel == "adamw":
            return [SECOND]
        return [DECAY] if self.params.weight_decay and not self._with_decay(streams) else []

    def _with_decay(self, streams: Iterable[str]) -> str | None:
        """The stream whose momentum the weight decay has, if there is one."""
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
        """The stream's buffer after v <- g + mu v."""
        torch._foreach_mul_(buffer, self._mu[name])
        torch._foreach_add_(buffer, gradient)
        return buffer

    def _buffer(self, name: str, like: list[Tensor]) -> list[Tensor]:
        """A buffer by name, zero at the first step; one that was loaded moves to its device."""
        if name not in self._buffers and self._steps > 1:
            raise UserError(
                f"the momentum buffers loaded hold none of '{name}', but "
                + ", ".join(f"'{known}'" for known in self._buffers),
                "resume with the terms, momenta and weight decay the run began with",
            )
        kept = self._buffers.get(name) or [torch.zeros_like(tensor) for tensor in like]
        self._buffers[name] = [v.to(tensor) for v, tensor in zip(kept, like, strict=True)]
        return self._buffers[name]

    def norms(self) -> dict[str, float]:
        """The L2 norm of each buffer."""
        total = torch.nn.utils.get_total_norm
        return {name: float(total(buffer)) for name, buffer in self._buffers.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The count of steps, float64, and copies of each buffer's tensors as "name.index"."""
        state = {
            f"{name}.{index}": tensor.clone()
            for name, buffer in self._buffers.items()
            for index, tensor in enumerate(buffer)
        }
        return {"steps": torch.tensor(float(self._steps), dtype=torch.float64), **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies, so that whoever else holds the tensors keeps theirs."""
        self._steps = int(state["steps"])
        self._buffers = {}
        keys = [key.rpartition(".") for key in state if key != "steps"]
        for name, _, index in sorted(keys, key=lambda key: (key[0], int(key[2]))):
            self._buffers.setdefault(name, []).append(state[f"{name}.{index}"].clone())


class PerTerm(StreamMomentum):
    """A momentum for each term, as the spec says."""

    @by_keywords(PerTermParams)
    def __init__(self, params: PerTermParams, context: BuildContext) -> None:
        super().__init__(params, params.overrides, rest=params.mu, decay=params.mu)

    def streams(self, terms: Sequence[str]) -> dict[str, tuple[str, ...]]:
        for term in self._momenta:
            if term not in (*terms, "task"):
                raise UserError(
                    f"overrides a momentum of '{term}', which is no term of this loss",
                    nearest(term, terms),
                )
        return super().streams(terms)


class DOT(StreamMomentum):
    """The task at mu - d, every part of the distillation at mu + d."""

    @by_keywords(DOTParams)
    def __init__(self, params: DOTParams, context: BuildContext) -> None:
        momenta = {"task": params.mu - params.d}
        super().__init__(params, momenta, rest=params.mu + params.d, decay=params.mu)


class DeepKDMomentum(StreamMomentum):
    """The task and non_target at mu + d, target at mu - d; other parts at mu.

    The paper's claim is about these three; nothing says on which side another part belongs.

    In the released code the task's buffer is multiplied by the target's momentum, and only the
    target's buffer takes the weight decay. ``variant: released`` does the same. It does not copy
    two things that lie elsewhere: there the decay is taken of parameters that the other two
    buffers have moved within the step (a difference of the order of lr squared), and non_target
    is weighed by the batch's mean of 1 - r_y instead of each position's own.
    """

    @by_keywords(DeepKDParams)
    def __init__(self, params: DeepKDParams, context: BuildContext) -> None:
        low, high = params.mu - params.d, params.mu + params.d
        if params.variant == "released":
            momenta, decay = {"task": low, "target": low, "non_target": high}, low
        else:
            momenta, decay = {"task": high, "target": low, "non_target": high}, params.mu
        super().__init__(params, momenta, rest=params.mu, decay=decay)


def _pieces(lists: Sequence[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Lists of tensors that correspond, whole; on a CPU `IN_CACHE` numbers of each at a time.

    What one operation has written is then still in the cache when the next one reads it.
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
    """0.9 + 0.075 and 0.975 as one momentum."""
    return round(mu, 12)


def _clip(streams: Mapping[str, list[Tensor]], largest: float) -> None:
    """All streams by one factor, so that their sum is clipped as torch's clip_grad_norm_ does."""
    norm = float(torch.nn.utils.get_total_norm(_sum(streams.values())))
    if norm + 1e-6 > largest:
        for gradient in streams.values():
            torch._foreach_mul_(gradient, largest / (norm + 1e-6))


def _sum(streams: Iterable[list[Tensor]]) -> list[Tensor]:
    """Their sum, which shares memory with a single one."""
    total, *others = streams
    for other in others:
        total = list(torch._foreach_add(total, other))
    return total


def _sum_in_place(streams: Iterable[list[Tensor]]) -> list[Tensor]:
    """Their sum, in the memory of the first."""
    first, *others = streams
    for other in others:
        torch._foreach_add_(first, other)
    return first
