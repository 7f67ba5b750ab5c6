"""The config of a new model, validated field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import CONFIG_MAPPING

from kdcore.errors import UserError, nearest


def new_config(asked: Mapping[str, Any], tokenizer: Any, labels: Sequence[str]) -> Any:
    """The transformers config of ``{model_type: ..., FIELD: VALUE}``.

    Args:
        asked: The model type and the fields of its config.
        tokenizer: Source of the vocabulary size and the special tokens that ``asked`` omits.
        labels: Labels of a classifier, by class; empty for a language model.

    Returns:
        The config.

    Raises:
        UserError: The type or a field is unknown, or a value is invalid.
    """
    fields = dict(asked)
    kind = fields.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"student.config.model_type '{kind}' is unknown to transformers",
            nearest(str(kind), CONFIG_MAPPING),
            "student.config.model_type",
        )
    known = CONFIG_MAPPING[kind]().to_dict().keys() - _DECIDED
    for name in fields:
        if name in _DECIDED or name not in known:
            raise UserError(
                f"student.config sets '{name}', which is not a settable field of {kind}",
                nearest(name, known),
                f"student.config.{name}",
            )
    if vocabulary := tokenizer.get_vocab():
        ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in _ENDS}
        told = {"vocab_size": max(vocabulary.values()) + 1, **ends}
        fields = {name: value for name, value in told.items() if name in known} | fields
    if labels:
        fields["id2label"], fields["label2id"] = numbered(labels)
    try:
        return CONFIG_MAPPING[kind](**fields)
    except Exception as fault:  # e.g. a division by a number of heads that is 0
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[-1].strip()
        raise UserError(
            f"student.config is invalid for {kind}: {reason}",
            "correct that field",
            "student.config",
        ) from fault


def numbered(labels: Sequence[str]) -> tuple[dict[int, str], dict[str, int]]:
    """The id2label and label2id of a config."""
    return dict(enumerate(labels)), {label: place for place, label in enumerate(labels)}


_ENDS = ("pad", "bos", "eos")
_DECIDED = {"id2label", "label2id", "architectures", "transformers_version", "model_type", "dtype"}
"""Fields that the data, other fields of the spec or transformers determine."""
