"""A trained drafter as a folder: config.json and drafter.safetensors.

The config names the component and its params, which build it again, and the target that it was
trained for, without which it is worth nothing.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from kdcore.errors import UserError
from kdcore.method.choice import Choice
from kdcore.method.protocols import Drafter, TrainedDrafter
from kdcore.method.registry import Registry
from kdcore.models.anatomy import context_of
from kdcore.models.assembly import Assembly
from kdcore.models.facts import tokenizer_digest
from kdcore.models.loaded import LoadedModel
from kdcore.runs.whole_files import whole, write_whole
from kdcore.specs.decoding import DraftingSpec
from kdcore.specs.reading.mistakes import mistakes

FORMAT = 1
"""The version of the folder."""

CONFIG, WEIGHTS = "config.json", "drafter.safetensors"
LONGEST = 200
"""Characters of a cause that is told: a state dict may lack every weight."""
SLACK = 1 << 24
"""Elements that a drafter may take, beside twice those of its weights, while it is bound."""


class _Target(BaseModel):
    name: str


class _Trained(BaseModel):
    template: str | None
    feature_rms: list[float]
    figures: dict[str, float]


class _Said(BaseModel):
    """What is read of a config, beside its format; more may stand there."""

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
    """Write a drafter that was bound to the target.

    Of its training, as far as it is known: template: `template_digest` of the target's;
    feature_rms: the root mean square of each layer's features; figures: on the held-out rows.
    `kdcore.evaluation.doctor` compares with them.
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
    write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def drafter_digest(folder: Path) -> str:
    """The sha256 of what a drafter's folder drafts with."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    with (folder / WEIGHTS).open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_drafter(
    folder: Path, target: LoadedModel, registry: Registry, *, dtype: torch.dtype | None = None
) -> Drafter:
    """A drafter bound to the target, ready to propose.

    dtype: of its weights; None leaves them as they are stored.

    Of a target without weights it has its own only: whoever loads it so gives that target its
    embedding and head, and with them the drafter.
    Raises UserError when the folder holds none or a damaged one, when its plugin is not installed,
    or when it was trained for another target or tokenizer.
    """
    config = read_config(folder)
    _refuse_other_target(folder, config, target)
    choice = _choice_in(config, folder, registry)
    drafter: Any = Assembly(registry).build(choice)
    if not hasattr(drafter, "load_state_dict"):
        raise UserError(
            f"{folder / CONFIG} names the drafter '{choice.name}', which has no weights",
            "name that drafter itself instead of a folder, or fetch the folder again",
        )
    _bind(folder, config, drafter, target)
    if list(drafter.layers) != config["layers"]:
        raise UserError(
            f"the drafter in {folder} was trained on the hidden states {config['layers']}, and now "
            f"reads {list(drafter.layers)}",
            f"install {config['plugin']}, which it was trained with",
        )
    try:
        own = load_file(folder / WEIGHTS)
        refuse_other_numbers(own, drafter, target)
        # on the meta device there is nothing to copy them into
        drafter.load_state_dict(own, assign=not target.has_weights)
    except (OSError, SafetensorError, RuntimeError, ValueError) as fault:
        raise _no_weights(folder, fault) from fault
    drafter.eval()
    if target.has_weights:
        drafter.to(target.model.device, dtype)
    loaded: Drafter = drafter
    return loaded


def saved_choice(folder: Path, registry: Registry) -> Choice:
    """The drafter that a folder holds, as a spec names one.

    Raises UserError when the folder holds none, or its plugin is not installed.
    """
    return _choice_in(read_config(folder), folder, registry)


def _choice_in(config: Mapping[str, Any], folder: Path, registry: Registry) -> Choice:
    return drafter_choice(
        config["drafter"],
        registry,
        f"{folder / CONFIG} names the drafter '{config['drafter'].get('name')}' of "
        f"{config['plugin']}, which this environment cannot build",
        f"install {config['plugin']}, or fetch the folder again",
    )


def drafter_choice(given: Any, registry: Registry, cause: str, cure: str) -> Choice:
    """The drafter that a config gives, a mapping of its name and params.

    Raises UserError of this cause, with the first mistake in it, and this cure.
    """
    try:
        spec = DraftingSpec.model_validate({"drafter": given}, context={"registry": registry})
    except ValidationError as wrong:
        first = mistakes(wrong, DraftingSpec)[0]
        raise UserError(f"{cause}: {first.dotted} {first.what}", cure) from wrong
    assert spec.drafter is not None, "which was given"
    return spec.drafter


def read_config(folder: Path) -> dict[str, Any]:
    """What a drafter folder says of itself.

    Raises UserError when it is none, or of another format.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
        known = config["kdcore_drafter"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{folder} holds no drafter",
            "name the folder drafter/ of a train-drafter run",
        ) from None
    if known != FORMAT:
        raise UserError(
            f"{path} is of format {known}, and this kdcore reads {FORMAT}", "install another kdcore"
        )
    try:
        _Said.model_validate(config, strict=True)
    except ValidationError as wrong:
        place = ".".join(map(str, wrong.errors()[0]["loc"]))
        raise UserError(f"{path} does not say its {place}", "fetch the folder again") from None
    sizes = config["trained"]["feature_rms"]
    if sizes and len(sizes) != len(config["layers"]):
        raise UserError(f"{path} does not say its trained.feature_rms", "fetch the folder again")
    return dict(config)


