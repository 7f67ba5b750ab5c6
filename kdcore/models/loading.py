"""Teachers and students: loaded, made new, cut, given adapters, described, compared."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from kdcore.errors import UserError
from kdcore.models.cut import cut_layers
from kdcore.models.files import model_folder, weights_digest
from kdcore.models.loaded import LoadedModel, first_few
from kdcore.models.new import new_config, numbered
from kdcore.specs.distill import LoraSpec, StudentSpec
from kdcore.specs.fields import ModelSpec

T = TypeVar("T")


def load_model(
    spec: ModelSpec, *, kind: Any = AutoModelForCausalLM, weights: bool = True
) -> LoadedModel:
    """Load a frozen model in evaluation mode.

    weights: False leaves them on the meta device, where they have sizes but no values, and hub
        models' are not fetched; `load_student` does the same then.
    Raises UserError when it is not there, is no decoder-only model or classifier, needs code of
    its repository to be run, has only pickled weights, or lacks some of its weights.
    """
    loaded, missing = _load(spec, kind, weights)
    if missing:
        raise UserError(
            f"{spec.model} lacks weights of {type(loaded.model).__name__}: {first_few(missing)}",
            "name a model that was trained for this",
        )
    loaded.model.requires_grad_(False)
    return loaded


def already_loaded(model: PreTrainedModel) -> LoadedModel:
    """A model that transformers loaded itself, from a folder or the hub's cache, as ours are.

    Its tokenizer and files are taken from where it says that it came from.
    Raises UserError when it says no place, or there is nothing.
    """
    place = model.name_or_path
    if not place:
        raise UserError(
            f"the {type(model).__name__} came from no folder and no hub, and so cannot be "
            "recognised as the target of a drafter",
            "load it with from_pretrained",
        )
    spec = ModelSpec.model_validate({"model": str(place)})
    folder = model_folder(spec)
    return LoadedModel(model, _tokenizer(folder, model, spec), spec.model, weights_digest(folder))


def load_student(
    spec: StudentSpec,
    teacher: LoadedModel | None,
    *,
    kind: Any = AutoModelForCausalLM,
    labels: Sequence[str] = (),
    weights: bool = True,
) -> LoadedModel:
    """Load, make or cut the student, all its weights (or adapters) trainable.

    A new model's weights are drawn from torch's global generator. A classifier's head that its
    files lack is new too, with these labels.
    Raises UserError as `load_model` does, for a config that makes no model, and for layers or
    adapter targets that do not exist.
    """
    if spec.model == "teacher":
        assert teacher is not None  # `DistillSpec` sees to it
        cut = spec.layers is not None
        own = teacher if cut else replace(teacher, model=copy.deepcopy(teacher.model))
    elif spec.config is not None:
        own = _new(spec, teacher, kind, labels, weights)
    else:
        own, _ = _load(spec, kind, weights, labels)
    name, base, model = own.name, own.digest, own.model
    if spec.layers is not None:
        model = cut_layers(model, spec.layers)
        name = f"{name}, layers {spec.layers}"
        base = hashlib.sha256(f"{base}{spec.layers}".encode()).hexdigest()
    model = model.to(getattr(torch, spec.dtype)).requires_grad_(True)
    if spec.lora is not None:
        model = _with_adapters(model, spec.lora)
    return LoadedModel(model, own.tokenizer, name, base, own.kind)


def _load(
    spec: ModelSpec, kind: Any, weights: bool, labels: Sequence[str] = ()
) -> tuple[LoadedModel, list[str]]:
    """The model, and the names of the weights that its files lack."""
    folder = model_folder(spec, weights=weights)
    config = _config(folder, spec)
    code = spec.trust_remote_code
    if labels and not _classifies(config):
        config.id2label, config.label2id = numbered(labels)
    if not weights:
        model = _outline(config, kind, spec)
        return LoadedModel(model, _tokenizer(folder, model, spec), spec.model, "", kind), []
    model, report = _readable(
        lambda: kind.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, spec.dtype),
            use_safetensors=True,
            trust_remote_code=code,
            output_loading_info=True,
        ),
        spec,
    )
    tokenizer = _tokenizer(folder, model, spec)
    _set_padding(model, tokenizer, kind)
    loaded = LoadedModel(model, tokenizer, spec.model, weights_digest(folder), kind)
    return loaded, sorted(report["missing_keys"])


def _new(
    spec: StudentSpec,
    teacher: LoadedModel | None,
    kind: Any,
    labels: Sequence[str],
    weights: bool,
) -> LoadedModel:
    """A model of random weights, with the tokenizer that its spec names or the teacher's."""
    asked = dict(spec.config or {})
    tokenizer: Any = teacher.tokenizer if teacher is not None else NoTokenizer()
    if spec.tokenizer is not None:
        named = ModelSpec.model_validate({"model": spec.tokenizer})
        folder = model_folder(named, weights=False)
        tokenizer = _readable(lambda: AutoTokenizer.from_pretrained(folder), named)
    config = new_config(asked, tokenizer, labels)
    if hasattr(config, "vocab_size") and not tokenizer.get_vocab():
        raise UserError(
            f"a new {config.model_type} reads tokens, and nothing says which tokenizer makes them",
            "set student.tokenizer to a model that has one",
        )
    named_by_config = f"new {config.model_type}"
    made = spec.model_copy(update={"model": named_by_config})
    if weights:
        model = _readable(lambda: kind.from_config(config, dtype=getattr(torch, spec.dtype)), made)
    else:
        model = _outline(config, kind, made)
    _set_padding(model, tokenizer, kind)
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return LoadedModel(model, tokenizer, named_by_config, digest, kind)


