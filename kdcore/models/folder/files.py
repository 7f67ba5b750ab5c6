"""The files of a model: a hub id, a folder or a GGUF file, resolved to one folder.

A GGUF file is dequantised once into the cache (``KDCORE_CACHE``, by default ~/.cache/kdcore), as a
folder that transformers loads. The key is the file's sha256 and the version of transformers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kdcore.errors import UserError, first_line
from kdcore.models.folder.gguf_file import dequantise
from kdcore.models.folder.kept_files import cache_folder, made_once
from kdcore.specs.parts.fields import ModelSpec

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PACKAGE = re.compile(r"package:([A-Za-z_]\w*)/(.+)")
_ABOUT = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHTS = "model*.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
"""The config and the weights of a peft adapter."""
_ADAPTER_CURE = "name a folder that peft saved with save_pretrained, as a run's adapter/"
_DIGITS = 64
_LONGEST_NAME = 255  # bytes; a file system raises an error for a longer name


def model_folder(spec: ModelSpec, *, weights: bool = True) -> Path:
    """The folder of a model, downloaded or dequantised first where needed.

    Args:
        spec: The model and its revision.
        weights: Whether to download the weights of a hub model too.

    Returns:
        A folder that transformers can load.

    Raises:
        UserError: The model does not exist, is an adapter alone, or the hub cannot be reached.
    """
    folder = _inside(_whole_folder(spec, weights), spec)
    _refuse_adapter(folder, spec)
    return folder


def served_name(model: str) -> str:
    """The name by which a program other than kdcore loads a model.

    Args:
        model: Hub id, folder, or GGUF file, which may be in a package.

    Returns:
        The same name; of a GGUF file the folder of its dequantised weights, which kdcore reads too.

    Raises:
        UserError: The file does not exist or cannot be read.
    """
    if _PACKAGE.fullmatch(model) or model.endswith(".gguf"):
        return str(model_folder(ModelSpec.model_validate({"model": model})))
    return model


def stored_folder(spec: ModelSpec) -> Path | None:
    """The folder of a model on this machine, without a download; its weights may be missing.

    Args:
        spec: The model and its revision.

    Returns:
        The folder; None for a hub model that was never downloaded.

    Raises:
        UserError: The model is not on the hub's cache, and its name is not a folder or file.
    """
    if Path(spec.model).expanduser().exists() or not _HUB_ID.fullmatch(spec.model):
        return model_folder(spec)
    try:
        snapshot = snapshot_download(spec.model, revision=spec.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return _inside(Path(snapshot), spec)


def _whole_folder(spec: ModelSpec, weights: bool) -> Path:
    """The folder of a model without its subfolder."""
    if match := _PACKAGE.fullmatch(spec.model):
        return _dequantised(_in_package(*match.groups()))
    path = Path(spec.model).expanduser()
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise _nowhere(spec)  # e.g. a prompt given as the model
    if path.is_dir():
        return path.resolve()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(
                f"{path} does not exist", f"check the path, which is relative to {Path.cwd()}"
            )
        return _dequantised(path.resolve())
    if not _HUB_ID.fullmatch(spec.model) or path.exists():
        raise _nowhere(spec)
    return _from_hub(spec, weights)


def _inside(folder: Path, spec: ModelSpec) -> Path:
    """The subfolder of a model's folder that the spec names."""
    if spec.subfolder is None:
        return folder
    within = folder / spec.subfolder
    if not os.path.isdir(within):
        found = sorted(each.parent.name for each in folder.glob("*/config.json"))
        raise UserError(
            f"{spec.model} does not contain a folder {spec.subfolder}",
            f"correct subfolder; folders with a model: {', '.join(found) or 'none'}",
        )
    return within


def _refuse_adapter(folder: Path, spec: ModelSpec) -> None:
    """Raises UserError for a folder with an adapter in place of a model."""
    if (folder / ADAPTER[0]).is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{spec.model} contains an adapter of peft, and no model",
            f"name the base model, and adapter: {spec.model} beside it (kdcore export BASE "
            f"--adapter {spec.model}), or the folder model/ of a run, which has it merged",
        )


def adapter_folder(name: str) -> Path:
    """The folder of a peft adapter, downloaded first where needed.

    Args:
        name: Folder or hub id.

    Returns:
        A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        UserError: The adapter does not exist, or has only pickled weights.
    """
    folder = Path(name)
    if not os.path.isdir(folder):
        folder = _from_hub(ModelSpec.model_validate({"model": name}), True, ADAPTER)
    for file in (each for each in ADAPTER if not (folder / each).is_file()):
        raise UserError(
            f"the adapter {name} does not contain {file}",
            _ADAPTER_CURE,
        )
    return folder