def differences(config: Mapping[str, Any], target: LoadedModel) -> list[str]:
    """In what a target differs from the one that a drafter folder was trained for."""
    trained, here = config["target"], _facts(target)
    return [name for name in here if name != "name" and trained.get(name) != here[name]]


def template_digest(target: LoadedModel) -> str:
    """sha256 of the chat template."""
    tokenizer: Any = target.tokenizer
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def _facts(target: LoadedModel) -> dict[str, Any]:
    text = target.model.config.get_text_config()
    return {
        "name": target.name,
        "digest": target.digest,
        "tokenizer": tokenizer_digest(target.tokenizer),
        "hidden_size": text.hidden_size,
        "num_hidden_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
    }


def _refuse_other_target(folder: Path, config: dict[str, Any], target: LoadedModel) -> None:
    differ = differences(config, target)
    if differ:
        trained = config["target"]["name"]
        raise UserError(
            f"the drafter in {folder} was trained for {trained}, and {target.name} is another: its "
            f"{' and '.join(differ)} differ",
            "decode with the target that it was trained for, or train one for this target",
        )


def _bind(folder: Path, config: dict[str, Any], drafter: Any, target: LoadedModel) -> None:
    """As long as the drafter is about as large as its weights, whatever its config claims."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as opened:
            names = opened.keys()  # no mapping: it cannot be iterated over
            stored = sum(prod(opened.get_slice(name).get_shape()) for name in names)
    except (OSError, SafetensorError) as fault:
        raise _no_weights(folder, fault) from fault
    context = context_of(target.model)
    most = stored if context is None else min(stored, context)
    if drafter.depth != config.get("depth", drafter.depth) or drafter.depth > most:
        raise UserError(
            f"{folder / CONFIG} claims a drafter of {drafter.depth} levels, was saved with "
            f"{config.get('depth')}, and its target reads {context} tokens",
            "fetch the folder again",
        )
    limit = 2 * stored + SLACK
    too_large = UserError(
        f"{folder / CONFIG} claims a drafter of more than {limit} weights, and {WEIGHTS} holds "
        f"{stored}",
        "fetch the folder again",
    )
    with _AtMost(limit, too_large):
        drafter.bind(target.model, target.tokenizer)


def refuse_other_numbers(
    own: Mapping[str, torch.Tensor], drafter: Any, target: LoadedModel
) -> None:
    """Raises ValueError for what would be loaded without complaint, and mean something else."""
    for name, made in drafter.state_dict().items():
        if name in own and own[name].is_floating_point() != made.is_floating_point():
            raise ValueError(f"{name} is of {own[name].dtype}, not {made.dtype}")
    known = own.get("vocabulary")
    if known is not None and known.numel() and not 0 <= known.min() <= known.max() < target.classes:
        raise ValueError(f"its vocabulary has tokens beyond the {target.classes} of {target.name}")


class _AtMost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, no more than ``left`` elements of tensors are made; ``fault`` is raised before."""

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
    title, *details = str(fault).splitlines()
    why = textwrap.shorten(" ".join(details) or title, LONGEST, placeholder=" ...")
    return UserError(
        f"{folder / WEIGHTS} does not hold this drafter's weights: {why}",
        "train it again, or fetch the folder again",
    )
