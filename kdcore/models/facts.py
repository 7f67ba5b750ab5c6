"""Facts about a loaded model, and checks that rows fit its context.

Beyond its context, a model with learned positions fails; a model with rotary positions continues
at positions that it was never trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kdcore.components.construction import NamedModel
from kdcore.errors import UserError
from kdcore.models.anatomy import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdcore.method.records import Row
    from kdcore.models.loading.loaded import LoadedModel


def refuse_crossing(short: int | None, prompt: int, new: int, what: str = "a prompt") -> None:
    """Check that decoding cannot cross from LongRoPE's short factors to its long ones.

    The prefill runs all prompt tokens but the last; the last new token is never run.

    Args:
        short: See `kdcore.models.anatomy.short_length_of`.
        prompt: Number of prompt tokens of the longest row.
        new: Largest number of new tokens.
        what: Name of the prompt in the message.

    Raises:
        UserError: Decoding could cross.
    """
    if short is None or prompt - 1 > short or prompt + new - 1 <= short:
        return
    room = short - prompt + 1
    raise UserError(
        f"{what} of {prompt} tokens with {new} new tokens crosses position {short}, where LongRoPE "
        "changes the rotation of all positions, including those already computed",
        f"generate at most {room} new tokens, or use a prompt of at least {short + 2} tokens"
        if room > 0
        else f"use a prompt of at least {short + 2} tokens, or of fewer than {prompt}",
    )


def positions_of(row: Row) -> int:
    """The number of positions in a row: its tokens, or 1 for an input that is not text."""
    return len(row.inputs.get("input_ids", row.labels))


class Context(NamedTuple):
    """How much a model reads at once.

    Attributes:
        name: Name of the model in messages.
        length: See `kdcore.models.anatomy.context_of`.
    """

    name: str
    length: int | None

    @classmethod
    def of(cls, loaded: LoadedModel) -> Context:
        """Look at all modules of a model: do it once, not for each row."""
        return cls(loaded.name, context_of(loaded.model))


def refuse_longer(id: str, positions: int, contexts: Iterable[Context]) -> None:
    """Check that a row fits the context of every model.

    Args:
        id: Name of the row in the message.
        positions: Number of positions of the row.
        contexts: The contexts of the models that read the row.

    Raises:
        UserError: The row is longer than the context of a model.
    """
    for name, length in contexts:
        if length is not None and positions > length:
            raise UserError(
                f"{id} has {positions} tokens, but the context of {name} is {length}",
                f"set data.max_length to {length} to truncate longer rows, or use a model with a "
                "longer context",
            )


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Size and architecture of a model.

    Attributes:
        name: Name of the model in messages.
        architecture: Name of its transformers class.
        classes: Number of classes V of its logits.
        hidden: Hidden width, of the last stage where the stages differ.
        layers: Number of layers, of all stages together.
        cut_from: Number of layers of the model that a student was cut from, or None.
        parameters: Number of parameters; tied weights count once.
        context: Context length in tokens; None for image models and the like.
    """

    name: str
    architecture: str
    classes: int
    hidden: int
    layers: int
    parameters: int
    context: int | None
    cut_from: int | None = None


def dtype_name(model: PreTrainedModel) -> str:
    """The dtype of a model's weights as a spec writes it, e.g. bfloat16."""
    return str(model.dtype).removeprefix("torch.")


def describe_model(loaded: LoadedModel) -> ModelFacts:
    """The facts of a model, which may be without weights."""
    text: Any = loaded.model.config.get_text_config()
    # image models with several stages have lists
    widths, depths = getattr(text, "hidden_sizes", [0]), getattr(text, "depths", [0])
    return ModelFacts(
        name=loaded.name,
        architecture=type(loaded.model).__name__,
        classes=loaded.classes,
        hidden=getattr(text, "hidden_size", widths[-1]),
        layers=getattr(text, "num_hidden_layers", sum(depths)),
        parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
        context=context_of(loaded.model),
        cut_from=loaded.cut_from,
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """The sha256 of a tokenizer's tokens and their ids."""
    ids = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def refuse_other_tokenizer(draft: NamedModel, target: NamedModel, field: str) -> None:
    """Check that a model which drafts has the target's tokens.

    Args:
        draft: The model that drafts.
        target: The target.
        field: What names the draft model in the spec.

    Raises:
        UserError: Their tokenizers differ.
    """
    if tokenizer_digest(draft.tokenizer) != tokenizer_digest(target.tokenizer):
        raise UserError(
            f"{draft.name} and {target.name} have different tokenizers",
            f"set {field} to a small model of the target's family",
        )


_PIECE = "\ufffd"
"""What a tokenizer decodes a piece of a character to."""
_MOST_PIECES = 8
"""Tokens that are tried together: a character has up to four bytes, and the next may begin too."""


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to a text before it.

    A tokenizer such as Llama 2's leaves out the space before the first token that it decodes, so
    each token is decoded after itself. A character that is cut into several tokens belongs to the
    last of them.

    Args:
        tokenizer: The tokenizer.
        tokens: Token ids, which need not be a text together.

    Returns:
        The texts, in order.
    """

    def text(run: Sequence[int]) -> str:
        added: str = tokenizer.decode([*run, *run]).removeprefix(tokenizer.decode([*run]))
        return added

    texts = [text([token]) for token in tokens]
    for start, found in enumerate(texts):
        for stop in range(start + 2, min(start + _MOST_PIECES, len(tokens)) + 1):
            if _PIECE not in found:
                break
            whole = text(tokens[start:stop])
            if _PIECE not in whole:
                texts[start:stop] = [*[""] * (stop - start - 1), whole]
                break
    return texts


def end_ids(loaded: LoadedModel) -> list[int]:
    """The token ids that end a response, from the generation_config and the tokenizer.

    Raises:
        UserError: One of them is not a number.
    """
    config: Any = loaded.model.generation_config
    known = config.eos_token_id
    own = known if isinstance(known, list) else [known]
    if not all(each is None or isinstance(each, int) for each in own):
        raise UserError(
            f"eos_token_id of {loaded.name} is {known!r}, not a token id",
            "fix generation_config.json or config.json in the model's folder",
        )
    return sorted({*own, loaded.tokenizer.eos_token_id} - {None})


def not_finite(name: str) -> UserError:
    """The error of a model whose logits contain NaN or infinity.

    Args:
        name: Name of the model.

    Returns:
        The error to raise.
    """
    return UserError(
        f"the logits of {name} contain NaN or infinite values",
        "check its weights; in float16 or bfloat16, try float32 (dtype: float32)",
    )
