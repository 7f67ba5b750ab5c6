"""An optimizer for any training loop, which applies a momentum policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdcore.errors import UserError, nearest
from kdcore.method.protocols import MomentumPolicy
from kdcore.models.device import moved
from kdcore.training.stream_gradients import StreamGradients

_POLICY = "policy"
"""The key of the policy's buffers in an optimizer's state."""


class MomentumOptimizer(torch.optim.Optimizer):
    """Steps an optimizer along what a momentum policy makes of the gradient of each loss term.

    A step is ``zero_grad()``, ``backward(losses)`` for each micro-batch in place of
    ``loss.backward()``, and ``step()``. Schedulers, param groups and ``state_dict`` work as of any
    optimizer. A step leaves no gradient behind, so a forgotten ``zero_grad`` does no harm.

    Clipping: a policy that owns the momentum gives the whole update, which must not be clipped;
    it has a parameter for that, such as ``DeepKDMomentum(clip=1.0)``. With another policy clip
    between `combine` and `step`.

    Several processes: `backward` computes each stream's gradient by itself, around the hooks of
    DistributedDataParallel, and the mean over the processes is taken in `step`. So run the
    unwrapped model, unless the policy has a single stream. Loss scaling (``GradScaler``) does not
    work; train in bfloat16 or float32. What ``accelerator.prepare`` returns has ``step`` and
    ``zero_grad``; call ``backward`` on this object.

    Args:
        optimizer: Takes the step; plain ``torch.optim.SGD`` if the policy owns the momentum. It
            shares its param groups with this object.
        policy: Combines the gradients, e.g. ``kdcore_deepkd.DeepKDMomentum(mu=0.9)``.
        streams: Stream -> its terms, where the losses come by stream: what
            ``policy.streams(terms)`` gave, as ``engine.streams`` of a `kdcore.DistillationLoss`.
            By default the losses come by term, and the first `backward` asks the policy.

    Raises:
        UserError: Policy and optimizer would both apply momentum or weight decay.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        policy: MomentumPolicy,
        *,
        streams: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        _refuse_second_momentum(optimizer, policy)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer, self.policy = optimizer, policy
        self._gradients = StreamGradients(policy, streams) if streams else None
        self._trained: list[Tensor] = []
        self._left: list[tuple[Tensor, int]] = []
        self._calls, self._combined = 0, False
        self._share()

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Add the gradient of each loss; once for each micro-batch of a step.

        Args:
            losses: Term or stream -> [] loss, the same names in every call.

        Raises:
            UserError: A loss is missing, unknown or without a graph; the gradients were changed
                by somebody else; or parameters were added, frozen or unfrozen since the first call.
        """
        if self._combined:
            raise UserError("backward was called between combine and step", "call step() first")
        self._trained = self._same_parameters()
        gradients = self._gradients = self._gradients or self._asked(losses)
        by_stream = _by_stream(losses, gradients.streams)
        if len(by_stream) == 1:  # as ever, so that the hooks of wrapped models run
            for loss in by_stream.values():
                loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._refuse_changed()
            gradients.add(by_stream, self._trained)
            # It shows one stream's, so that whoever clips it or adds to it is noticed.
            for parameter, gradient in zip(
                self._trained, next(iter(gradients.sums.values())), strict=True
            ):
                parameter.grad = gradient
            self._mark()
        self._calls += 1

    def combine(self) -> None:
        """Put the gradient of the update into ``.grad``. `step` does it if it is not done yet.

        Raises:
            UserError: There are no gradients, or somebody else changed them.
        """
        if self._combined:
            return
        if self._gradients is None or not self._calls:
            raise UserError(
                "there are no gradients: backward was not called since the last step or zero_grad",
                "call optimizer.backward(losses) before step(), and zero_grad() before both",
            )
        _refuse_second_momentum(self.optimizer, self.policy)
        if self._gradients.sums:
            self._refuse_changed()
        self._gradients.combine(self._trained)
        self._combined = True
        self._mark()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combine the gradients, step the optimizer, and drop the gradients.

        Args:
            closure: Computes the losses, calls `backward` and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            UserError: As `combine`, and if the update of a policy that owns the momentum was
                changed after it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.combine()
        if self.policy.owns_momentum and self._changed():
            raise UserError(
                "the update was changed between combine and step, and clipping it is wrong: it "
                "holds the momentum",
                "clip by the policy's parameter, e.g. DeepKDMomentum(clip=1.0)",
            )
        self.optimizer.step()
        self._drop()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of an unfinished step.

        Args:
            set_to_none: See `torch.optim.Optimizer.zero_grad`; several streams' are always dropped.

        Raises:
            UserError: The policy has taken the gradients already, and the update would be lost.
        """
        if self._combined:
            raise UserError("zero_grad was called between combine and step", "call step() first")
        several = self._gradients is not None and len(self._gradients.streams) > 1
        super().zero_grad(set_to_none or several)
        self._drop(keep_grad=True)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and param groups, and under ``policy`` the policy's buffers."""
        return {**self.optimizer.state_dict(), _POLICY: dict(self.policy.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Args:
            state_dict: Its value, of the same parameters, optimizer and policy.

        Raises:
            UserError: It is the state of another optimizer.
        """
        if _POLICY not in state_dict:
            raise UserError(
                "the state has no momentum buffers: it is of another optimizer",
                "load it into the optimizer that it was taken from",
            )
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != _POLICY})
        self._share()
        device = self.param_groups[0]["params"][0].device
        if state_dict[_POLICY]:
            self.policy.load_state_dict(
                {k: moved(v, device) for k, v in state_dict[_POLICY].items()}
            )

    def _share(self) -> None:
        """One list of param groups and one state, which a scheduler changes and a step reads."""
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def _asked(self, losses: Mapping[str, Tensor]) -> StreamGradients:
        """Raises UserError for the name of a stream of several terms, which no policy knows."""
        for name in losses:
            if not name.isidentifier():
                raise UserError(
                    f"'{name}' is not the name of a term",
                    "give one loss for each term, or pass streams=policy.streams(terms)",
                )
        return StreamGradients(self.policy, self.policy.streams(tuple(losses)))

    def _same_parameters(self) -> list[Tensor]:
        trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        known = self._trained or trained
        if len(known) != len(trained) or any(
            a is not b for a, b in zip(known, trained, strict=True)
        ):
            raise UserError(
                "parameters were added, frozen or unfrozen after the first backward",
                "make a new MomentumOptimizer: each buffer belongs to one parameter",
            )
        return trained

    def _mark(self) -> None:
        grads = [p.grad for p in self._trained if p.grad is not None]
        self._left = [(grad, grad._version) for grad in grads]

    def _changed(self) -> bool:
        """Whether ``.grad`` is not as it was left."""
        grads = [p.grad for p in self._trained if p.grad is not None]
        return len(grads) != len(self._left) or any(
            grad is not left or grad._version != version
            for grad, (left, version) in zip(grads, self._left, strict=True)
        )

    def _refuse_changed(self) -> None:
        if self._changed():
            raise UserError(
                "a parameter's .grad was changed by something else than optimizer.backward, such "
                "as loss.backward() or clip_grad_norm_",
                "call only optimizer.backward(losses); clip by the policy, or between combine() "
                "and step(); zero_grad() drops old gradients",
            )

    def _drop(self, *, keep_grad: bool = False) -> None:
        if not keep_grad:
            super().zero_grad()
        if self._gradients is not None:
            self._gradients.sums = {}
        self._left, self._calls, self._combined = [], 0, False


def _by_stream(
    losses: Mapping[str, Tensor], streams: Mapping[str, Sequence[str]]
) -> dict[str, Tensor]:
    """Raises UserError for a loss that is missing, unknown or not a scalar with a graph."""
    terms = [term for members in streams.values() for term in members]
    known = [*streams] if losses.keys() & streams.keys() - set(terms) else terms
    for name in sorted(losses.keys() - set(known)):
        raise UserError(f"unknown loss '{name}'", nearest(name, known))
    for name in known:
        if name not in losses:
            raise UserError(f"the loss '{name}' is missing", f"give all of: {', '.join(known)}")
        if losses[name].numel() != 1 or not losses[name].requires_grad:
            raise UserError(
                f"the loss '{name}' is not a scalar with a graph",
                "give a tensor of one number, computed from the model's output with gradients on",
            )
    if known is not terms:
        return {stream: losses[stream] for stream in streams}
    return {
        stream: torch.stack([losses[term].reshape(()) for term in members]).sum()
        for stream, members in streams.items()
    }


def _refuse_second_momentum(optimizer: torch.optim.Optimizer, policy: MomentumPolicy) -> None:
    """Raises UserError when the optimizer would do again what the policy does already."""
    if not policy.owns_momentum:
        return
    cure = (
        "wrap torch.optim.SGD(parameters, lr=...); momentum and weight_decay are the policy's, and "
        "a scheduler needs cycle_momentum=False"
    )
    if not isinstance(optimizer, torch.optim.SGD):
        raise UserError(
            f"the policy gives the whole update, and {type(optimizer).__name__} would change it",
            cure,
        )
    for name in ("momentum", "weight_decay"):
        if any(group[name] for group in optimizer.param_groups):
            raise UserError(f"policy and optimizer would both apply {name.replace('_', ' ')}", cure)
