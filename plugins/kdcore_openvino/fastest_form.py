"""The form of a graph that is fastest on this machine, measured once and remembered beside it.

Matrices in float16 halve what a pass reads, but each pass converts them; in which passes that
pays off depends on the processor. Both forms compute the same in float32.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kdcore.models.device import processor
from kdcore.runs.whole_files import write_text
from kdcore_openvino.stored_weights import widen

if TYPE_CHECKING:
    from kdcore.decoding.engines.protocols import TraceablePass

COUNTS = (1, 4, 8)
"""Numbers of entries in the timed passes: plain decoding, and small draft trees."""
CONTEXT = 64
REPEATS = 5


def fastest(
    source: TraceablePass, compiled: Callable[[Callable[[Any], Any] | None], Any], folder: Path
) -> Any:
    """Compile the fastest form of a graph.

    Args:
        source: The pass.
        compiled: Function that compiles the graph after a change to it, or returns None if the
            change returns False.
        folder: The folder of the graph, in which the times are kept.

    Returns:
        The compiled model.
    """
    place = folder / "times.json"
    known = json.loads(place.read_text("utf-8")) if place.exists() else {}
    machine = f"{processor()}, threads: {torch.get_num_threads()}"
    times = known.get(machine)
    if times is not None:
        return compiled(widen if times.get("float32", np.inf) < times["stored"] else None)
    forms = {"stored": compiled(None), "float32": compiled(widen)}
    forms = {name: model for name, model in forms.items() if model is not None}
    times = {"stored": 0.0}
    if len(forms) > 1:
        times = _times(source, {name: each.create_infer_request() for name, each in forms.items()})
    write_text(place, json.dumps(known | {machine: times}, indent=2) + "\n")
    return forms[min(times, key=lambda name: times[name])]


def _times(source: TraceablePass, requests: dict[str, Any]) -> dict[str, float]:
    """The geometric mean of each form's passes in milliseconds, forms alternating.

    Of each pass the shortest time counts, which other work on the machine disturbs least.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(1 + REPEATS):
        for name, request in requests.items():
            request.reset_state()
            slots = 0
            for count in (CONTEXT, *COUNTS):
                given = source.example(1, count, slots)
                inputs = {key: each.numpy() for key, each in given.items()}
                if source.sizes:
                    inputs["beam_idx"] = np.zeros(1, np.int32)
                began = time.perf_counter()
                request.infer(inputs)
                seconds.setdefault((name, count), []).append(time.perf_counter() - began)
                slots += count
    return {
        name: round(
            1000 * statistics.geometric_mean(min(seconds[name, count][1:]) for count in COUNTS), 3
        )
        for name in requests
    }
