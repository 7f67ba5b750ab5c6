"""The engine: graphs of the target and of the drafter's pass, with float32 arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcore import UserError
from kdcore.decoding.layers.attention import TreeAttention
from kdcore.decoding.trials.tree_probe import engine_difference
from kdcore.models.features import FeatureTap
from kdcore_openvino.compiled_pass import OpenVinoPass, explained
from kdcore_openvino.graph import keep_layers, openvino
from kdcore_openvino.target_pass import TargetPass
from kdcore_openvino.torch_threads import one_thread

if TYPE_CHECKING:
    from kdcore import BuildContext
    from kdcore.decoding.engines.protocols import TraceablePass
    from kdcore_openvino.plugin import OpenVinoParams

TOLERANCE = {"exact": 1e-3, "float16": 3e-2, "int8": 0.3}
"""Maximum difference of the graph's logits from the target's, relative to their spread: what the
rounding of the weights explains. Other faults of a conversion give about 1."""
DRAFTS = "float16"
"""How a drafter's matrices are stored: a draft need not be exact."""


class OpenVinoEngine:
    """A `kdcore.CompilingEngine` for CPUs, with threads of its own."""

    def __init__(self, params: OpenVinoParams, context: BuildContext) -> None:
        self.weights = params.weights
        self._pass: OpenVinoPass | None = None

    @property
    def slots(self) -> int:
        return 0 if self._pass is None else self._pass.slots

    def bind(self, target: PreTrainedModel, layers: tuple[int, ...]) -> None:
        """Load the graph of the target from the cache; the first time, convert and try it.

        Args:
            target: The target, on the CPU.
            layers: Hidden states to return.

        Raises:
            UserError: OpenVINO is not installed, the target is not on a CPU, cannot be converted,
                or the graph gives other logits than the target.
        """
        name = type(target).__name__
        if target.device.type != "cpu":
            raise UserError(
                f"the engine openvino runs on a CPU, and {name} is on {target.device}",
                "set the engine to torch, or the device to cpu",
            )
        openvino()
        self.name, self.layers = name, layers
        self.attention = TreeAttention(target)
        FeatureTap(target, layers)  # raises for hidden states that the target does not have
        with explained(name):
            source = TargetPass(target)
        prepare = partial(keep_layers, layers=layers)
        self._pass = OpenVinoPass(name, source, self.weights, prepare, self._try)
        self._pass.load()

    def converted(self, target: PreTrainedModel) -> bool:
        """Whether the cache has the target's graph.

        Args:
            target: The target, on the CPU.

        Returns:
            False if ``bind`` would convert it.

        Raises:
            UserError: OpenVINO is not installed, or a trace would not follow the target.
        """
        openvino()
        name = type(target).__name__
        with explained(name):
            source = TargetPass(target)
            return OpenVinoPass(name, source, self.weights, _as_it_is, _as_it_is).stored()

    def compile(self, traceable: TraceablePass) -> OpenVinoPass:
        """Load the graph of a drafter's pass, as ``bind`` does that of the target.

        Args:
            traceable: The pass.

        Returns:
            The pass.

        Raises:
            UserError: The pass cannot be converted.
        """
        drafting = OpenVinoPass("the drafter", traceable, DRAFTS, _as_it_is, _as_it_is)
        drafting.load()
        return drafting

    def start(self, rows: int, slots: int | None = None) -> None:
        assert self._pass is not None
        self._pass.start(rows)

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: Mapping[str, Tensor] | None,
        logits_of: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        assert self._pass is not None
        rows, count = tokens.shape
        masks = self.attention.causal(positions) if masks is None else masks
        shape = rows, count, self.slots + count
        for kind, mask in masks.items():  # OpenVINO would read another shape without an error
            if mask.shape != shape:
                raise ValueError(f"the mask of {kind} is {tuple(mask.shape)}, not {shape}")
        hidden = torch.finfo(torch.float32).min
        given = {
            "tokens": tokens,
            "positions": positions,
            "logits_of": torch.arange(count) if logits_of is None else logits_of,
        } | {
            f"mask.{kind}": torch.zeros(shape).masked_fill_(~mask, hidden)[:, None]
            for kind, mask in masks.items()
        }
        found = self._pass.run(given)
        logits = found["logits"]
        return logits, found["features"] if self.layers else logits.new_empty(rows, count, 0)

    def select(self, rows: Tensor) -> None:
        assert self._pass is not None
        self._pass.select(rows)

    def compact(self, slots: Tensor) -> None:
        assert self._pass is not None
        self._pass.compact(slots)

    def serving(self) -> AbstractContextManager[None]:
        return nullcontext()

    def verifying(self) -> AbstractContextManager[None]:
        """Leave torch one thread for the logits of one row; those of many rows need its threads."""
        assert self._pass is not None
        return nullcontext() if self._pass.rows > 1 else one_thread()

    def _try(self, module: Any) -> None:
        """Compare the logits of a new graph with those of the model."""
        off = engine_difference(module.model, self)
        if not off <= TOLERANCE[self.weights]:
            raise UserError(
                f"the logits of openvino differ from those of {self.name} by "
                f"{off:.1%} of their spread",
                "set the engine to torch",
            )


def _as_it_is(graph_or_module: Any) -> None:
    """Neither change a drafter's graph nor check it: wrong drafts would be rejected."""
