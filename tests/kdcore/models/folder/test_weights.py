"""What is wrong with a model's files is told by a look at them, as by loading them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from kdcore.errors import UserError
from kdcore.models.folder import files
from kdcore.models.loading.load import load_model, load_student
from kdcore.specs.distill import StudentSpec
from kdcore.specs.parts.fields import ModelSpec
from tests.tiny.tiny_chat_models import saved, tiny_model

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_model(), tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    copy.mkdir()
    for file in whole.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def absent(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def no_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 100)


def other_shape(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    name = next(name for name in state if name.endswith("embed_tokens.weight"))
    save_file(state | {name: state[name][:, :-1].contiguous()}, folder / WEIGHTS)


def indexed(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "part.safetensors")
        text = json.dumps({"weight_map": dict(zip("abc", names, strict=False))})
        (folder / INDEX).write_text(text)

    return change


def bad_index(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / INDEX).write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (pickled, "has only pickled weights (pytorch_model.bin)"),
        (absent, "does not contain weights"),
        (truncated, "is damaged or truncated"),
        (no_header, "is damaged or truncated"),
        (other_shape, "embed_tokens.weight has the shape ["),
        (indexed("part.safetensors", "gone.safetensors"), "gone.safetensors does not exist"),
        (indexed("../../secret.safetensors"), "names '../../secret.safetensors', which is not a"),
        (indexed("/etc/passwd"), "names '/etc/passwd', which is not a file of that folder"),
        (bad_index("{"), "is not an index of weights"),
        (bad_index("[" * 100_000), "is not an index of weights"),
        (bad_index('{"weight_map": {"a": 1}}'), "is not an index of weights"),
        (bad_index('{"weight_map": []}'), "is not an index of weights"),
    ],
)
def test_weights_that_cannot_be_loaded_are_refused_by_a_look(
    folder: Path, change: Callable[[Path], None], cause: str
) -> None:
    change(folder)
    with pytest.raises(UserError) as refused:
        load_model(ModelSpec(model=str(folder)), weights=False)
    assert cause in refused.value.cause
    with pytest.raises(UserError):
        load_model(ModelSpec(model=str(folder)))


def test_weights_in_several_files_pass(folder: Path) -> None:
    indexed("part.safetensors")(folder)
    assert load_model(ModelSpec(model=str(folder)), weights=False).classes


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"hidden_size": 0, "num_attention_heads": 0},
        {"hidden_size": 10**30},
        {"vocab_size": "many"},
    ],
)
def test_a_config_that_no_model_can_have(whole: Path, folder: Path, config: Any) -> None:
    """Of a new model, and in the folder of another's."""
    given = {"model_type": "llama", "hidden_size": 8, **config}
    student = StudentSpec(model="new", config=given, tokenizer=str(whole))
    with pytest.raises(UserError):
        load_student(student, None, weights=False)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | config))
    with pytest.raises(UserError):
        load_model(ModelSpec(model=str(folder)), weights=False)


def test_an_error_of_the_hub_is_not_an_absent_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> str:
        raise HfHubHTTPError("503 Server Error: overloaded", response=_Response())  # type: ignore[arg-type]

    monkeypatch.setattr(files, "snapshot_download", refuses)
    with pytest.raises(UserError) as told:
        load_model(ModelSpec(model="some/model"))
    assert told.value.cause.startswith("the hub returned an error for 'some/model': 503")


class _Response:
    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.request, self.status_code = None, 503


@pytest.mark.parametrize(
    ("field", "size", "said"),
    [
        (
            "hidden_size",
            32,
            r"embed_tokens.weight has the shape \[290, 16\], .* by hidden_size: 32",
        ),
        ("intermediate_size", 7, r"\[16, 24\], .*makes it \[16, 7\] by intermediate_size: 7"),
        ("num_attention_heads", 4, r"o_proj.weight has .*\[16, 16\], .*makes it \[16, 32\]\n"),
    ],
)
@pytest.mark.parametrize("weights", [True, False])
def test_a_size_that_the_weights_belie_is_named_by_its_field(
    folder: Path, field: str, size: int, said: str, weights: bool
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: size}))
    with pytest.raises(UserError, match=said) as wrong:
        load_model(ModelSpec.model_validate({"model": str(folder)}), weights=weights)
    assert "config.json that belongs to these weights" in wrong.value.cure
