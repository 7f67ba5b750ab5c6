"""The types and models that every spec is made of."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
)

DATA_FOLDER = "KDCORE_DATA"
"""The environment variable that names the folder of the public data sets."""


def _from_base(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base")
    if path.parts[:1] in (("$" + DATA_FOLDER,), ("${" + DATA_FOLDER + "}",)):
        return _real(_data_folder().joinpath(*path.parts[1:]))
    return _real(Path(base) / path) if base is not None else path


def _real(path: Path) -> Path:
    """As ``Path.resolve``, which before Python 3.13 fails for links that lead in a circle."""
    return Path(os.path.realpath(path))


def _data_folder() -> Path:
    named = os.environ.get(DATA_FOLDER)
    if not named:
        raise ValueError(
            f"the environment variable {DATA_FOLDER} is not set: export {DATA_FOLDER}=FOLDER, the "
            "folder of the public data sets (examples/README.md says how to fetch them)"
        )
    return Path(named).expanduser()


InputPath: TypeAlias = Annotated[Path, AfterValidator(_from_base)]
"""A file to read: relative to the spec's folder. Plugins' params use it too.

A path may begin with ``$KDCORE_DATA``. No other variable is expanded: a spec from somebody else
cannot read the environment. The run keeps the path that results, so that its own spec needs no
variable, and a run that is resumed under another value is refused as a different spec.
"""


def _on_this_machine(path: Path) -> Path:
    if re.match("[a-z][a-z0-9+.-]+:/", str(path)):
        raise ValueError(
            "not a folder of this machine: name a local one, and copy it with the tools of the "
            "URL's protocol when the run has ended"
        )
    return path


RunFolder: TypeAlias = Annotated[Path, AfterValidator(_on_this_machine)]
"""The folder of a run, relative to the working directory. It is local, as its files are locked and
renamed; a URL would become a local path with a colon."""


_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+")


def folder_or_url(given: Path | str, info: ValidationInfo | None = None) -> Path | str:
    """Read a folder's name.

    Args:
        given: A path, or the URL of a folder that fsspec opens.
        info: The validation whose context has the folder that paths are relative to.

    Returns:
        The path, also of a URL of this machine's file system; or another URL as text.

    Raises:
        ValueError: The URL contains credentials, or is a chain of URLs.
    """
    if isinstance(given, str) and _URL.fullmatch(given):
        if "::" in given or "@" in urlsplit(given).netloc:
            raise ValueError(
                "a URL with credentials, or of several parts: write e.g. s3://bucket/folder, and "
                "let its library read the credentials from the environment"
            )
        if not given.startswith("file://"):
            return given
        given = given.removeprefix("file://")
    return Path(given) if info is None else _from_base(Path(given), info)


def _folder_or_url(given: Path | str, info: ValidationInfo) -> Path | str:
    return folder_or_url(given, info)


FolderOrUrl: TypeAlias = Annotated[
    Path | str,
    AfterValidator(_folder_or_url),
    WithJsonSchema({"type": "string", "format": "path"}),
]
"""A folder as `InputPath`, or the URL of one that fsspec opens, e.g. s3://bucket/folder."""


_DATA = {".parquet", ".arrow", ".json", ".jsonl", ".csv", ".gz"}


def _path_or_id(text: str, info: ValidationInfo) -> str:
    if not text.strip():
        raise ValueError("empty path: give a hub id, a file or a folder")
    path = _from_base(Path(text), info)
    is_path = text[0] in "./$" or Path(text).suffix in _DATA or os.path.exists(path)
    return str(path) if is_path else text


PathOrId: TypeAlias = Annotated[str, AfterValidator(_path_or_id)]
"""A hub id, or a file or folder as `InputPath`: one that exists, or that looks like a path."""


MOST_ITEMS, MOST_WIDE, MOST = 2**31 - 1, 2**20, 1e9
BEYOND_USE = (MOST_ITEMS, MOST_WIDE, MOST)
"""Bounds that only keep nonsense out, so that no list of the fields shows them."""

Count: TypeAlias = Annotated[int, Field(gt=0, le=MOST_ITEMS)]
"""A number of rows, tokens or steps. Plugins' params use these types too: a bound keeps what no
machine can hold, or no library take, out of the run."""
Index: TypeAlias = Annotated[int, Field(ge=0, le=MOST_ITEMS)]
Size: TypeAlias = Annotated[int, Field(gt=0, le=MOST_WIDE)]
"""A width, a rank or a number of heads."""
LayerIndex: TypeAlias = Annotated[int, Field(ge=-MOST_WIDE, le=MOST_WIDE)]
"""A layer of a model; negative ones count from the end."""
Positive: TypeAlias = Annotated[float, Field(gt=0, le=MOST)]
NonNegative: TypeAlias = Annotated[float, Field(ge=0, le=MOST)]


