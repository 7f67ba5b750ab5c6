"""How logits at masked positions are had: from a model, or from a drafter and its target.

The only fork in the path of the data.

A language model's body gives hidden states, and its head is applied later, chunk by chunk. A model
whose head cannot be taken off (a classifier, an unknown architecture) gives its logits at once and
has the identity for a head. Downstream of `HiddenLogits` nothing can tell which it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcore.data.hidden_states import HiddenStates
from kdcore.decoding.features import FeatureTap, layer_count
from kdcore.errors import UserError
from kdcore.protocols import TrainedDrafter
from kdcore.records import Batch


@dataclass(frozen=True, slots=True)
class Head:
    """From a hidden state to logits: linear, a scale, a soft cap; or nothing at all.

    weight: [V, H] or None for the identity; bias: [V] or None.
    Logits = cap * tanh(scale * (W h + b) / cap), without the tanh when cap is None.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """The trained tensors of the head."""
        own = (self.weight, self.bias)
        return [tensor for tensor in own if tensor is not None and tensor.requires_grad]

    @property
    def shape(self) -> tuple[int, int]:
        """(V, H). Raises ValueError for the identity, which has neither."""
        if self.weight is None:
            raise ValueError("the identity has no shape")
        classes, width = self.weight.shape
        return classes, width

    def rows(self, classes: Tensor) -> Head:
        """The head of some classes [V'] only."""
        if self.weight is None:
            raise ValueError("the identity has no rows to choose from")
        bias = None if self.bias is None else self.bias[classes]
        return replace(self, weight=self.weight[classes], bias=bias)

    def linear(self, hidden: Tensor) -> Tensor:
        """[N, V] before scale and cap, in the dtype of the weight; the hidden when identity."""
        if self.weight is None:
            return hidden
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def finish(self, linear: Tensor) -> Tensor:
        """[N, V] float32 logits from what `linear` gave."""
        logits = linear.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class _KnownLinear(torch.autograd.Function):
    """``F.linear`` whose result is known already: only its backward is computed.

    The gates need the logits of every position, the loss those of the accepted ones only, and
    the product with the head is what costs.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.has_bias = bias is not None
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight = ctx.saved_tensors
        need_hidden, need_weight, need_bias, _ = ctx.needs_input_grad
        return (
            (grad @ weight).to(hidden.dtype) if need_hidden else None,
            grad.mT @ hidden.to(grad.dtype) if need_weight else None,
            grad.sum(0) if ctx.has_bias and need_bias else None,
            None,
        )


class TeacherLogits(Protocol):
    """What the loss engine needs of a teacher, live (`HiddenLogits`) or cached."""

    def linear(self, chunk: slice) -> Tensor:
        """What `logits` of a chunk of the masked positions are made from."""

    def logits(self, linear: Tensor) -> Tensor:
        """[C, V] float32 logits."""


@dataclass(frozen=True, slots=True)
class HiddenLogits:
    """Logits of N masked positions, made when asked for.

    hidden: [N, H], part of the body's graph. classes: V, the shared part of the vocabulary;
    rows of the head beyond it are padding.
    """

    hidden: Tensor
    head: Head
    classes: int

    @property
    def features(self) -> Tensor | None:
        """The hidden states [N, H] that a linear head reads; None where it cannot be taken off."""
        return None if self.head.weight is None else self.hidden

    def linear(self, chunk: slice) -> Tensor:
        """[C, V'] the head's linear output, without gradient."""
        with torch.no_grad():
            return self.head.linear(self.hidden[chunk])

    def logits(self, linear: Tensor) -> Tensor:
        """[C, V] float32 logits from a `linear` output."""
        return self.head.finish(linear)[:, : self.classes]

    def differentiable(self, hidden: Tensor, linear: Tensor) -> Tensor:
        """[C, V] the same logits, with a graph to ``hidden`` [C, H] and the head's parameters."""
        if self.head.weight is None:
            return self.logits(hidden)
        known: Tensor = _KnownLinear.apply(  # type: ignore[no-untyped-call]
            hidden, self.head.weight, self.head.bias, linear
        )
        return self.logits(known)


def no_teacher(batch: Batch) -> HiddenLogits:
    """The neutral teacher: logits of no classes, [N, 0], at a batch's N masked positions."""
    nothing = torch.empty(int(batch.mask.sum()), 0, device=batch.mask.device)
    return HiddenLogits(nothing, Head(), 0)


class ModelView:
    """Runs a transformers model and gives the logits at a batch's masked positions.

    classes: V, how many of the model's classes take part.
    """

    def __init__(self, model: nn.Module, classes: int) -> None:
        self.classes = classes
        self._decoder = self._removable_head = None
        decoder, head = _decoder_of(model), head_of(model)
        if decoder is not None and head is not None and _agrees(model, decoder, head):
            self._decoder, self._removable_head = decoder, head

    @property
    def takes_the_head_off(self) -> bool:
        """Whether logits are made chunk by chunk; else the model gives them whole."""
        return self._decoder is not None

    def __call__(self, model: Callable[..., Any], batch: Batch) -> HiddenLogits:
        """Run ``model``, which may be wrapped (DDP), on a batch; N = batch.mask.sum()."""
        if self._decoder is None or self._removable_head is None:
            logits = model(**batch.inputs).logits
            by_position = logits if logits.ndim == 3 else logits[:, None]  # a classifier has T = 1
            return HiddenLogits(by_position[batch.mask], Head(), self.classes)
        with _captured(self._decoder) as hidden:
            model(**batch.inputs, use_cache=False, logits_to_keep=1)
        return HiddenLogits(hidden[0][batch.mask], self._removable_head(), self.classes)


class DrafterView:
    """Runs a target once, and a drafter on what it read of it: logits at masked anchors.

    Both sides are the tokens that the drafter can propose. A batch's inputs are the sequences
    [B, T], its labels and mask the anchors' (`kdcore.data.anchors`), B * T rows of D positions.
    stored: the hidden states of the rows that will come, if they are read and not computed.

    Raises UserError for a target without a linear head, or, of one that has weights, whose logits
    are not what that head gives: they would be another teacher than the target is.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafter: TrainedDrafter,
        stored: HiddenStates | None = None,
    ) -> None:
        head = head_of(target)
        if head is None:
            raise UserError(
                f"{type(target).__name__} has no linear head, which a drafter's would be read by",
                "choose a causal language model whose head is one matrix",
            )
        self.drafter, self.target, self.head, self.stored = drafter, target, head, stored
        self.tap = FeatureTap(target, (*drafter.layers, layer_count(target)))
        if target.device.type != "meta" and not _agrees(target, self.tap.decoder, head):
            raise UserError(
                f"{type(target).__name__} makes its logits otherwise than by its head, and the "
                "scale and cap that its config tells",
                "choose another target: a drafter's teacher would not be what this one says",
            )

    def __call__(
        self, drafter: Callable[..., Any], batch: Batch
    ) -> tuple[HiddenLogits, HiddenLogits]:
        """The drafter's logits, and the target's; ``drafter`` may be wrapped (DDP)."""
        tokens = batch.inputs["input_ids"]
        features, final = self.read(batch)
        drafted = drafter(tokens, features)
        hidden = drafted.flatten(0, 1)[batch.mask]

        rows, levels = batch.mask.nonzero(as_tuple=True)
        # Level i of anchor r predicts the token at r + 1 + i, as the target does at r + i.
        predicting = final.flatten(0, 1)[rows + levels + 1]
        vocabulary = self.drafter.vocabulary
        head = self.head() if vocabulary is None else self.head().rows(vocabulary)
        classes, _ = self.drafter.head.shape
        return (
            HiddenLogits(hidden, self.drafter.head, classes),
            HiddenLogits(predicting, head, classes),
        )

    @torch.no_grad()
    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The features [B, T, F] that the drafter reads, and the final hidden states [B, T, H]."""
        tokens = batch.inputs["input_ids"]
        if self.stored is not None:
            states = self.stored.read(batch.index.tolist(), tokens.shape[1]).to(tokens.device)
        else:
            with self.tap.listening() as heard:
                self.target(**batch.inputs, use_cache=False, logits_to_keep=1)
            states = self.tap.join(heard, tokens)
        features = len(self.drafter.layers) * states.shape[-1] // len(self.tap.layers)
        return states[..., :features], states[..., features:]


def _decoder_of(model: Any) -> nn.Module | None:
    """The body of a causal language model, whose output is what the head reads."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = plain.get_decoder() if hasattr(plain, "get_decoder") else None
    return decoder if decoder is not plain else None


def head_of(model: Any) -> Callable[[], Head] | None:
    """What gives a model's linear head; None when it has none, or another kind.

    It is read anew at each call, since its weight may be tied, sharded or replaced.
    """
    module = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(module, nn.Linear):
        return None
    config = model.config.get_text_config()  # of a model of several kinds of input, it has these
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale = (getattr(config, "logit_scale", None) or 1.0) / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return lambda: Head(module.weight, module.bias, scale, cap)


@torch.no_grad()
def _agrees(model: nn.Module, decoder: nn.Module, head: Callable[[], Head]) -> bool:
    """Whether body and head apart give what the model gives, on a few tokens."""
    tokens = torch.arange(1, 5, device=next(model.parameters()).device)[None]
    training = model.training
    model.eval()
    try:
        with _captured(decoder) as hidden:
            whole = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1].float()
    except (TypeError, ValueError):  # an architecture that knows no logits_to_keep
        return False
    finally:
        model.train(training)
    weight = head().weight
    # what get_decoder names may be another part than the body (ModernBertDecoder: of its head)
    if weight is None or not hidden or hidden[0].ndim != 3:
        return False
    if hidden[0].shape[-1] != weight.shape[1]:
        return False
    apart = head().finish(head().linear(hidden[0][:, -1]))
    return apart.shape == whole.shape and torch.allclose(apart, whole, rtol=1e-2, atol=1e-2)


@contextmanager
def _captured(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the last hidden states [B, T, H] that the decoder puts out."""
    seen: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda module, given, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        handle.remove()
