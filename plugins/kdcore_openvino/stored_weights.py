"""How a graph stores its matrices: in float32, in float16 or in int8. The arithmetic is float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcore_openvino.graph import of_type, openvino

LARGE = 2**14
"""Number of elements from which a constant is a matrix. Smaller ones, such as the frequencies of
rotary positions, always keep float32: at position 1000, their rounding would be an angle."""
ROUNDING = 2.0**-24
"""Relative rounding of float32."""
LEVELS = 255


def store(graph: Any, weights: str) -> None:
    """Choose how a graph in float32 stores its matrices.

    Args:
        graph: The graph; it is changed.
        weights: ``exact``, ``float16`` or ``int8``; see `kdcore_openvino.plugin.OpenVinoParams`.
    """
    if weights == "int8":
        _store_in_int8(graph)
    elif weights == "float16" or all(_is_exact(each.data) for each in _matrices(graph)):
        _store_in_half(graph)


def widen(graph: Any) -> bool:
    """Store matrices in float32 that are stored in float16; the graph computes the same.

    Args:
        graph: The graph; it is changed.

    Returns:
        Whether there were any.
    """
    from openvino import opset13 as ops

    halves = [
        each
        for each in of_type(graph, "Convert")
        if _is_constant(each.input_value(0), "f16") and each.get_output_element_type(0) == _f32()
    ]
    for half in halves:
        single = ops.constant(half.input_value(0).get_node().data.astype(np.float32))
        _replace(half, single)
    graph.validate_nodes_and_infer_types()
    return bool(halves)


def _store_in_half(graph: Any) -> None:
    from openvino import opset13 as ops
    from openvino._offline_transformations import compress_model_transformation

    small = {
        each.get_friendly_name(): np.array(each.data)
        for each in of_type(graph, "Constant")
        if each.get_element_type() == _f32() and each.data.size < LARGE
    }
    compress_model_transformation(graph)
    for widened in of_type(graph, "Convert"):
        value = small.get(widened.get_friendly_name())
        if widened.input_value(0).get_node().get_type_name() == "Constant" and value is not None:
            _replace(widened, ops.constant(value, _f32()))
    graph.validate_nodes_and_infer_types()


def _store_in_int8(graph: Any) -> None:
    """Round the matrix of each product to 256 levels between the extremes of each of its rows."""
    from openvino import opset13 as ops

    for product in of_type(graph, "MatMul"):
        source = product.input_value(1)
        if not (_is_constant(source, "f32") and product.get_attributes()["transpose_b"]):
            continue
        matrix = source.get_node().data
        if matrix.size < LARGE or matrix.ndim != 2:
            continue
        low = np.minimum(matrix.min(1, keepdims=True), 0)
        step = (np.maximum(matrix.max(1, keepdims=True), 0) - low) / LEVELS
        step[step == 0] = 1
        zero = np.round(-low / step)
        levels = np.clip(np.round(matrix / step) + zero, 0, LEVELS)
        first, second = (
            ops.convert(ops.constant(each.astype(np.uint8)), _f32()) for each in (levels, zero)
        )
        scaled = ops.multiply(ops.subtract(first, second), ops.constant(step.astype(np.float32)))
        product.input(1).replace_source_output(scaled.output(0))
    graph.validate_nodes_and_infer_types()


def _matrices(graph: Any) -> list[Any]:
    return [
        each
        for each in of_type(graph, "Constant")
        if each.get_element_type() == _f32() and each.data.size >= LARGE
    ]


def _is_exact(values: Any) -> bool:
    largest = float(np.abs(values).max())
    half = values.astype(np.float16).astype(np.float32)
    return bool(np.abs(half - values).max() <= ROUNDING * largest)


def _is_constant(source: Any, kind: str) -> bool:
    node = source.get_node()
    return bool(node.get_type_name() == "Constant" and node.get_element_type().to_string() == kind)


def _replace(old: Any, new: Any) -> None:
    for reader in old.output(0).get_target_inputs():
        reader.replace_source_output(new.output(0))


def _f32() -> Any:
    return openvino().Type.f32
