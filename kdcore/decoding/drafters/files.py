"""The folder of a trained drafter: config.json and drafter.safetensors.

The config names the component and its params, from which it is rebuilt, and the target that it was
trained for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from kdcore.components.choice import Choice
from kdcore.components.registry import Registry
from kdcore.decoding.drafters.stored_weights import take_weights
from kdcore.decoding.protocols import Drafter, TrainedDrafter
from kdcore.errors import UserError, first_line
from kdcore.models.anatomy import context_of
from kdcore.models.assembly import Assembly
from kdcore.models.facts import tokenizer_digest
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.whole_files import whole, write_text
from kdcore.specs.parts.decoding import DraftingSpec
from kdcore.specs.reading.mistakes import mistakes

FORMAT = 1
"""Version of the folder format."""

CONFIG, WEIGHTS = "config.json", "drafter.safetensors"
SLACK = 1 << 24
"""Number of elements that binding may allocate beyond twice those of the weights."""


class _Target(BaseModel):
    name: str


class _Trained(BaseModel):
    template: str | None
    feature_rms: list[float]
    figures: dict[str, float]


class _Said(BaseModel):
    """The fields of a config that are read, besides its format; others are allowed."""

    drafter: dict[str, Any]
    plugin: str
    layers: list[int]
    target: _Target
    trained: _Trained


def save_drafter(
    folder: Path,
    drafter: TrainedDrafter,
    choice: Choice,
    target: LoadedModel,
    registry: Registry,
    *,
    template: str | None = None,
    feature_rms: Sequence[float] = (),
    figures: Mapping[str, float] | None = None,
) -> None:
    """Write a drafter that is bound to its target.

    Args:
        folder: The folder to write.
        drafter: The drafter.
        choice: The component and its params.
        target: The target.
        registry: The registry in which components are found.
        template: `template_digest` of the target in training. `kdcore.evaluation.doctor` compares
            this and the two following values.
        feature_rms: Root mean square of the features of each layer in training.
        figures: Results on the held-out rows.
    """
    plugin = registry.plugin_of("drafter", choice.name)
    config = {
        "kdcore_drafter": FORMAT,
        "drafter": choice.dump(),
        "plugin": f"{plugin.distribution}=={plugin.version}",
        "depth": drafter.depth,
        "layers": list(drafter.layers),
        "target": _facts(target),
        "trained": {
            "template": template,
            "feature_rms": list(feature_rms),
            "figures": dict(figures or {}),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: each.detach().contiguous() for name, each in drafter.state_dict().items()}
    with whole(folder / WEIGHTS) as place:
        save_file(weights, place, metadata={"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def drafter_digest(folder: Path) -> str:
    """The sha256 of a drafter's config and weights."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    with (folder / WEIGHTS).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_drafter(
    folder: Path, target: LoadedModel, registry: Registry, *, dtype: torch.dtype | None = None
) -> Drafter:
    """Load a drafter and bind it to its target.

    Args:
        folder: The folder of the drafter.
        target: The target. For a target without weights, the drafter has its own weights only,
            until the caller gives the target its embedding and head.
        registry: The registry in which components are found.
        dtype: The dtype of the weights (default: as stored).

    Returns:
        The drafter in eval mode, ready to propose.

    Raises:
        UserError: The folder does not contain a drafter or is damaged, the plugin is not
            installed, or the drafter was trained for another target or tokenizer.
    """
    config = read_config(folder)
    _refuse_other_target(folder, config, target)
    choice = _choice_in(config, folder, registry)
    drafter: Any = Assembly(registry).build(choice)
    if not hasattr(drafter, "load_state_dict"):
        raise UserError(
            f"{folder / CONFIG} names the drafter '{choice.name}', which does not have weights",
            "use that drafter by name instead of a folder, or download the folder again",
        )
    _bind(folder, config, drafter, target)
    if list(drafter.layers) != config["layers"]:
        raise UserError(
            f"the drafter in {folder} was trained on the hidden states {config['layers']}, but as "
            f"{CONFIG} describes it, it reads {list(drafter.layers)}",
            f"install {config['plugin']}, which it was trained with, or restore the original "
            f"{CONFIG}",
        )
    try:
        own = load_file(folder / WEIGHTS)
        # tensors on the meta device cannot be copied into
        take_weights(drafter, own, target, config["drafter"], assign=not target.has_weights)
    except (OSError, SafetensorError, ValueError) as fault:
        raise _no_weights(folder, fault) from fault
    drafter.eval()
    if target.has_weights:
        drafter.to(target.model.device, dtype)
    loaded: Drafter = drafter
    return loaded


def saved_choice(folder: Path, registry: Registry) -> Choice:
    """The component and params of a drafter's folder.

    Args:
        folder: The folder of the drafter.
        registry: The registry in which components are found.

    Returns:
        The choice, as in a spec.

    Raises:
        UserError: The folder does not contain a drafter, or its plugin is not installed.
    """
    return _choice_in(read_config(folder), folder, registry)


def _choice_in(config: Mapping[str, Any], folder: Path, registry: Registry) -> Choice:
    return drafter_choice(
        config["drafter"],
        registry,
        f"{folder / CONFIG} names the drafter '{config['drafter'].get('name')}' of "
        f"{config['plugin']}, which this environment cannot build",
        f"install {config['plugin']}, or download the folder again",
    )


