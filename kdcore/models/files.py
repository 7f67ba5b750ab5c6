"""Where a model's files are: a hub id, a folder, a GGUF file, all made into one folder.

A GGUF file is dequantised once, into the cache (``KDCORE_CACHE``, else ~/.cache/kdcore), as a
folder that plain transformers loads. The key is the file's sha256 and the version that read it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kdcore.errors import UserError
from kdcore.runs.whole_files import whole_folder
from kdcore.specs.fields import ModelSpec

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PACKAGE = re.compile(r"package:([A-Za-z_]\w*)/(.+)")
_ABOUT = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHTS = "model*.safetensors"
_LONGEST_NAME = 255  # bytes; beyond it a file system raises
FIRST = "5.23.0"
"""The version of transformers that every dequantised folder names; see `_name_first_version`."""


def model_folder(spec: ModelSpec, *, weights: bool = True) -> Path:
    """The folder that holds the model, fetched or dequantised first where needed.

    weights: whether a hub model's weights are fetched too.
    Raises UserError when there is nothing at that place, or the hub cannot be reached.
    """
    if match := _PACKAGE.fullmatch(spec.model):
        return _dequantised(_in_package(*match.groups()))
    path = Path(spec.model).expanduser()
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise _nowhere(spec)  # a prompt, perhaps
    if path.is_dir():
        return path.resolve()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"there is no file {path}", f"paths are taken from {Path.cwd()}")
        return _dequantised(path.resolve())
    if not _HUB_ID.fullmatch(spec.model) or path.exists():
        raise _nowhere(spec)
    return _from_hub(spec, weights)


def weights_digest(folder: Path) -> str:
    """The sha256 of what a model computes with: its config.json and its safetensors files."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob(_WEIGHTS)):
        digest.update(_sha256(file).encode())
    return digest.hexdigest()


def _in_package(package: str, name: str) -> Path:
    """A file of an installed package, which is found without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"there is no installed package '{package}'",
            f"install the distribution that provides it (often {package.replace('_', '-')})",
        )
    home = Path(found.submodule_search_locations[0]).resolve()
    path = (home / name).resolve()
    if not path.is_relative_to(home) or path.suffix != ".gguf" or not path.is_file():
        files = ", ".join(sorted(p.name for p in home.glob("*.gguf"))) or "none"
        raise UserError(f"package '{package}' has no GGUF file {name}", f"it has: {files}")
    return path


def _from_hub(spec: ModelSpec, weights: bool) -> Path:
    patterns = _ABOUT + [_WEIGHTS] * weights + ["*.py"] * spec.trust_remote_code
    try:
        return Path(snapshot_download(spec.model, revision=spec.revision, allow_patterns=patterns))
    except HFValidationError:  # e.g. ./folder
        raise _nowhere(spec) from None
    except LocalEntryNotFoundError as absent:
        raise UserError(
            f"'{spec.model}' is no folder here, and the hub cannot be reached to look for it there",
            "check the name and the network (and HF_HUB_OFFLINE), or name a local folder",
        ) from absent
    except GatedRepoError as refusal:
        raise UserError(
            f"the hub gives '{spec.model}' only to those who accepted its terms",
            "accept them on its page and log in (hf auth login)",
        ) from refusal
    except HfHubHTTPError as refusal:
        at = f" at revision {spec.revision}" if spec.revision else ""
        raise UserError(
            f"there is no '{spec.model}'{at}, neither as a folder here nor on the hub",
            "check the name; a private model needs a login (hf auth login)",
        ) from refusal


def _nowhere(spec: ModelSpec) -> UserError:
    return UserError(
        f"'{spec.model}' is no folder, GGUF file or hub id",
        "name a folder with config.json in it, a .gguf file, package:NAME/file.gguf, or "
        "owner/name on the hub",
    )


def _dequantised(file: Path) -> Path:
    """The folder made from a GGUF file; the first call makes it."""
    key = f"{_sha256(file)[:32]}-transformers-{transformers.__version__}"
    folder = _cache() / "gguf" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(key + ".lock")):
        if not folder.exists():
            with whole_folder(folder) as place:
                _dequantise(file, place)
    return folder


def _dequantise(file: Path, folder: Path) -> None:
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        packed = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as fault:  # a damaged file breaks its reader in many ways
        raise UserError(
            f"{file} cannot be read as a GGUF model: {_line(fault)}",
            "name an intact file of an architecture that transformers can read from GGUF",
        ) from fault
    # a model read from GGUF refuses to be saved, one built from its config and given its
    # weights does not
    with torch.device("meta"):
        model = type(packed)(config)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _name_first_version(folder / "config.json")


def _name_first_version(config: Path) -> None:
    """Have a config.json name the version by which the first folders were made, not its own.

    It counts in `weights_digest`, by which a drafter knows its target: after an upgrade the same
    file would be another target.
    """
    said = config.read_text("utf-8")
    named = re.sub(r'("transformers_version": )"[^"]*"', rf'\1"{FIRST}"', said)
    config.write_text(named, "utf-8")


def _sha256(file: Path) -> str:
    """A file's sha256, remembered for as long as its size and time of change stay."""
    facts = file.stat()
    key = hashlib.sha256(f"{file}|{facts.st_size}|{facts.st_mtime_ns}".encode()).hexdigest()
    known = _cache() / "sha256" / key
    if not known.exists():
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        known.parent.mkdir(parents=True, exist_ok=True)
        beside = known.with_name(f"{key}.{os.getpid()}")
        beside.write_text(digest)
        beside.replace(known)
    return known.read_text()


def _cache() -> Path:
    return Path(os.environ.get("KDCORE_CACHE", "~/.cache/kdcore")).expanduser()


def _line(fault: BaseException) -> str:
    """An exception's first line."""
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]