Beta: TypeAlias = Annotated[float, Field(ge=0, lt=1)]
"""How slowly a moving mean forgets."""


_NAME = "[a-z0-9][a-z0-9_-]*"


def _is_a_folders(name: str) -> str:
    if not re.fullmatch(_NAME, name):
        raise ValueError(
            "invalid name: use lowercase letters, digits, - and _; start with a letter or digit"
        )
    return name


Name: TypeAlias = Annotated[
    str,
    AfterValidator(_is_a_folders),
    WithJsonSchema({"type": "string", "pattern": f"^{_NAME}$"}),
]
"""What a spec calls something of its own, as an arm: it may become the name of a folder."""


DEFAULTS: Any = {}  # validated like what a user writes, so that names resolve when a spec is read


class SpecModel(BaseModel):
    """Frozen, no unknown keys, defaults validated like anything else."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        defer_build=True,
    )


def _is_named(model: str) -> str:
    """An empty name would be read as the working directory."""
    if not model.strip():
        raise ValueError("empty model name: give a hub id, a folder or a GGUF file")
    return model


ModelName: TypeAlias = Annotated[str, AfterValidator(_is_named)]
"""What names a model. Plugins' params use it too."""


_OF_THE_RENDERING = {"messages", "tools", "documents", "add_generation_prompt"}


def _is_an_argument(name: str) -> str:
    if not name.isidentifier() or name in _OF_THE_RENDERING:
        raise ValueError(f"{name!r} is not an argument of a chat template that a spec can set")
    return name


Argument: TypeAlias = Annotated[str, AfterValidator(_is_an_argument)]
"""The name of an argument of a chat template; the data supply messages and tools."""


def _is_inside(folder: str) -> str:
    path = PurePosixPath(folder)
    if not path.name or path.is_absolute() or ".." in path.parts or "\\" in folder:
        raise ValueError("not a folder inside the model's: write e.g. checkpoint-500")
    return folder


Subfolder: TypeAlias = Annotated[str, AfterValidator(_is_inside)]
"""A folder inside that of a model."""

AUTO, SHARDED = "auto", "sharded"
"""Values of `ModelSpec.device` that name several devices."""


class ModelSpec(SpecModel):
    """A model: a hub id, a folder, a GGUF file, or a GGUF file inside an installed package."""

    model: ModelName = Field(
        description="hub id, folder, path/to/file.gguf, or package:NAME/file.gguf",
    )
    revision: str | None = Field(None, description="revision on the hub (branch, tag or commit)")
    subfolder: Subfolder | None = Field(
        None, description="folder of the model inside the repository or folder"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the weights in memory; auto: the dtype of the files"
    )
    attention: (
        Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] | None
    ) = Field(None, description="attention implementation (default: the choice of transformers)")
    device: str | None = Field(
        None,
        min_length=1,
        description="device of this model alone, e.g. cuda:1; auto spreads its layers over the "
        "devices of the process, sharded its weights over the processes of a distill run "
        "(default: the device of the run)",
    )
    quantization: dict[str, Any] | None = Field(
        None,
        description="quantisation of the weights while they are loaded: a quantization_config of "
        "transformers, e.g. {quant_method: bitsandbytes, load_in_4bit: true}",
    )
    adapter: PathOrId | None = Field(
        None, description="trained peft adapter, a folder or hub id, that the model is loaded with"
    )
    trust_remote_code: bool = Field(
        False, description="run the Python code in the model's repository"
    )
    template: InputPath | None = Field(
        None, description="file with another chat template (default: the model's own)"
    )
    template_arguments: dict[Argument, Any] = Field(
        {}, description="arguments of the chat template, e.g. {enable_thinking: false}"
    )


Device: TypeAlias = Annotated[
    str | None,
    Field(
        description="device that the models run on, e.g. cpu, cuda or cuda:1; null means the "
        "accelerator if there is one, else the CPU",
    ),
]
"""Where a job of one process runs; training asks accelerate's launcher instead."""


Seed: TypeAlias = Annotated[
    int,
    Field(
        ge=0,
        lt=2**32,
        description="seed for the data order, new weights, dropout, random gates and sampling",
    ),
]
