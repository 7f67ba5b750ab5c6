"""Implementation of the job, imported when the job is checked or run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kdcore.models.assembly import Assembly
from kdcore.models.loading.load import load_model
from kdcore.runs.folder import Run

if TYPE_CHECKING:
    from kdcore.components.registry import Registry
    from kdcore.runs.progress import Progress
    from token_count.spec import CountSpec


def count(
    spec: CountSpec, *, registry: Registry, progress: Progress, overwrite: bool, resume: bool
) -> Run:
    """Count the tokens and write counts.json. It takes seconds, so a resumed run starts over.

    Args:
        spec: Spec of the job.
        registry: Known components.
        progress: Receiver of progress reports.
        overwrite: Whether to replace the run in the folder.
        resume: Whether to resume the run in the folder.

    Returns:
        The run.
    """
    run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume)
    with run.closed_after():
        source, examples, tokenizer = _found(spec, registry)
        lengths, learned, cut = [], 0, 0
        with progress.stage("count", len(examples)) as stage:
            for example in examples:
                row = source.encode(example, tokenizer, spec.max_length)
                # one token more than the maximum, to detect truncation
                whole = source.encode(example, tokenizer, spec.max_length + 1)
                lengths.append(len(row.labels))
                learned += int(row.mask.sum())
                cut += len(whole.labels) > len(row.labels)
                stage.advance()
        counts = {
            "rows": len(lengths),
            "tokens": sum(lengths),
            "learned": learned,
            "longest": max(lengths, default=0),
            "cut_rows": cut,
        }
        run.write_text("counts.json", json.dumps(counts, indent=2))
    return run


def preflight(spec: CountSpec, *, registry: Registry) -> dict[str, Any]:
    """Check a spec.

    Args:
        spec: Spec of the job.
        registry: Known components.

    Returns:
        The source, its number of rows and the tokenizer.

    Raises:
        UserError: The run would fail.
    """
    Run(spec.run, planned=True).refuse_foreign()
    _, examples, _ = _found(spec, registry)
    return {"source": spec.source.name, "rows": len(examples), "tokenizer": spec.tokenizer.model}


def _found(spec: CountSpec, registry: Registry) -> tuple[Any, Sequence[Any], Any]:
    """Load the source, its examples and the tokenizer."""
    source = Assembly(registry).build(spec.source)
    return source, source.read(), load_model(spec.tokenizer, weights=False).tokenizer
