"""The extension point of engines: what runs a target in decoding, and may run a drafter's passes.

See `kdcore.method.protocols`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Engine(Protocol):
    """Runs a target over the nodes of draft trees, with a cache of its own.

    Each pass appends its A tokens to the cache as A new slots, at the same places for all rows. The
    caller tracks what is in them, hides rejected nodes and padding by masks, and asks the engine to
    compact when many slots are hidden. S is the number of slots.
    """

    @property
    def slots(self) -> int:
        """The number of slots in the cache of each row; 0 before ``start``."""

    def bind(self, target: Any, layers: tuple[int, ...]) -> None:
        """Prepare passes of a target.

        Args:
            target: The transformers model in eval mode, on its device.
            layers: Indices of the target's hidden_states to return, () for none.

        Raises:
            UserError: The engine cannot run this target, or the target lacks one of the layers.
        """

    def start(self, rows: int, slots: int | None = None) -> None:
        """Empty the cache.

        Args:
            rows: Number of rows B.
            slots: Expected number of slots, for an engine that allocates them at once; passes may
                append more.
        """

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: Mapping[str, Tensor] | None,
        logits_of: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Run one pass and append its tokens to the cache.

        Args:
            tokens: [B, A] int64.
            positions: [B, A] int64 positions of the tokens in their rows.
            masks: The mask [B, A, S + A] bool of each type of the target's layers, as
                `kdcore.decoding.layers.attention.TreeAttention` names and builds them: True where a
                token reads a slot. None for a causal pass while the cache is empty.
            logits_of: [L] int64, the places among the A tokens whose logits are returned; None for
                all of them.

        Returns:
            Logits [B, L, V], and the concatenated hidden states [B, A, F] of all tokens.
        """

    def compact(self, slots: Tensor) -> None:
        """Drop all other slots of each row.

        Args:
            slots: [B, S'] int64 slots that remain, in increasing order among those that a row still
                reads; they become the slots 0 to S' - 1.
        """

    def select(self, rows: Tensor) -> None:
        """Keep some rows, when others are done.

        Args:
            rows: [R] int64 rows that remain, in their new order.
        """

    def serving(self) -> AbstractContextManager[None]:
        """A context around many passes: what an engine changes on the target ends with it."""


class TraceablePass(Protocol):
    """A pass as a function of tensors, which an engine can convert.

    It appends its A entries to a cache of S slots, at the same places for all rows.
    """

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """Number of heads and width of each tensor of the cache; empty without a cache."""

    @property
    def facts(self) -> Any:
        """What the pass depends on besides its weights, as JSON; None: compare the traced code."""

    def weights(self) -> Mapping[str, Tensor]:
        """Return all tensors that the pass reads besides its inputs."""

    def example(self, rows: int, count: int, slots: int) -> dict[str, Tensor]:
        """Return inputs for a measurement or a trace.

        Integers are int64, the rest is float32. The last dimension of a float input is the same in
        all passes; that of ``mask`` is S + A.

        Args:
            rows: Number of rows B, the first dimension of the first input.
            count: Number of entries A.
            slots: Number of slots S in the cache.

        Returns:
            The inputs by name.
        """

    def module(
        self, float32: bool = True
    ) -> Callable[..., tuple[dict[str, Tensor], Sequence[Tensor]]]:
        """Return the pass as a torch.nn.Module.

        torch.jit.trace and torch.compile must be able to follow it: its code must not branch on the
        values or the sizes of its inputs. It maps the inputs by name and the tensors [B, heads, S,
        width] of the cache to the outputs by name, [B, A or fewer, ...], and the tensors [B, heads,
        S + A, width] after the pass.

        Args:
            float32: Whether the weights are in float32, copied where they are not; otherwise they
                are the ones that the drafter or target has.
        """


class CompiledPass(Protocol):
    """A `TraceablePass` that an engine runs, with a cache of its own."""

    @property
    def slots(self) -> int:
        """The number of slots in the cache of each row; 0 before ``start``."""

    def start(self, rows: int) -> None:
        """Empty the cache, and use the present weights from now on.

        Args:
            rows: Number of rows B.

        Raises:
            UserError: The weights or modules changed in a way that the engine cannot follow.
        """

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a pass and append its entries to the cache.

        Args:
            given: The inputs, with the names of `TraceablePass.example`.

        Returns:
            The outputs.
        """

    def compact(self, slots: Tensor) -> None:
        """Drop all other slots of each row; see `Engine.compact`."""


@runtime_checkable
class CompilingEngine(Engine, Protocol):
    """An engine that also runs passes of a drafter."""

    def compile(self, traceable: TraceablePass) -> CompiledPass:
        """Prepare a pass.

        Args:
            traceable: The pass.

        Returns:
            The pass in this engine; a draft need not be exact, so it may round weights.

        Raises:
            UserError: The engine cannot run it.
        """


@runtime_checkable
class ThreadedEngine(Engine, Protocol):
    """An engine whose passes run on threads of its own, not on those of torch."""

    def verifying(self) -> AbstractContextManager[None]:
        """A context around torch's operations on the logits of a pass, before the next pass.

        Call ``start`` first. In the context, an engine can keep torch's threads from the cores that
        its own need.
        """


@runtime_checkable
class ConvertingEngine(Engine, Protocol):
    """An engine that converts a target before the first use, which can take minutes."""

    def converted(self, target: Any) -> bool:
        """Whether the engine has converted a target before, so that `bind` takes seconds.

        Args:
            target: The target.

        Raises:
            UserError: The engine cannot run it.
        """
