"""A config for a model that is made instead of loaded, with the user's mistakes told plainly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from kdcore.errors import UserError, nearest


def new_config(asked: Mapping[str, Any], tokenizer: Any, labels: Sequence[str]) -> Any:
    """The transformers config of ``{model_type: ..., its fields}``.

    tokenizer: gives the size of the vocabulary and the special tokens, unless asked otherwise.
    labels: a classifier's, by class; none of a language model.
    Raises UserError for an unknown type, an unknown field, and a value that cannot be.
    """
    fields = dict(asked)
    kind = fields.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"student.config.model_type: transformers knows no '{kind}'",
            nearest(str(kind), CONFIG_MAPPING),
        )
    known = CONFIG_MAPPING[kind]().to_dict().keys() - _DECIDED
    for name in fields:
        if name in _DECIDED or name not in known:
            raise UserError(
                f"student.config: a {kind} has no field '{name}' that a spec may set",
                nearest(name, known),
            )
    if vocabulary := tokenizer.get_vocab():
        ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in _ENDS}
        told = {"vocab_size": max(vocabulary.values()) + 1, **ends}
        fields = {name: value for name, value in told.items() if name in known} | fields
    if labels:
        fields["id2label"], fields["label2id"] = numbered(labels)
    try:
        return CONFIG_MAPPING[kind](**fields)
    except (ValueError, TypeError, StrictDataclassError) as fault:
        reason = str(fault).strip().splitlines()[-1].strip()
        raise UserError(
            f"student.config makes no {kind}: {reason}", "change the field it names"
        ) from fault


def numbered(labels: Sequence[str]) -> tuple[dict[int, str], dict[str, int]]:
    """Labels by class, and classes by label, as a config keeps them."""
    return dict(enumerate(labels)), {label: place for place, label in enumerate(labels)}


_ENDS = ("pad", "bos", "eos")
_DECIDED = {"id2label", "label2id", "architectures", "transformers_version", "model_type", "dtype"}
"""What the data, the spec's other fields or transformers itself say."""
