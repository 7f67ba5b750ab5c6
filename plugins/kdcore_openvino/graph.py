"""Conversion of a transformers model to a stateful OpenVINO graph, without code for any family.

torch traces the model itself with a 4D mask, position ids and a cache. In the graph, the keys and
values are variables: ReadValue, Gather by beam, Concat and Assign, the pattern that OpenVINO's CPU
plugin fuses with the attention.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from kdcore import UserError
from kdcore.decoding.cache import KVCache
from kdcore.decoding.layers.attention import Masks, TreeAttention
from kdcore.models.features import FeatureTap

LARGE = 2**14
"""Number of elements from which a constant is a matrix. Smaller ones, such as the frequencies of
rotary positions, always keep float32: at position 1000, their rounding would be an angle."""
ROUNDING = 2.0**-24
"""Relative rounding of float32."""


def openvino() -> ModuleType:
    """Import OpenVINO with its telemetry turned off.

    Unless it is blocked, openvino-telemetry reports each import, and each conversion with the
    version, the framework, the operations and errors, to Google Analytics.

    Returns:
        The module.

    Raises:
        UserError: OpenVINO is not installed.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # its import fails
    try:
        import openvino as module
    except ImportError as absent:
        raise UserError(
            "openvino is not installed", "pip install 'kdcore[openvino]', or use the engine torch"
        ) from absent
    found: ModuleType = module
    return found


def converted(model: PreTrainedModel, layers: tuple[int, ...], weights: str) -> Any:
    """Convert a model.

    Args:
        model: The model in eval mode, on the CPU.
        layers: Hidden states that the graph returns; see `kdcore.models.features.FeatureTap`.
        weights: ``exact`` or ``float16``; see `kdcore_openvino.plugin.OpenVinoParams`.

    Returns:
        An ``openvino.Model`` with the inputs tokens [B, A], positions [B, A], logits_of [L],
        mask.KIND [B, 1, A, S + A] for each type of layers, and beam_idx [B]; its outputs are logits
        [B, L, V] and features [B, A, F], if there are layers.
    """
    whole = _Pass(model, layers)
    example = whole.example()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the trace is compared with the model afterwards
        trace: Any = torch.jit.trace
        traced = trace(whole, example, strict=False, check_trace=False)
        graph = openvino().convert_model(traced, example_input=example)
    _name(graph, whole)
    _make_stateful(graph, len(whole.sizes))
    _store_in_half(graph, always=weights == "float16")
    return graph


