"""Loading of teachers, students and targets, with layer cuts, new models and LoRA adapters."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kdcore.errors import UserError, in_field
from kdcore.models.anatomy import layers_of
from kdcore.models.folder.config import (
    MULTI_LABEL,
    classifies,
    read_config,
    readable,
    refuse_unlike,
)
from kdcore.models.folder.files import (
    adapter_digest,
    adapter_folder,
    model_folder,
    weights_digest,
)
from kdcore.models.folder.new import new_config, numbered
from kdcore.models.folder.quantization import (
    compute_as_asked,
    from_quantised,
    method_of,
    outline_bytes,
    quantization_config,
    refuse_without_package,
)
from kdcore.models.folder.template import set_template
from kdcore.models.folder.weights import refuse_unusable_weights, weight_files
from kdcore.models.loading.adapters import with_adapters, with_saved_adapter
from kdcore.models.loading.cut import cut_layers
from kdcore.models.loading.loaded import LoadedModel, first_few
from kdcore.models.loading.placement import Placement, attention_arguments, dtype_of, refuse_float16
from kdcore.models.probes import pools_before_padding, refuse_bidirectional, refuse_reluctant
from kdcore.specs.distill import StudentSpec
from kdcore.specs.parts.fields import ModelSpec


def load_model(
    spec: ModelSpec,
    *,
    kind: Any = AutoModelForCausalLM,
    weights: bool = True,
    device: torch.device | None = None,
) -> LoadedModel:
    """Load a frozen model in evaluation mode.

    Args:
        spec: The model, its revision, dtype, place and so on.
        kind: The transformers class that loads it.
        weights: False loads shapes only, on the meta device, and does not download the weights of
            a hub model.
        device: The device to which the model moves, and on which it is probed, unless its spec
            names a place; None leaves it on the CPU.

    Returns:
        The model with its tokenizer.

    Raises:
        UserError: The model does not exist, is not a decoder-only model or a classifier, needs
            code from its repository, has only pickled weights, or lacks some of its weights; this
            machine lacks its device, or the package of its attention or quantisation.
    """
    loaded, missing = _load(spec, kind, weights, device)
    if missing:
        raise UserError(
            f"{spec.model} lacks weights of {type(loaded.model).__name__}: {first_few(missing)}",
            "use a model that was trained for this task",
        )
    if weights:
        set_padding(loaded.model, loaded.tokenizer)
    loaded.model.requires_grad_(False)
    return loaded


def already_loaded(model: PreTrainedModel) -> LoadedModel:
    """Wrap a model that the caller loaded with transformers.

    Args:
        model: A model whose ``name_or_path`` is a hub id or a folder; its tokenizer and its digest
            are read from there.

    Returns:
        The model with its tokenizer.

    Raises:
        UserError: The model has no ``name_or_path``, or its files do not exist.
    """
    place = model.name_or_path
    if not place:
        raise UserError(
            f"the {type(model).__name__} has no name_or_path, so it cannot be identified as the "
            "target of a drafter",
            "load the model with from_pretrained",
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
    multi_label: bool = False,
    classes: int | None = None,
    weights: bool = True,
    device: torch.device | None = None,
) -> LoadedModel:
    """Load, create or cut the student; all its weights (or adapters) are trainable.

    The weights of a new model come from torch's global generator.

    Args:
        spec: The student.
        teacher: The teacher, which a cut or copied student requires.
        kind: The transformers class that loads it.
        labels: Labels of a classifier, by class; a head that its files lack is created for them.
        multi_label: Whether a head that is created gives each label a probability of its own.
        classes: Number of classes of the models that teach it; a language model with more of them
            is cut to as many, or the rest would keep a probability that nothing teaches.
        weights: See `load_model`.
        device: See `load_model`; a cut or copied student is where its teacher is.

    Returns:
        The student with its tokenizer.

    Raises:
        UserError: As for `load_model`; or the config is invalid or adds a loss of the router, or
            the layers or the adapter targets do not exist.
    """
    if spec.model == "teacher":
        assert teacher is not None  # `DistillSpec` guarantees it
        cut = spec.layers is not None
        own = teacher if cut else replace(teacher, model=copy.deepcopy(teacher.model))
    elif spec.config is not None:
        own = _new(spec, teacher, kind, labels, weights, multi_label, device)
    else:
        own, _ = _load(spec, kind, weights, device, labels, multi_label)
    name, base, model, whole = own.name, own.digest, own.model, None
    if spec.layers is not None:
        whole = len(layers_of(model))
        with in_field("student.layers"):
            model = cut_layers(model, spec.layers)
        name = f"{name}, layers {spec.layers}"
        base = hashlib.sha256(f"{base}{spec.layers}".encode()).hexdigest()
    if classes is not None and not own.labels and own.classes > classes:
        model.resize_token_embeddings(classes)
    if weights:
        set_padding(model, own.tokenizer if teacher is None else teacher.tokenizer)
    _refuse_router_loss(model.config, name)
    _refuse_lengths(model.config, name)
    refuse_float16(model, name)
    if spec.model == "teacher" and spec.attention is not None:
        model.set_attn_implementation(attention_arguments(spec)["attn_implementation"])
    if spec.quantization is None:
        dtype = model.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype)
        cast(Any, model).to(dtype).requires_grad_(True)
    if spec.lora is not None:
        model = with_adapters(model.requires_grad_(False), spec.lora)
        # else the folder that was read, which may be this machine's copy of a GGUF file
        cast(Any, model).peft_config["default"].base_model_name_or_path = name
    return LoadedModel(model, own.tokenizer, name, base, own.kind, bytes=own.bytes, cut_from=whole)


def _refuse_router_loss(config: Any, name: str) -> None:
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise UserError(
            f"{name} sets output_router_logits, which adds a loss of its router in transformers: "
            "kdcore does not add it",
            "set output_router_logits: false in its config",
        )


def _refuse_lengths(config: Any, name: str) -> None:
    if config.model_type == "reformer":
        raise UserError(
            f"{name} is a Reformer, which trains only on rows whose length is a multiple of its "
            "chunk length",
            "choose a student of another family",
        )


def _load(
    spec: ModelSpec,
    kind: Any,
    weights: bool,
    device: torch.device | None,
    labels: Sequence[str] = (),
    multi_label: bool = False,
) -> tuple[LoadedModel, list[str]]:
    """The model, and the names of the weights missing from its files."""
    place = Placement.of(spec, device)
    folder = model_folder(spec, weights=weights)
    adapter = None if spec.adapter is None else adapter_folder(spec.adapter)
    config = read_config(folder, spec)
    if labels and not classifies(config):
        config.id2label, config.label2id = numbered(labels)
        config.problem_type = MULTI_LABEL if multi_label else config.problem_type
    refuse_unlike(config, kind, spec.model)
    asked = quantization_config(spec, config)
    stored = method_of(config)
    refuse_without_package(stored or "")
    quantised = asked is not None or stored is not None
    place.refuse_quantised(quantised, spec)
    if not weights:
        model = _outline(config, kind, spec)
        if Path(spec.model).is_dir() or weight_files(folder):  # else they are still on the hub
            refuse_unusable_weights(folder, model)
        size = from_quantised(
            spec, lambda: outline_bytes(model, asked, folder), quantised=quantised
        )
        tokenizer = _tokenizer(folder, model, spec)
        return LoadedModel(model, tokenizer, spec.model, "", kind, bytes=size), []
    weight_files(folder)  # refuses an index that leads out of the folder

    def read() -> Any:
        try:
            return kind.from_pretrained(
                folder,
                config=config,
                dtype=dtype_of(spec),
                use_safetensors=True,
                trust_remote_code=spec.trust_remote_code,
                output_loading_info=True,
                **({} if asked is None else {"quantization_config": asked}),
                **attention_arguments(spec),
                **place.arguments,
            )
        except RuntimeError:  # transformers' own about other shapes does not say which
            refuse_unusable_weights(folder, _outline(config, kind, spec))
            raise

    model, report = from_quantised(spec, read, quantised=quantised)
    compute_as_asked(model)
    tokenizer = _tokenizer(folder, model, spec)
    if adapter is not None:
        model = with_saved_adapter(model, adapter, spec)
    place.put(model)
    if kind is AutoModelForCausalLM:
        refuse_bidirectional(model, spec.model)
    files, digest = _digests(spec, folder, adapter)
    made = LoadedModel(model, tokenizer, spec.model, digest, kind, files=files, placed=place.is_own)
    return made, sorted(report["missing_keys"])


def digest_of(spec: ModelSpec) -> str:
    """The digest that `load_model` gives a model, from its files alone.

    Args:
        spec: The model.

    Returns:
        `LoadedModel.digest`.

    Raises:
        UserError: There is no such model.
    """
    adapter = None if spec.adapter is None else adapter_folder(spec.adapter)
    return _digests(spec, model_folder(spec), adapter)[1]


def _digests(spec: ModelSpec, folder: Path, adapter: Path | None) -> tuple[str, str]:
    """The digests of the files, and of the model as it is quantised."""
    files = weights_digest(folder)
    if adapter is not None:
        files = hashlib.sha256(f"{files}{adapter_digest(adapter)}".encode()).hexdigest()
    if spec.quantization is None:
        return files, files
    stated = json.dumps(spec.quantization, sort_keys=True)
    return files, hashlib.sha256(f"{files}{stated}".encode()).hexdigest()


def _new(
    spec: StudentSpec,
    teacher: LoadedModel | None,
    kind: Any,
    labels: Sequence[str],
    weights: bool,
    multi_label: bool,
    device: torch.device | None,
) -> LoadedModel:
    """A model with random weights, and the tokenizer of its spec or of the teacher."""
    asked = dict(spec.config or {})
    tokenizer: Any = teacher.tokenizer if teacher is not None else NoTokenizer()
    if spec.tokenizer is not None:
        named = ModelSpec.model_validate({"model": spec.tokenizer})
        folder = model_folder(named, weights=False)
        tokenizer = readable(lambda: AutoTokenizer.from_pretrained(folder), named)
        set_template(tokenizer, spec)
    config = new_config(asked, tokenizer, labels)
    config.problem_type = MULTI_LABEL if multi_label else config.problem_type
    refuse_unlike(config, kind, f"new {config.model_type}")
    if hasattr(config, "vocab_size") and not tokenizer.get_vocab():
        raise UserError(
            f"a new {config.model_type} needs a tokenizer, but the spec names neither a tokenizer "
            "nor a teacher that has one",
            "set student.tokenizer to a model that has a tokenizer",
        )
    named_by_config = f"new {config.model_type}"
    made = spec.model_copy(update={"model": named_by_config})
    if weights:
        arguments = attention_arguments(spec)
        dtype = dtype_of(spec, config)
        model = readable(lambda: kind.from_config(config, dtype=dtype, **arguments), made)
        Placement.of(spec, device).put(model)
        if kind is AutoModelForCausalLM:
            refuse_bidirectional(model, named_by_config)
    else:
        model = _outline(config, kind, made)
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return LoadedModel(model, tokenizer, named_by_config, digest, kind)


def _outline(config: Any, kind: Any, spec: ModelSpec) -> Any:
    """The model on the meta device."""
    arguments = attention_arguments(spec) | {"trust_remote_code": spec.trust_remote_code}
    with torch.device("meta"):
        model = readable(
            lambda: kind.from_config(config, dtype=dtype_of(spec, config), **arguments), spec
        )
    if kind is AutoModelForCausalLM:
        refuse_reluctant(model)
    return model


def _tokenizer(folder: Path, model: Any, spec: ModelSpec) -> Any:
    if model.main_input_name != "input_ids":
        return NoTokenizer()
    code = spec.trust_remote_code
    tokenizer: Any = readable(
        lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=code), spec
    )
    set_template(tokenizer, spec)
    return tokenizer


def set_padding(model: Any, tokenizer: Any) -> None:
    """Agree on the padding token of a decoder that classifies: it reads the last token before it.

    It is set after the model is built, since an embedding does not train its padding token. It is
    the tokenizer's, unless that also ends each row: then another special token is. A config whose
    padding token ends each row keeps it, as the model was trained to read the token before it.

    Args:
        model: The model; one that does not read the padding token of its config stays as it is.
        tokenizer: The tokenizer that encodes the model's rows.

    Raises:
        UserError: Neither of the two knows a token to pad with.
    """
    reads_text = "Classification" in type(model).__name__ and tokenizer.get_vocab()
    if not reads_text or not pools_before_padding(model):
        return
    last, special = tokenizer("a")["input_ids"][-1], tokenizer.all_special_ids
    known, own = model.config.pad_token_id, tokenizer.pad_token_id
    wanted = [known if known == last else None, own, tokenizer.eos_token_id, *special]
    able = [token for token in wanted if token is not None and token in (*special, own)]
    if not able:
        raise UserError(
            f"{type(model).__name__} reads the last token before the padding, but its tokenizer "
            "does not have a padding token or an end token",
            "set pad_token in its tokenizer_config.json",
        )
    pad = next((token for token in able if token != last or known == last), able[0])
    if pad != own:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    model.config.pad_token_id = pad


class NoTokenizer:
    """The tokenizer of an image model: an empty vocabulary, and nothing to save.

    With it, code that pads, compares vocabularies or saves need not distinguish image models.
    """

    pad_token_id = eos_token_id = chat_template = None
    model_input_names = ("pixel_values",)

    def get_vocab(self) -> dict[str, int]:
        """The empty vocabulary."""
        return {}

    def save_pretrained(self, folder: Any) -> None:
        """Do nothing."""
