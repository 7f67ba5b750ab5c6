"""A pass in OpenVINO: its graph comes from a cache on disk and follows changes of the weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from kdcore import UserError
from kdcore.errors import first_line
from kdcore.models.folder.kept_files import cache_folder
from kdcore.runs.whole_files import whole
from kdcore_openvino.fastest_form import fastest
from kdcore_openvino.graph import converted, openvino, traced
from kdcore_openvino.signal_stack import signal_stack_kept
from kdcore_openvino.stored_weights import store

if TYPE_CHECKING:
    from kdcore.decoding.engines.protocols import TraceablePass

FORMAT = 2
"""Raise it when the conversion gives another graph for the same pass."""
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
"""Settings without which OpenVINO may compute in bfloat16 and quantise activations."""

MANGLED = re.compile(r"___torch_mangle_\d+\.")
"""What torch puts into the names of types that a process traces again."""


class OpenVinoPass:
    """A `kdcore.decoding.engines.protocols.CompiledPass`; call ``load`` first.

    Args:
        name: Name of the pass in messages.
        source: The pass.
        weights: How its matrices are stored.
        prepare: Called with each graph that was read from the disk; it may change the graph.
        check: Called with the module of a pass after its first conversion; it runs the pass and
            raises UserError if the graph computes something else.
    """

    def __init__(
        self,
        name: str,
        source: TraceablePass,
        weights: str,
        prepare: Callable[[Any], None],
        check: Callable[[Any], None],
    ) -> None:
        self.name, self.source, self.weights = name, source, weights
        self._prepare, self._check = prepare, check
        self._slots = 0

    @property
    def slots(self) -> int:
        """The number of slots in the cache."""
        return self._slots

    @property
    def rows(self) -> int:
        """The number of rows; call ``start`` first."""
        return len(self._beams)

    def load(self) -> None:
        """Load the graph from the cache on disk; the first time, convert and check it.

        Raises:
            UserError: The pass cannot be converted, or the graph computes something else.
        """
        with explained(self.name):
            self._load()

    def stored(self) -> bool:
        """Whether the graph is in the cache on disk; False for a pass that states no facts."""
        facts = self.source.facts
        return facts is not None and self._folder(facts).exists()

    def start(self, rows: int) -> None:
        """Empty the cache; load another graph if the weights changed.

        Args:
            rows: Number of rows B.

        Raises:
            UserError: As for ``load``.
        """
        if sums(self.source) != self._sums:
            self.load()
        self._request.reset_state()
        self._beams = torch.arange(rows, dtype=torch.int32)
        self._slots = 0

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a pass; see `kdcore.decoding.engines.protocols.CompiledPass.run`."""
        if self.source.sizes:
            given = {**given, "beam_idx": self._beams}
            self._beams = torch.arange(len(self._beams), dtype=torch.int32)
        inputs = {name: each.contiguous().numpy() for name, each in given.items()}
        found = self._request.infer(inputs, share_inputs=True, share_outputs=True)
        if "positions" in given:
            self._slots += given["positions"].shape[1]
        # copies, since the next pass writes to the same memory; by one thread: see `torch_threads`
        return {name: torch.from_numpy(found[name].copy()) for name in self._outputs}

    def select(self, rows: Tensor) -> None:
        """Keep some rows: the next pass reads them and drops the others."""
        self._beams = self._beams[rows]

    def compact(self, slots: Tensor) -> None:
        """Drop all other slots of each row; see `Engine.compact`."""
        chosen, tensor = slots[:, None, :, None], openvino().Tensor
        for state in self._request.query_state():
            held = torch.from_numpy(state.state.data)
            _, heads, _, width = held.shape
            kept = held[self._beams].gather(2, chosen.expand(-1, heads, -1, width))
            state.state = tensor(kept.contiguous().numpy())
        self._slots = slots.shape[1]
        self._beams = torch.arange(len(slots), dtype=torch.int32)

    def _load(self) -> None:
        self._sums = sums(self.source)
        module = trace = None
        facts, outputs = self._sums[0], ()
        if facts is None:
            module = self.source.module()
            trace, outputs = traced(self.source, module)
            facts = MANGLED.sub("", trace.inlined_graph.str(False))
        folder = self._folder(facts)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if folder.exists():
                self._compile(folder)
            else:
                if trace is None:
                    module = self.source.module()
                    trace, outputs = traced(self.source, module)
                with whole(folder) as place:
                    place.mkdir()
                    graph = converted(self.source, trace, outputs)
                    store(graph, self.weights)
                    openvino().save_model(graph, place / "model.xml", compress_to_fp16=False)
                    self._compile(place)
                    self._check(module)

    def _folder(self, facts: Any) -> Path:
        return cache_folder() / "openvino" / _digest(self.source, facts, self.weights)

    def _compile(self, folder: Path) -> None:
        def compiled(change: Callable[[Any], Any] | None = None) -> Any:
            graph = openvino().Core().read_model(folder / "model.xml")
            self._prepare(graph)
            if change is not None and not change(graph):
                return None
            settings = EXACT | {"INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
            with signal_stack_kept():
                return openvino().Core().compile_model(graph, "CPU", settings)

        model = fastest(self.source, compiled, folder)
        self._outputs = [name for port in model.outputs for name in port.get_names()]
        self._request = model.create_infer_request()


@contextmanager
def explained(name: str, cure: str = "set the engine to torch") -> Iterator[None]:
    """Turn what fails inside into an error of the user: unsupported models fail in many ways.

    Args:
        name: What is converted or run.
        cure: What the user can do.

    Raises:
        UserError: Something failed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as fault:
        reason = f"{type(fault).__name__}: {first_line(fault)}"
        raise UserError(f"openvino cannot run {name}: {reason}", cure) from fault


def sums(source: TraceablePass) -> Any:
    """The facts of a pass and the sum of the bits of each weight.

    torch does not count writes through ``.data``, so the weights are read. Reordering the elements
    of a weight is the only usual change that the sums do not show.

    Args:
        source: The pass.

    Returns:
        A value that differs after a change.
    """
    return source.facts, {
        name: (each.dtype, each.shape, _sum(each.detach()))
        for name, each in source.weights().items()
    }


def _sum(weight: Tensor) -> int:
    flat = weight.reshape(-1)
    bytes_before, length = flat.storage_offset() * flat.element_size(), flat.nbytes
    kind = torch.int64 if not (bytes_before % 8 or length % 8) else torch.uint8
    return int(flat.view(kind).sum(dtype=torch.int64))


def _digest(source: TraceablePass, facts: Any, weights: str) -> str:
    """The digest of all that the graph depends on: weights, facts, versions, settings."""
    versions = {each: version(each) for each in ("openvino", "torch", "transformers")}
    said = [FORMAT, facts, versions, weights]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, tensor in source.weights().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        stored: Any = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy()
        digest.update(stored)
    return digest.hexdigest()[:40]