def adapter_digest(folder: Path) -> str:
    """The sha256 of an adapter's config and weights."""
    return hashlib.sha256(
        "".join(file_digest(folder / file) for file in ADAPTER).encode()
    ).hexdigest()


def weights_digest(folder: Path) -> str:
    """The sha256 of a model's config.json and safetensors files."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob(_WEIGHTS)):
        digest.update(file_digest(file).encode())
    return digest.hexdigest()


def _in_package(package: str, name: str) -> Path:
    """A GGUF file of an installed package; the package is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"package '{package}' is not installed",
            f"install the distribution that provides it (often {package.replace('_', '-')})",
        )
    home = Path(found.submodule_search_locations[0]).resolve()
    path = (home / name).resolve()
    if not path.is_relative_to(home) or path.suffix != ".gguf" or not path.is_file():
        files = ", ".join(sorted(p.name for p in home.glob("*.gguf")))
        raise UserError(
            f"package '{package}' does not contain a GGUF file {name}",
            f"use one of: {files}" if files else "name another package",
        )
    return path


def _from_hub(spec: ModelSpec, weights: bool, files: Sequence[str] = ()) -> Path:
    """The snapshot of a hub model; ``files``: the only ones to download."""
    patterns = [*files] or _ABOUT + [_WEIGHTS] * weights + ["*.py"] * spec.trust_remote_code
    if spec.subfolder is not None:
        patterns += [f"{spec.subfolder}/{pattern}" for pattern in patterns]
    try:
        return Path(snapshot_download(spec.model, revision=spec.revision, allow_patterns=patterns))
    except HFValidationError:  # e.g. ./folder
        if files:
            cause = f"the adapter '{spec.model}' is not a folder or a hub id"
            raise UserError(cause, _ADAPTER_CURE) from None
        raise _nowhere(spec) from None
    except LocalEntryNotFoundError as absent:
        raise UserError(
            f"folder '{spec.model}' does not exist, and the hub cannot be reached",
            "check the name, the network and HF_HUB_OFFLINE, or use a local folder",
        ) from absent
    except GatedRepoError as refusal:
        raise UserError(
            f"the hub requires you to accept the terms of '{spec.model}'",
            "accept them on the model's page and log in (hf auth login)",
        ) from refusal
    except (RepositoryNotFoundError, RevisionNotFoundError) as refusal:
        at = f" at revision {spec.revision}" if spec.revision else ""
        raise UserError(
            f"'{spec.model}'{at} does not exist, neither as a folder nor on the hub",
            "check the name; for a private model, log in (hf auth login)",
        ) from refusal
    except HfHubHTTPError as refusal:
        raise UserError(
            f"the hub returned an error for '{spec.model}': {first_line(refusal)}",
            "rerun later, or use a local folder",
        ) from refusal


def _nowhere(spec: ModelSpec) -> UserError:
    return UserError(
        f"'{spec.model}' is not a folder, a GGUF file or a hub id",
        "use a folder with a config.json, a .gguf file, package:NAME/file.gguf, or a hub id "
        "(owner/name)",
    )


def _dequantised(file: Path) -> Path:
    """The dequantised folder of a GGUF file, created by the first call."""
    key = f"{file_digest(file)[:32]}-transformers-{transformers.__version__}"
    return made_once(cache_folder() / "gguf" / key, lambda place: dequantise(file, place))


def file_version(file: Path) -> tuple[int, ...]:
    """Facts of a file that differ after each change of it.

    Its size and modification time alone do not: archives, `cp -p` and reproducible builds set the
    time, and a clock may go back. The time at which the system saw its last change, and its number
    in the file system, cannot be set.

    Args:
        file: The file.

    Returns:
        The size, both times and the number.
    """
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino


def file_digest(file: Path) -> str:
    """A file's sha256, cached until the file changes (`file_version`).

    A cache that cannot be written costs time alone.

    Args:
        file: The file.

    Returns:
        64 hexadecimal digits.
    """
    seen = (file, *file_version(file))
    key = hashlib.sha256(repr(seen).encode()).hexdigest()
    known = cache_folder() / "sha256" / key
    with suppress(OSError):
        if len(digest := known.read_text()) == _DIGITS:
            return digest
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with suppress(OSError):
        known.parent.mkdir(parents=True, exist_ok=True)
        beside = known.with_name(f"{key}.{os.getpid()}")
        beside.write_text(digest)
        beside.replace(known)
    return digest
