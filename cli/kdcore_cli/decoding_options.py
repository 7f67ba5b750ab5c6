"""Drafters, trees and verifiers on the command line: a name, or what a spec would say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer

from kdcore.errors import UserError
from kdcore.method.registry import Registry
from kdcore_cli import console

if TYPE_CHECKING:
    from pydantic import BaseModel

    from kdcore.models.loaded import LoadedModel
    from kdcore.specs.decoding import DraftingSpec, SamplingSpec

    M = TypeVar("M", bound=BaseModel)

Drafter: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="DRAFTER",
        help="A name, '{name: ngram, length: 8}', or the folder of a trained drafter.",
    ),
]
Tree: TypeAlias = Annotated[
    str | None, typer.Option(metavar="TREE", help="A name, or '{name: ..., its parameters}'.")
]
Verifier: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="VERIFIER",
        help="The verifier (default: greedy at temperature 0, sampling otherwise).",
    ),
]


Dtype: TypeAlias = Annotated[
    str, typer.Option("--dtype", help="Dtype of the weights: float32, bfloat16 or float16.")
]
Raw: TypeAlias = Annotated[
    bool, typer.Option("--raw", help="Continue the text without a chat template.")
]


def load_target(
    model: str, dtype: str, raw: bool, device: str | None, registry: Registry, *, quiet: bool
) -> LoadedModel:
    """The target that a command line names, on its device, which stderr names unless quiet.

    Raises UserError as `kdcore.models.loading.load_model` does, for a device that is not here, and
    for a target without a chat template, unless ``raw`` asks for none.
    """
    from kdcore.models.device import chosen_device
    from kdcore.models.loading import load_model
    from kdcore.specs.fields import ModelSpec

    place = chosen_device(device)
    target = load_model(checked(ModelSpec, {"model": model, "dtype": dtype}, registry))
    if not raw and target.tokenizer.chat_template is None:
        raise UserError(
            f"{model} has no chat template", "add --raw to go on from the text as it is"
        )
    target.to(place)
    if not quiet:
        console.err().print(f"device: {place}", style="dim")
    return target


def drafting_spec(
    drafter: str, tree: str | None, verifier: str | None, registry: Registry
) -> DraftingSpec:
    """What the three options say.

    Raises UserError for what is not there or has other parameters.
    """
    from kdcore.specs.decoding import DraftingSpec

    given = {"tree": tree, "verifier": verifier}
    said = {name: _plain(text, name) for name, text in given.items() if text is not None}
    if drafter not in registry.names("drafter") and Path(drafter).is_dir():
        said["folder"] = drafter
    elif not drafter.startswith("{") and "/" in drafter:
        raise UserError(
            f"--drafter: there is no folder {drafter}", "name the folder of a trained drafter"
        )
    else:
        said["drafter"] = _plain(drafter, "drafter")
    return checked(DraftingSpec, said, registry)


def sampling_spec(registry: Registry, **settings: float) -> SamplingSpec:
    """What the options of these names say."""
    from kdcore.specs.decoding import SamplingSpec

    return checked(SamplingSpec, settings, registry)


def checked(model: type[M], said: dict[str, Any], registry: Registry) -> M:
    """Validate what options say; the first mistake is told by its option.

    Raises UserError.
    """
    from pydantic import ValidationError

    from kdcore.specs.reading.mistakes import mistakes

    try:
        return model.model_validate(said, context={"base": Path.cwd(), "registry": registry})
    except ValidationError as error:
        first = mistakes(error, model)[0]
        option, *inner = first.dotted.split(".")
        where = " ".join([f"--{option.replace('_', '-')}", ".".join(inner)]).strip()
        cure = first.cure.removeprefix(f"{first.place[-1]}: ")
        raise UserError(f"{where}: {first.what}", cure) from None


def _plain(text: str, option: str) -> Any:
    from kdcore.specs.reading import plain_yaml

    return plain_yaml.parse(text, lambda line: f"--{option}")[0]
