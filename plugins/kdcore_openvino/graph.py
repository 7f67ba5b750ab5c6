"""Conversion of a pass to a stateful OpenVINO graph.

In the graph, the tensors of the cache are variables: ReadValue, Gather by beam, Concat and Assign,
the pattern that OpenVINO's CPU plugin fuses with the attention.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdcore.components.optional_packages import optional_package

if TYPE_CHECKING:
    from kdcore.decoding.engines.protocols import TraceablePass


def openvino() -> ModuleType:
    """Import OpenVINO with its telemetry turned off.

    Unless it is blocked, openvino-telemetry reports each import, and each conversion with the
    version, the framework, the operations and errors, to Google Analytics.

    Returns:
        The module.

    Raises:
        UserError: OpenVINO is not installed, is too old, or cannot be imported.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # its import fails
    return optional_package(
        "openvino", "kdcore[openvino]", "the engine openvino", instead="use the engine torch"
    )


def traced(source: TraceablePass, module: Any) -> Any:
    """Trace a pass.

    Args:
        source: The pass.
        module: Its `module()`.

    Returns:
        The trace, whose inputs and outputs are flat: first the named ones, then the cache's.
    """
    whole = _Flat(module, tuple(source.example(1, 1, 0)))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the trace is compared with the module afterwards
        trace: Any = torch.jit.trace
        found = trace(whole, _inputs(source), strict=False, check_trace=False)
    return found, whole.outputs


def converted(source: TraceablePass, trace: Any, outputs: Sequence[str]) -> Any:
    """Convert a traced pass.

    Args:
        source: The pass.
        trace: Its trace.
        outputs: Names of the outputs.

    Returns:
        An ``openvino.Model`` with the inputs and outputs of the pass. With a cache, it has one more
        input beam_idx [B].
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        graph = openvino().convert_model(trace, example_input=_inputs(source))
    _name(graph, source, outputs)
    if source.sizes:
        _make_stateful(graph, len(source.sizes))
    return graph


def keep_layers(graph: Any, layers: tuple[int, ...]) -> None:
    """Replace the outputs hidden.N of a graph by their concatenation.

    Args:
        graph: The graph of a `kdcore_openvino.target_pass.TargetPass`.
        layers: The hidden states N, in the order of the output features [B, A, F]; without any, the
            graph does not have that output.
    """
    from openvino import opset13 as ops

    states = {name: port for port in graph.outputs for name in port.get_names()}
    chosen = [states[f"hidden.{layer}"].get_node().input_value(0) for layer in layers]
    for name, port in states.items():
        if name.startswith("hidden."):
            graph.remove_result(port.get_node())
    if layers:
        joined = ops.concat(chosen, -1)
        joined.output(0).get_tensor().set_names({"features"})
        graph.add_results([ops.result(joined)])
    graph.validate_nodes_and_infer_types()


class _Flat(nn.Module):
    """A pass whose inputs and outputs are flat.

    outputs: Names of the outputs, after a call.
    """

    def __init__(self, module: Any, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.inputs = module, inputs
        self.outputs: tuple[str, ...] = ()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self.inputs)
        given = dict(zip(self.inputs, tensors[:count], strict=True))
        outputs, present = self.module(given, list(tensors[count:]))
        self.outputs = tuple(outputs)
        return (*outputs.values(), *present)


def _inputs(source: TraceablePass) -> tuple[Tensor, ...]:
    rows, count, slots = 2, 4, 3
    past = [torch.zeros(rows, heads, slots, width) for heads, width in source.sizes]
    return (*source.example(rows, count, slots).values(), *past)


def _name(graph: Any, source: TraceablePass, outputs: Sequence[str]) -> None:
    """Name inputs and outputs by their order, and give float inputs their static sizes."""
    example = source.example(1, 1, 0)
    count = len(source.sizes)
    inputs = [*example, *(f"past.{n}" for n in range(count))]
    results = [*outputs, *(f"present.{n}" for n in range(count))]
    if len(inputs) != len(graph.inputs) or len(results) != len(graph.outputs):
        raise ValueError("the model ignores some of its inputs")
    for ports, names in ((graph.inputs, inputs), (graph.outputs, results)):
        for port, name in zip(ports, names, strict=True):
            port.get_tensor().set_names({name})
    for port in graph.inputs:  # OpenVINO GenAI finds inputs by this name
        port.get_node().set_friendly_name(port.get_any_name())
    shapes: dict[str, list[int]] = {
        name: [*[-1] * (each.ndim - 1), each.shape[-1]]
        for name, each in example.items()
        if each.is_floating_point() and not name.startswith("mask")
    }
    shapes |= {f"past.{n}": [-1, size[0], -1, size[1]] for n, size in enumerate(source.sizes)}
    for name, shape in shapes.items():
        graph.input(name).get_node().set_partial_shape(openvino().PartialShape(shape))
    graph.validate_nodes_and_infer_types()


def _make_stateful(graph: Any, count: int) -> None:
    ov = openvino()
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    first = graph.inputs[0]
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
    shape = ops.shape_of(first, output_type="i64")
    rows = ops.gather(shape, ops.constant([0], ov.Type.i64), ops.constant(0, ov.Type.i64))
    for state in of_type(graph, "ReadValue"):
        _, heads, _, width = state.get_output_partial_shape(0)
        sizes = heads.get_length(), 0, width.get_length()
        fixed = [ops.constant([size], ov.Type.i64) for size in sizes]
        empty = ops.broadcast(ops.constant(0.0, ov.Type.f32), ops.concat([rows, *fixed], 0))
        state.set_arguments([empty])
    graph.validate_nodes_and_infer_types()


def of_type(graph: Any, name: str) -> Iterable[Any]:
    """The operations of a type, in an order in which inputs come first."""
    return [each for each in graph.get_ordered_ops() if each.get_type_name() == name]
