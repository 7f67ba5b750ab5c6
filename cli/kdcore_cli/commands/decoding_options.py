"""Options for drafters, trees, verifiers and engines: a name, or a mapping as in a spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer

from kdcore.components.registry import Registry
from kdcore.errors import UserError
from kdcore_cli.terminal import console

if TYPE_CHECKING:
    from pydantic import BaseModel

    from kdcore.components.choice import Choice
    from kdcore.models.loading.loaded import LoadedModel
    from kdcore.specs.parts.decoding import DraftingSpec, SamplingSpec

    M = TypeVar("M", bound=BaseModel)

Drafter: TypeAlias = Annotated[
    str,
    typer.Option(
        metavar="DRAFTER",
        help="Drafter name, a mapping such as '{name: ngram, length: 8}', or the folder of a "
        "trained drafter.",
    ),
]
First: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="DRAFTER",
        help="Drafter that proposes before --drafter, which proposes where this one has nothing, "
        "e.g. '{name: suffix, least: 0.5}'.",
    ),
]
Tree: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="TREE", help="Tree name or mapping (default: the tree of the drafter)."),
]
Pauses: TypeAlias = Annotated[
    bool,
    typer.Option("--pauses", help="Stop drafting while it is slower than plain decoding."),
]
Verifier: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="VERIFIER",
        help="Verifier name or mapping (default: greedy at temperature 0, sampling otherwise).",
    ),
]
Engine: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="ENGINE",
        help="Engine that runs the model, a name or mapping (default: openvino on a CPU where it "
        "is installed and converts the model, otherwise torch).",
    ),
]

Dtype: TypeAlias = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Dtype of the weights: float32, bfloat16, float16, or auto: that of the files.",
    ),
]
Attention: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--attention",
        metavar="NAME",
        help="Attention implementation: sdpa, eager, flash_attention_2, flash_attention_3 or "
        "flex_attention (default: the choice of transformers).",
    ),
]
Quantization: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        metavar="MAPPING",
        help="Quantisation while loading, a config of transformers, e.g. '{quant_method: "
        "bitsandbytes, load_in_4bit: true}'.",
    ),
]
Adapter: TypeAlias = Annotated[
    str | None,
    typer.Option("--adapter", metavar="FOLDER", help="Trained peft adapter, a folder or hub id."),
]
Subfolder: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--subfolder", metavar="FOLDER", help="Folder of the model inside the repository or folder."
    ),
]
Temperature: TypeAlias = Annotated[
    float, typer.Option(help="Sampling temperature; 0 is greedy decoding.")
]
TopK: TypeAlias = Annotated[
    int, typer.Option(help="Sample from the k most likely tokens; 0 means all.")
]
TopP: TypeAlias = Annotated[
    float, typer.Option(help="Nucleus sampling threshold; 1 means all tokens.")
]
MinP: TypeAlias = Annotated[
    float,
    typer.Option(
        help="Least probability of a token, relative to the most likely one; 0 means none."
    ),
]
TypicalP: TypeAlias = Annotated[
    float, typer.Option(help="Threshold of locally typical sampling; 1 means all tokens.")
]
RepetitionPenalty: TypeAlias = Annotated[
    float, typer.Option(help="Penalty for tokens that occurred before; 1 means none.")
]
PresencePenalty: TypeAlias = Annotated[
    float,
    typer.Option(help="Number subtracted from the logits of tokens that occur in the answer."),
]
FrequencyPenalty: TypeAlias = Annotated[
    float,
    typer.Option(
        help="Number subtracted from a logit for each time its token occurs in the answer."
    ),
]
NoRepeatNgramSize: TypeAlias = Annotated[
    int, typer.Option(help="No sequence of so many tokens occurs twice; 0 means no such limit.")
]
BadWords: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--bad-words",
        metavar="TEXT",
        help="Text that does not occur in an answer. May be given several times.",
    ),
]
SequenceBias: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--sequence-bias",
        metavar="TEXT=NUMBER",
        help="Bias that is added to the logit of the last token of a text. May be given several "
        "times.",
    ),
]
MinNewTokens: TypeAlias = Annotated[
    int, typer.Option(help="Minimum length of an answer in tokens.")
]
MaxNewTokens: TypeAlias = Annotated[
    int, typer.Option(help="Maximum length of an answer in tokens.")
]
Samples: TypeAlias = Annotated[
    int,
    typer.Option(
        help="Number of independent answers to each prompt; more than 1 requires a temperature "
        "above 0.",
        min=1,
    ),
]
Raw: TypeAlias = Annotated[
    bool, typer.Option("--raw", help="Continue the text without a chat template.")
]
Template: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--template", metavar="FILE", help="Another chat template (default: the model's own)."
    ),
]
TemplateArguments: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--template-argument",
        metavar="NAME=VALUE",
        help="Argument of the chat template, e.g. enable_thinking=false. May be given several "
        "times.",
    ),
]


@dataclass(frozen=True, slots=True)
class TargetOptions:
    """The options that name a target model and say how it is loaded and prompted.

    Attributes:
        model: Hub id, folder or .gguf file.
        dtype: Name of the dtype of the weights.
        device: Name of the device, or None for the accelerator if there is one.
        raw: Whether to do without a chat template.
        template: File of another chat template, or None for the model's own.
        template_arguments: Arguments of the chat template, each NAME=VALUE in YAML.
        attention: Attention implementation, or None for the choice of transformers.
        quantization: Mapping in YAML, or None.
        adapter: Folder or hub id of a trained adapter, or None.
        subfolder: Folder of the model inside the repository, or None.
        quiet: Whether to leave out the line on stderr that names the device.
    """

    model: str
    dtype: str
    device: str | None
    raw: bool
    template: Path | None
    template_arguments: Sequence[str] | None
    attention: str | None
    quantization: str | None
    adapter: str | None
    subfolder: str | None
    quiet: bool

    def load(self, registry: Registry) -> LoadedModel:
        """Load the model, on its device.

        Args:
            registry: Known components.

        Returns:
            The loaded model with its tokenizer.

        Raises:
            UserError: An argument is not NAME=VALUE, the model cannot be loaded (see
                `kdcore.models.loading.load.load_model`), the device does not exist, or the model
                has no chat template and ``raw`` is False.
        """
        from kdcore.models.device import chosen_device
        from kdcore.models.loading.load import load_model
        from kdcore.specs.parts.fields import ModelSpec

        place = chosen_device(self.device)
        said = {
            "model": self.model,
            "dtype": self.dtype,
            "template": self.template,
            "template_arguments": dict(map(_argument, self.template_arguments or ())),
            "attention": self.attention,
            "adapter": self.adapter,
            "subfolder": self.subfolder,
        }
        if self.quantization is not None:
            said["quantization"] = _plain(self.quantization, "quantization")
        target = load_model(checked(ModelSpec, said, registry), device=place)
        if not self.raw and target.tokenizer.chat_template is None:
            raise UserError(
                f"{self.model} does not have a chat template",
                "add --raw to continue the text without a template",
            )
        if not self.quiet:
            console.err().print(f"device: {place}", style="dim")
        return target


def drafting_spec(
    drafter: str,
    tree: str | None,
    verifier: str | None,
    engine: str | None,
    registry: Registry,
    pauses: bool = False,
    first: str | None = None,
) -> DraftingSpec:
    """Build a spec from the options of the same names.

    Args:
        drafter: Name, mapping in YAML, or folder of a trained drafter.
        tree: Name or mapping in YAML; None for the drafter's own tree.
        verifier: Name or mapping in YAML; None for the default.
        engine: Name or mapping in YAML; None for the default.
        registry: Known components.
        pauses: Whether drafting stops while it does not pay.
        first: Name or mapping in YAML of a drafter that is asked first; None for none.

    Returns:
        The validated spec.

    Raises:
        UserError: A component or folder does not exist, or has other parameters.
    """
    from kdcore.specs.parts.decoding import DraftingSpec

    given = {"first": first, "tree": tree, "verifier": verifier, "engine": engine}
    said = {name: _plain(text, name) for name, text in given.items() if text is not None}
    said["pauses"] = pauses
    if drafter not in registry.names("drafter") and Path(drafter).is_dir():
        said["folder"] = drafter
    elif not drafter.startswith("{") and "/" in drafter:
        raise UserError(
            f"--drafter: folder {drafter} does not exist", "name the folder of a trained drafter"
        )
    else:
        said["drafter"] = _plain(drafter, "drafter")
    return checked(DraftingSpec, said, registry)


def engine_choice(engine: str | None, registry: Registry) -> Choice | None:
    """The engine that --engine names.

    Args:
        engine: Name or mapping in YAML; None for the default.
        registry: Known components.

    Returns:
        The engine, or None for the default.

    Raises:
        UserError: The engine does not exist, or has other parameters.
    """
    return drafting_spec("nothing", None, None, engine, registry).engine


def sampling_spec(registry: Registry, **settings: Any) -> SamplingSpec:
    """Build a sampling spec from the options of the same names.

    Args:
        registry: Known components.
        **settings: Values of the fields, by name.

    Returns:
        The validated spec.

    Raises:
        UserError: A value is out of its range.
    """
    from kdcore.specs.parts.decoding import SamplingSpec

    return checked(SamplingSpec, settings, registry)


def checked(model: type[M], said: dict[str, Any], registry: Registry) -> M:
    """Validate the values of options.

    Args:
        model: Pydantic model of the values.
        said: Values by field name.
        registry: Known components.

    Returns:
        The validated model.

    Raises:
        UserError: A value is invalid; the message names the option of the first mistake.
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


def biases(given: Sequence[str] | None) -> dict[str, str]:
    """Split the values of --sequence-bias into texts and numbers.

    Args:
        given: The values, each TEXT=NUMBER.

    Returns:
        Text -> number, as it was written.

    Raises:
        UserError: A value is not TEXT=NUMBER.
    """
    found = {}
    for each in given or ():
        text, equals, number = each.rpartition("=")
        if not equals:
            raise UserError(
                f"--sequence-bias {each} has no number", "write TEXT=NUMBER, e.g. Paris=-5"
            )
        found[text] = number
    return found


def _argument(text: str) -> tuple[str, Any]:
    """Name and value of an option NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(
            f"--template-argument {text} has no value",
            "write NAME=VALUE, e.g. enable_thinking=false",
        )
    return name, _plain(value, "template-argument")


def _plain(text: str, option: str) -> Any:
    from kdcore.specs.reading import plain_yaml

    return plain_yaml.parse(text, lambda line: f"--{option}")[0]
