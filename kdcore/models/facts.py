"""How many positions a model reads, and rows that have more, which are refused.

Beyond them a model with learned positions fails, and one with rotary positions goes on, where it
was never trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import (
    PreTrainedModel,
)

from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.models.anatomy import context_of
from kdcore.models.loaded import LoadedModel

if TYPE_CHECKING:
    from kdcore.models.loaded import LoadedModel


def refuse_crossing(short: int | None, prompt: int, new: int, what: str = "a prompt") -> None:
    """Raises UserError when decoding could cross from LongRoPE's short factors to its long ones.

    short: see `short_length_of`. prompt, new: tokens, of the longest row. Of the prompt all but
    the last are run at first, and of the new ones all but the last at all.
    """
    if short is None or prompt - 1 > short or prompt + new - 1 <= short:
        return
    room = short - prompt + 1
    raise UserError(
        f"{what} of {prompt} tokens and {new} new ones pass position {short}, where LongRoPE "
        "begins to turn every position otherwise, also those that are computed already",
        f"ask for at most {room} new tokens, or begin with {short + 2} tokens or more"
        if room > 0
        else f"begin with {short + 2} tokens or more, or with fewer than {prompt}",
    )


def positions_of(row: Row) -> int:
    """How many positions a model reads: tokens, or one where the input is no text."""
    return len(row.inputs.get("input_ids", row.labels))


def refuse_longer(id: str, positions: int, models: Sequence[LoadedModel]) -> None:
    """Raises UserError when one of the models reads fewer positions than the row ``id`` has."""
    for loaded in models:
        context = context_of(loaded.model)
        if context is not None and positions > context:
            raise UserError(
                f"{id} gives {loaded.name} {positions} tokens, and its context is {context}",
                f"set data.max_length to {context}, which cuts longer rows, or name a model that "
                "reads more",
            )


def refuse_long_rows(rows: Sequence[Row], models: Sequence[LoadedModel]) -> None:
    """Raises UserError when one of the models reads fewer positions than the longest row has."""
    longest = max(rows, key=positions_of)
    refuse_longer(longest.id, positions_of(longest), models)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model is. parameters counts tied weights once; classes is V.

    hidden: the last width; context: the longest row in tokens, None of images and the like.
    """

    name: str
    architecture: str
    classes: int
    hidden: int
    layers: int
    parameters: int
    context: int | None


def dtype_name(model: PreTrainedModel) -> str:
    """What a model computes in, as a spec names it, e.g. bfloat16."""
    return str(model.dtype).removeprefix("torch.")


def describe_model(loaded: LoadedModel) -> ModelFacts:
    """What a model is, with or without its weights."""
    text: Any = loaded.model.config.get_text_config()
    # image models of several stages have a list of each
    widths, depths = getattr(text, "hidden_sizes", [0]), getattr(text, "depths", [0])
    return ModelFacts(
        name=loaded.name,
        architecture=type(loaded.model).__name__,
        classes=loaded.classes,
        hidden=getattr(text, "hidden_size", widths[-1]),
        layers=getattr(text, "num_hidden_layers", sum(depths)),
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        context=context_of(loaded.model),
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of the tokens and their ids."""
    ids = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def end_ids(loaded: LoadedModel) -> list[int]:
    """The tokens that end a response: those of the model's generation_config and tokenizer."""
    config: Any = loaded.model.generation_config
    known = config.eos_token_id
    own = known if isinstance(known, list) else [known]
    return sorted({*own, loaded.tokenizer.eos_token_id} - {None})