def drafter_choice(given: Any, registry: Registry, cause: str, cure: str) -> Choice:
    """Validate the component and params of a drafter.

    Args:
        given: A mapping of the name and the params.
        registry: The registry in which components are found.
        cause: Cause of the error, to which the first mistake is appended.
        cure: Cure of the error.

    Returns:
        The choice.

    Raises:
        UserError: The mapping is invalid.
    """
    try:
        spec = DraftingSpec.model_validate({"drafter": given}, context={"registry": registry})
    except ValidationError as wrong:
        first = mistakes(wrong, DraftingSpec)[0]
        raise UserError(f"{cause}: {first.dotted} {first.what}", cure) from wrong
    assert spec.drafter is not None, "validated above"
    return spec.drafter


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a drafter's folder.

    Args:
        folder: The folder of the drafter.

    Returns:
        The validated config.

    Raises:
        UserError: The folder does not contain a drafter, or has another format.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
        known = config["kdcore_drafter"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{folder} does not contain a drafter",
            "use the folder drafter/ of a train-drafter run",
        ) from None
    if known != FORMAT:
        raise UserError(
            f"{path} has drafter format {known}, but this version of kdcore reads format {FORMAT}",
            "install the version of kdcore that wrote it",
        )
    try:
        _Said.model_validate(config, strict=True)
    except ValidationError as wrong:
        place = ".".join(map(str, wrong.errors()[0]["loc"]))
        raise _bad_field(path, place) from None
    sizes = config["trained"]["feature_rms"]
    if sizes and len(sizes) != len(config["layers"]):
        raise _bad_field(path, "trained.feature_rms")
    return dict(config)


def _bad_field(path: Path, field: str) -> UserError:
    return UserError(f"field {field} of {path} is missing or invalid", "download the folder again")


def differences(config: Mapping[str, Any], target: LoadedModel) -> list[str]:
    """Compare a target with the one that a drafter was trained for.

    Args:
        config: The config of the drafter.
        target: The target.

    Returns:
        What differs, as a message says it.
    """
    trained, here = config["target"], _facts(target)
    differ = [name for name in here if name != "name" and trained.get(name) != here[name]]
    return [_SHOWN.get(name, name) for name in differ]


def template_digest(target: LoadedModel) -> str:
    """The sha256 of a target's chat template."""
    tokenizer: Any = target.tokenizer
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def _facts(target: LoadedModel) -> dict[str, Any]:
    text = target.model.config.get_text_config()
    return {
        "name": target.name,
        "digest": target.files or target.digest,
        "tokenizer": tokenizer_digest(target.tokenizer),
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
    }


_SHOWN = {"digest": "weights or config", "tokenizer": "tokens"}
"""Facts of a target whose values are hashes -> what differs when they do."""


def _refuse_other_target(folder: Path, config: dict[str, Any], target: LoadedModel) -> None:
    differ = differences(config, target)
    if differ:
        trained = config["target"]["name"]
        raise UserError(
            f"the drafter in {folder} was trained for {trained}, which differs from {target.name} "
            f"in {' and '.join(differ)}",
            "use the target that it was trained for, or train a drafter for this target",
        )


def _bind(folder: Path, config: dict[str, Any], drafter: Any, target: LoadedModel) -> None:
    """Bind the drafter, unless its config implies a size far above that of its weights."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as opened:
            names = opened.keys()  # not a mapping, so it cannot be iterated over
            stored = sum(prod(opened.get_slice(name).get_shape()) for name in names)
    except (OSError, SafetensorError) as fault:
        raise _no_weights(folder, fault) from fault
    context = context_of(target.model)
    most = stored if context is None else min(stored, context)
    saved = config.get("depth", drafter.depth)
    if drafter.depth != saved or drafter.depth > most:
        raise UserError(
            f"{folder / CONFIG} describes a drafter of {drafter.depth} levels, but its weights "
            f"have {saved}"
            if drafter.depth != saved
            else f"{folder / CONFIG} describes a drafter of {drafter.depth} levels, more than "
            f"{most}, {'its number of weights' if most == stored else 'the context of its target'}",
            f"restore the original {CONFIG}, or download the folder again",
        )
    limit = 2 * stored + SLACK
    too_large = UserError(
        f"{folder / CONFIG} describes a drafter of more than {limit} weights, but {WEIGHTS} "
        f"contains {stored}",
        f"restore the original {CONFIG}, or download the folder again",
    )
    with _AtMost(limit, too_large):
        drafter.bind(target.model, target.tokenizer)


class _AtMost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that raises ``fault`` before tensors of more than ``left`` elements are allocated."""

    def __init__(self, left: int, fault: UserError) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left, self.fault = left, fault

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.empty.memory_format:
            self.left -= prod(args[0])
            if self.left < 0:
                raise self.fault
        return func(*args, **(kwargs or {}))


def _no_weights(folder: Path, fault: Exception) -> UserError:
    return UserError(
        f"{folder / WEIGHTS} does not contain this drafter's weights: {first_line(fault)}",
        f"restore the {CONFIG} and {WEIGHTS} that were saved together, or download the folder "
        "again",
    )