class _Past(Cache):
    """A cache of given keys and values, which a pass appends to by copies."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__(layers=[])
        self.keys, self.values = list(keys), list(values)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys[layer_idx] = torch.cat([self.keys[layer_idx], key_states], 2)
        self.values[layer_idx] = torch.cat([self.values[layer_idx], value_states], 2)
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.keys[layer_idx].shape[2]


class _Pass(nn.Module):
    """A pass as a function of tensors, which a trace can follow.

    sizes: Heads and width of the keys and of the values of each layer, in turn.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.attention = TreeAttention(model)
        self.tap = FeatureTap(model, layers)
        cache = KVCache()
        with torch.no_grad():
            model(
                input_ids=torch.ones(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True
            )
        pairs = zip(cache.keys, cache.values, strict=True)
        self.sizes = [(each.shape[1], each.shape[3]) for pair in pairs for each in pair]

    def example(self) -> tuple[Any, ...]:
        """Arguments with B = 2, A = 4 and S = 3."""
        rows, count, before = 2, 4, 3
        masks = [torch.zeros(rows, 1, count, before + count) for _ in self.attention.kinds]
        past = [torch.zeros(rows, heads, before, width) for heads, width in self.sizes]
        positions = torch.arange(before, before + count).repeat(rows, 1)
        tokens = torch.ones(rows, count, dtype=torch.int64)
        return tokens, positions, torch.arange(count), masks, past

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        logits_of: Tensor,
        masks: list[Tensor],
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        cache = _Past(past[0::2], past[1::2])
        by_kind: Masks = dict(zip(self.attention.kinds, masks, strict=True))
        if self.attention.layer_types is None:
            by_kind = masks[0]
        with self.tap.listening() as heard:
            output = self.model(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=by_kind,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=logits_of,
            )
        features = [self.tap.join(heard, tokens)] if self.tap.layers else []
        pairs = zip(cache.keys, cache.values, strict=True)
        return (output.logits, *features, *(each for pair in pairs for each in pair))


def _name(graph: Any, whole: _Pass) -> None:
    """Name inputs and outputs by their order, and give the past its static sizes."""
    kinds = whole.attention.kinds
    given = ["tokens", "positions", "logits_of", *(f"mask.{kind}" for kind in kinds)]
    inputs = [*given, *(f"past.{n}" for n in range(len(whole.sizes)))]
    results = ["logits", *(["features"] if whole.tap.layers else [])]
    outputs = [*results, *(f"present.{n}" for n in range(len(whole.sizes)))]
    if len(inputs) != len(graph.inputs) or len(outputs) != len(graph.outputs):
        raise ValueError("the model ignores some of its inputs")
    for ports, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    sizes = zip(graph.inputs[len(given) :], whole.sizes, strict=True)
    for port, (heads, width) in sizes:
        port.get_node().set_partial_shape(openvino().PartialShape([-1, heads, -1, width]))
    graph.validate_nodes_and_infer_types()


def _make_stateful(graph: Any, count: int) -> None:
    ov = openvino()
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    beam = ops.parameter([-1], ov.Type.i32, name="beam_idx")
    beam.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([beam])
    for number in range(count):
        past = graph.input(f"past.{number}")
        readers = past.get_target_inputs()
        chosen = ops.gather(past, beam, ops.constant(0, ov.Type.i64))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    graph.validate_nodes_and_infer_types()
    names = {f"past.{number}": f"present.{number}" for number in range(count)}
    apply_make_stateful_transformation(graph, names)
    shape = ops.shape_of(graph.input("tokens"), output_type="i64")
    rows = ops.gather(shape, ops.constant([0], ov.Type.i64), ops.constant(0, ov.Type.i64))
    for state in _of_type(graph, "ReadValue"):
        _, heads, _, width = state.get_output_partial_shape(0)
        sizes = heads.get_length(), 0, width.get_length()
        fixed = [ops.constant([size], ov.Type.i64) for size in sizes]
        empty = ops.broadcast(ops.constant(0.0, ov.Type.f32), ops.concat([rows, *fixed], 0))
        state.set_arguments([empty])
    graph.validate_nodes_and_infer_types()


def _store_in_half(graph: Any, *, always: bool) -> None:
    """Store matrices in float16 where that is as exact as float32, or always."""
    import numpy as np
    from openvino._offline_transformations import compress_model_transformation

    matrices = [
        each
        for each in _of_type(graph, "Constant")
        if each.get_element_type() == openvino().Type.f32 and each.data.size >= LARGE
    ]
    if not always and not all(_is_exact(each.data, np) for each in matrices):
        return
    small = {
        each.get_friendly_name(): np.array(each.data)
        for each in _of_type(graph, "Constant")
        if each.get_element_type() == openvino().Type.f32 and each.data.size < LARGE
    }
    compress_model_transformation(graph)
    _restore(graph, small)


def _is_exact(values: Any, np: Any) -> bool:
    largest = float(np.abs(values).max())
    half = values.astype(np.float16).astype(np.float32)
    return bool(np.abs(half - values).max() <= ROUNDING * largest)


def _restore(graph: Any, small: dict[str, Any]) -> None:
    """Undo the rounding of small constants."""
    ov = openvino()
    from openvino import opset13 as ops

    for widened in _of_type(graph, "Convert"):
        source = widened.input_value(0).get_node()
        value = small.get(widened.get_friendly_name())
        if source.get_type_name() == "Constant" and value is not None:
            exact = ops.constant(value, ov.Type.f32)
            for reader in widened.output(0).get_target_inputs():
                reader.replace_source_output(exact.output(0))
    graph.validate_nodes_and_infer_types()


def _of_type(graph: Any, name: str) -> Iterable[Any]:
    return [each for each in graph.get_ordered_ops() if each.get_type_name() == name]
