"""The engine: a converted graph of the target, from a cache on disk, with float32 arithmetic.

The graph has the weights of the target when it was bound; weights that change later need a new
engine.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from kdcore import UserError
from kdcore.decoding.layers.attention import TreeAttention
from kdcore.decoding.tree_probe import engine_difference
from kdcore.models.features import FeatureTap
from kdcore.models.folder.files import cache_folder
from kdcore.runs.whole_files import whole_folder
from kdcore_openvino.graph import converted, openvino

if TYPE_CHECKING:
    from kdcore import BuildContext
    from kdcore_openvino.plugin import OpenVinoParams

FORMAT = 1
"""Raise it when `converted` gives another graph for the same model."""
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
"""Settings without which OpenVINO may compute in bfloat16 and quantise activations."""
TOLERANCE = {"exact": 1e-3, "float16": 3e-2}
"""Maximum difference of the graph's logits from the target's, relative to their spread."""


class OpenVinoEngine:
    """A `kdcore.Engine` for CPUs."""

    def __init__(self, params: OpenVinoParams, context: BuildContext) -> None:
        self.weights = params.weights
        self._slots = 0

    @property
    def slots(self) -> int:
        return self._slots

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
        ov = openvino()
        self.attention = TreeAttention(target)
        FeatureTap(target, layers)  # raises for hidden states that the target does not have
        self.layers = layers
        with _explained(name):
            _refuse_branches(target)
            folder = cache_folder() / "openvino" / _digest(target, layers, self.weights)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(folder.name + ".lock")):
                if not folder.exists():
                    with whole_folder(folder) as place:
                        place.mkdir()
                        self._convert(ov, target, layers, place)
                self._compile(ov, folder)

    def start(self, rows: int, slots: int | None = None) -> None:
        self._request.reset_state()
        self._beams = torch.arange(rows, dtype=torch.int32)
        self._slots = 0

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        masks: Mapping[str, Tensor] | None,
        logits_of: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rows, count = tokens.shape
        masks = self.attention.causal(positions) if masks is None else masks
        shape = rows, count, self._slots + count
        for kind, mask in masks.items():  # OpenVINO would read another shape without an error
            if mask.shape != shape:
                raise ValueError(f"the mask of {kind} is {tuple(mask.shape)}, not {shape}")
        hidden = torch.finfo(torch.float32).min
        given = {
            "tokens": tokens,
            "positions": positions,
            "logits_of": torch.arange(count) if logits_of is None else logits_of,
            "beam_idx": self._beams,
        } | {
            f"mask.{kind}": torch.zeros(shape).masked_fill_(~mask, hidden)[:, None]
            for kind, mask in masks.items()
        }
        self._request.infer({name: each.contiguous().numpy() for name, each in given.items()})
        self._slots += count
        self._beams = torch.arange(rows, dtype=torch.int32)
        logits = self._output("logits")
        return logits, self._output("features") if self.layers else logits.new_empty(*shape[:2], 0)

    def select(self, rows: Tensor) -> None:
        self._beams = self._beams[rows]  # the next pass reads these rows and drops the others

    def compact(self, slots: Tensor) -> None:
        chosen = slots[:, None, :, None]
        for state in self._request.query_state():
            held = torch.from_numpy(state.state.data)
            _, heads, _, width = held.shape
            kept = held[self._beams].gather(2, chosen.expand(-1, heads, -1, width))
            state.state = openvino().Tensor(kept.contiguous().numpy())
        self._slots = slots.shape[1]
        self._beams = torch.arange(len(slots), dtype=torch.int32)

    def serving(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _output(self, name: str) -> Tensor:
        """A copy of an output: the next pass writes to the same memory."""
        return torch.from_numpy(self._request.get_tensor(name).data).clone()

    def _convert(
        self, ov: Any, target: PreTrainedModel, layers: tuple[int, ...], place: Path
    ) -> None:
        """Write the graph, if it agrees with the target."""
        single: Any = target
        if target.dtype != torch.float32:
            single = copy.deepcopy(single).float()
        graph = converted(single, layers, self.weights)
        ov.save_model(graph, place / "model.xml", compress_to_fp16=False)
        self._compile(ov, place)
        off = engine_difference(single, self)
        if not off <= TOLERANCE[self.weights]:
            raise UserError(
                f"the logits of openvino differ from those of {type(target).__name__} by "
                f"{off:.1%} of their spread",
                "set the engine to torch",
            )

    def _compile(self, ov: Any, folder: Path) -> None:
        graph = ov.Core().read_model(folder / "model.xml")
        threads = str(torch.get_num_threads())
        settings = EXACT | {"INFERENCE_NUM_THREADS": threads}
        self._request = ov.Core().compile_model(graph, "CPU", settings).create_infer_request()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what fails inside into an error of the user: unsupported models fail in many ways."""
    try:
        yield
    except UserError:
        raise
    except Exception as fault:
        reason = (str(fault).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"openvino cannot run {name}: {type(fault).__name__}: {reason}",
            "set the engine to torch",
        ) from fault


def _refuse_branches(target: PreTrainedModel) -> None:
    """Refuse rotary positions whose factors depend on the longest row: a trace has one of them."""
    rope = getattr(target.config.get_text_config(), "rope_parameters", None) or {}
    parts = [each for each in rope.values() if isinstance(each, dict)] or [rope]
    for part in parts:
        if part.get("rope_type") in ("dynamic", "longrope"):
            raise UserError(
                f"openvino cannot run {type(target).__name__}: its rotary positions "
                f"({part['rope_type']}) depend on the longest row",
                "set the engine to torch",
            )


def _digest(target: PreTrainedModel, layers: tuple[int, ...], weights: str) -> str:
    """The digest of all that the graph depends on: weights, config, layers, versions, settings."""
    config = target.config.to_dict() | {"attention": target.config._attn_implementation}
    config.pop("_name_or_path", None)
    versions = {each: version(each) for each in ("openvino", "torch", "transformers")}
    facts = [FORMAT, type(target).__name__, config, layers, versions, weights]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in target.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:40]
