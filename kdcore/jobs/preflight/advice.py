"""What a spec allows and its author should know before the run is paid for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from kdcore.data.conversation import Conversation, Message
from kdcore.data.encoded.stream_windows import FirstExamples
from kdcore.data.responses.file import questions_of
from kdcore.data.source import DataSource
from kdcore.data.templates.rendering import render
from kdcore.models.loading.cut import kept_layers
from kdcore.specs.distill import DistillSpec
from kdcore.specs.train_drafter import TrainedSpec
from kdcore.training.arguments import lost_updates

LONG = 600.0
"""Seconds above which a run without checkpoints is worth a word."""
_ROLE = 3
"""Words before a user turn that a template may add: the name of the role, and a line or two."""


def advice(
    spec: TrainedSpec,
    sources: Mapping[str, DataSource],
    tokenizer: Any,
    seconds: float,
    dtype: Any = None,
) -> tuple[str, ...]:
    """List what is probably a mistake, or a surprise.

    Args:
        spec: The spec.
        sources: Field of ``data`` -> data source.
        tokenizer: The tokenizer that encodes the rows.
        seconds: Estimated time of the run.
        dtype: The dtype of a student's weights.

    Returns:
        Sentences; empty if there is nothing to say.
    """
    lost = lost_updates(spec, dtype) if isinstance(spec, DistillSpec) else None
    return tuple(filter(None, [lost, *_advice(spec, sources, tokenizer, seconds)]))


def low_layers(spec: DistillSpec, cut_from: int | None) -> str | None:
    """Say that a cut student keeps nothing of the upper half of its model.

    Args:
        spec: The spec.
        cut_from: See `kdcore.models.facts.ModelFacts`.

    Returns:
        The warning, or None.
    """
    if cut_from is None or spec.student.layers is None:
        return None
    last = kept_layers(spec.student.layers, cut_from)[-1]
    if 2 * (last + 1) > cut_from:
        return None
    return (
        f"student.layers ends at layer {last}, and the model has the layers 0 to {cut_from - 1}: "
        "if the list is that of another model, spread it over all layers, and keep the last one"
    )


def _advice(
    spec: TrainedSpec, sources: Mapping[str, DataSource], tokenizer: Any, seconds: float
) -> Iterator[str]:
    if isinstance(spec, DistillSpec) and spec.student.lora and spec.student.layers is not None:
        yield (
            "student.lora trains adapters of a student that lost layers, which they restore "
            "only in part: remove student.lora to train all weights, or student.layers"
        )
    if spec.training.save_every is None and seconds > LONG:
        yield (
            "training.save_every is not set, so a run that is killed starts again from its first "
            "step: set it to the number of steps that you can afford to repeat"
        )
    if added := _added_text(sources["train"], tokenizer):
        yield (
            "the chat template adds text before the first turn, which is not in the data: "
            f"{added!r}; to replace it, set system in each source of the data"
        )
    if (heldout := sources.get("heldout")) is not None:
        trained = set(map(_content(spec), sources["train"].read())) - {None}
        rows = heldout.read()
        shared = sum(_content(spec)(row) in trained for row in rows)
        if shared:
            streamed = isinstance(sources["train"], FirstExamples)  # which cannot be split
            split = "" if streamed else ", or write heldout: 10 %, which splits the rows"
            yield (
                f"{shared} of {len(rows)} held-out rows are also in data.train, which biases the "
                f"results upwards: remove them{split}"
            )


def _content(spec: TrainedSpec) -> Callable[[Any], int | None]:
    """A hash of what makes two examples the same row: the turns, the text, or all but the id.

    None for an example that is not a dataclass, or holds what cannot be hashed.
    """
    generated = spec.data.responses.by != "dataset"

    def of(example: Any) -> int | None:
        if isinstance(example, Conversation):
            asked = questions_of(example) if generated else example
            return hash(tuple((message.role, message.content) for message in asked.messages))
        if hasattr(example, "text"):
            return hash(example.text)
        try:
            return hash(replace(example, id=""))
        except TypeError:
            return None

    return of


def _added_text(source: DataSource, tokenizer: Any) -> str:
    """The text that the template renders before a first turn of the user, but for its role."""
    first = source.read()[0]
    if not isinstance(first, Conversation) or first.plain or first.messages[0].role != "user":
        return ""
    word = "kdcore"
    text, _ = render(first, [Message("user", word)], tokenizer)
    before = text.partition(word)[0]
    for token in sorted(tokenizer.all_special_tokens, key=len, reverse=True):
        before = before.replace(token, " ")
    before = " ".join(re.sub(r"<\|?[^<>]*?\|?>", " ", before).split())
    if len(re.findall(r"\w+", before)) <= _ROLE:
        return ""
    before = before.removesuffix(" user")
    return before if len(before) <= 120 else before[:117] + "..."