def _outline(config: Any, kind: Any, spec: ModelSpec) -> Any:
    """The model on the meta device."""
    dtype, code = getattr(torch, spec.dtype), spec.trust_remote_code
    with torch.device("meta"):
        return _readable(
            lambda: kind.from_config(config, dtype=dtype, trust_remote_code=code), spec
        )


def _tokenizer(folder: Path, model: Any, spec: ModelSpec) -> Any:
    if model.main_input_name != "input_ids":
        return NoTokenizer()
    code = spec.trust_remote_code
    return _readable(lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=code), spec)


def _set_padding(model: Any, tokenizer: Any, kind: Any) -> None:
    """Tell a decoder that classifies what padding is: it looks for the last token before it.

    Set after the model was made, since an embedding does not learn a padding token.
    """
    if kind is not AutoModelForCausalLM and getattr(model.config, "pad_token_id", None) is None:
        pad = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.eos_token_id if pad is None else pad


def _config(folder: Path, spec: ModelSpec) -> Any:
    config = _readable(
        lambda: AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code), spec
    )
    if config.is_encoder_decoder:
        raise UserError(
            f"{spec.model} is a sequence-to-sequence model ({config.model_type})",
            "name a decoder-only language model",
        )
    return config


def _readable(read: Callable[[], T], spec: ModelSpec) -> T:
    """What transformers reads, or its complaint in one line."""
    try:
        return read()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as fault:
        reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0]
        if "trust_remote_code" in str(fault):
            raise UserError(
                f"{spec.model} is made by code in its own repository, which is not run unasked",
                "read that code, then set trust_remote_code: true",
            ) from fault
        raise UserError(
            f"transformers cannot read {spec.model}: {reason}",
            "name a folder or hub id with config.json, a tokenizer and safetensors weights",
        ) from fault


def _classifies(config: Any) -> bool:
    return any("Classification" in name for name in config.architectures or [])


def _with_adapters(model: Any, lora: LoraSpec) -> Any:
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # a float works, its hint says int
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type="SEQ_CLS" if model.get_output_embeddings() is None else "CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as fault:
        raise UserError(
            f"student.lora.targets {lora.targets} fits no module of {type(model).__name__}",
            "use all-linear, or names such as q_proj and v_proj",
        ) from fault


class NoTokenizer:
    """What a model of images has where one of text has its tokenizer: no tokens, nothing to save.

    So whoever pads, compares vocabularies or saves need not ask which of both it is.
    """

    pad_token_id = eos_token_id = chat_template = None
    model_input_names = ("pixel_values",)

    def get_vocab(self) -> dict[str, int]:
        """No token."""
        return {}

    def save_pretrained(self, folder: Any) -> None:
        """Writes nothing."""
