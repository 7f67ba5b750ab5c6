"""The chat template of a model: its own or a file's, with the arguments that the spec sets.

The arguments become part of the template, as defaults. So the rows of a run, its caches and
drafters, and the saved model, whatever serves it, all know one template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdcore.errors import UserError, not_utf8, unreadable
from kdcore.specs.parts.fields import ModelSpec


def set_template(tokenizer: Any, spec: ModelSpec) -> None:
    """Set the chat template of a tokenizer as a spec says.

    Args:
        tokenizer: The tokenizer, which is changed.
        spec: The model, with its template and the arguments of the template.

    Raises:
        UserError: The file cannot be read, or the model has no template for the arguments.
    """
    if spec.template is not None:
        tokenizer.chat_template = _read(spec.template)
    if not spec.template_arguments:
        return
    own = tokenizer.chat_template
    if own is None:
        raise UserError(
            f"{spec.model} does not have a chat template, so template_arguments has no use",
            "name a template (template: FILE), or remove template_arguments",
        )
    defaults = "".join(map(_default, spec.template_arguments.items()))
    tokenizer.chat_template = (
        {name: defaults + text for name, text in own.items()}
        if isinstance(own, dict)
        else defaults + own
    )


def _default(argument: tuple[str, Any]) -> str:
    """Jinja code that sets an argument unless the caller of the template sets it."""
    name, value = argument
    return f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"


def _literal(value: Any) -> str:
    """Plain data as Jinja writes it: numbers, texts, lists and mappings are those of JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as fault:
        raise unreadable(path, fault, "the spec's folder (template)") from fault
    except UnicodeDecodeError as fault:
        raise not_utf8(path, fault) from fault
