"""Copies of a model are what was saved, and the hub gets the files of a finished folder."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcore.errors import UserError
from kdcore.models.loading.adapters import with_adapters
from kdcore.models.loading.load import load_model
from kdcore.models.publishing import formats
from kdcore.models.publishing.formats import export_model
from kdcore.models.publishing.upload import upload
from kdcore.runs import whole_files
from kdcore.runs.whole_files import PART
from kdcore.specs.distill import LoraSpec
from kdcore.specs.parts.fields import ModelSpec
from tests.kdcore.models.loading.test_adapters import randomised
from tests.kdcore.models.loading.test_loading import logits
from tests.tiny.tiny_chat_models import saved, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved(tiny_model(), tmp_path_factory.mktemp("publishing") / "model")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# A student\n")
    return folder


def spec(model: Path, **changes: str) -> ModelSpec:
    return ModelSpec.model_validate({"model": str(model), **changes})


def test_a_copy_in_int8_is_read_by_transformers(model: Path, tmp_path: Path) -> None:
    before, after = export_model(spec(model), "torchao-int8", tmp_path / "int8")
    assert after < before
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    full = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    for name, weight in full.named_parameters():
        if name.endswith("proj.weight"):
            held = copy.get_parameter(name).dequantize().double()
            step = weight.abs().amax(1, keepdim=True) / 127.5  # of 255 levels in each row
            assert ((held - weight).abs() <= 0.501 * step).all(), name
            assert (held / step - (held / step).round()).abs().max() < 1e-3, name
            weight.data = held
    ids = torch.arange(9)[None]
    assert torch.allclose(copy(ids).logits.double(), full(ids).logits, atol=1e-4)
    asked = AutoTokenizer.from_pretrained(tmp_path / "int8").apply_chat_template(
        [{"role": "user", "content": "the mat"}], tokenize=False
    )
    assert "the mat" in asked
    card = (tmp_path / "int8" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name") and "# A student" in card
    assert "quantised as torchao-int8" in card


def test_an_adapter_is_merged_into_the_copy(model: Path, tmp_path: Path) -> None:
    adapted = with_adapters(load_model(spec(model)).model, LoraSpec(r=2))
    randomised(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    asked = spec(model, adapter=str(tmp_path / "adapter"))
    export_model(asked, formats.FULL, tmp_path / "merged")
    copy = load_model(spec(tmp_path / "merged")).model
    assert torch.allclose(logits(copy), logits(adapted), atol=1e-3)
    assert not torch.allclose(logits(copy), logits(load_model(spec(model)).model), atol=0.1)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_copy_that_is_read_differently_is_not_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(asked: ModelSpec, **options: object) -> object:
        loaded = load_model(asked, **options)
        if PART in asked.model:
            loaded.model.get_output_embeddings().weight.data *= 1.1
        return loaded

    monkeypatch.setattr(formats, "load_model", other)
    with pytest.raises(UserError, match="reads weights from the transformers copy"):
        export_model(spec(model), formats.FULL, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(UserError, match="unknown format 'int3'"):
        export_model(spec(model), "int3", tmp_path / "copy")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(UserError, match="already exists"):
        export_model(spec(model), formats.FULL, tmp_path / "full")


def test_two_exports_to_one_folder_do_not_mix(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = formats._refuse_other_logits

    def meanwhile(*given: object) -> None:
        monkeypatch.setattr(formats, "_refuse_other_logits", check)
        with pytest.raises(UserError, match="another process is writing"):
            export_model(spec(model), "torchao-int8", tmp_path / "copy")
        check(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(whole_files, "_PATIENCE", 0.1)
    monkeypatch.setattr(formats, "_refuse_other_logits", meanwhile)
    export_model(spec(model), formats.FULL, tmp_path / "copy")
    assert not [*tmp_path.glob(f"*{PART}")]
    copy, full = (load_model(spec(each)).model for each in (tmp_path / "copy", model))
    assert torch.equal(logits(copy), logits(full))


_REFUSAL = {"error": "You don't have the rights to create a model there"}


class Hub(ThreadingHTTPServer):
    """A hub that takes files inside the commit, and refuses names that end in -taken."""

    def __init__(self) -> None:
        super().__init__(("localhost", 0), _Answers)
        self.created: list[dict[str, object]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://localhost:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._answer(_REFUSAL, 403) if "-taken" in self.path else self._answer({})

    def do_POST(self) -> None:
        said = self.rfile.read(int(self.headers["content-length"]))
        self.server.tokens.add(self.headers["authorization"])
        if self.path == "/api/repos/create":
            asked = json.loads(said)
            self.server.created.append(asked)
            if asked["name"].endswith("-taken"):
                self._answer(_REFUSAL, 403)
            else:
                self._answer({"url": f"{self.server.address}/me/{asked['name']}"})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(said)["files"]]
            ways = {"uploadMode": "regular", "shouldIgnore": False}
            self._answer({"files": [{"path": path} | ways for path in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, said.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            self._answer(
                {"commitUrl": f"{self.server.address}/me/a/commit/0", "commitOid": "0" * 40}
            )
        else:
            self._answer({"errors": [], "warnings": []})

    def _answer(self, body: object, status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def test_a_folder_is_uploaded_with_its_card_and_without_pickles(
    model: Path, tmp_path: Path, hub: Hub
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "optimizer.pt").write_bytes(b"pickled")
    address = upload(folder, "me/student", message="first")
    assert address == f"{hub.address}/me/student" and hub.tokens == {"Bearer hf_secret"}
    assert "private" in (*hub.created[0], *hub.created[0].values())
    expected = {file.name: file.read_bytes() for file in model.iterdir()}
    assert hub.files == expected and "README.md" in expected and "model.safetensors" in expected


def test_an_upload_is_refused_in_one_line(
    model: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(folder: Path, repo: str) -> str:
        with pytest.raises(UserError) as refused:
            upload(folder, repo)
        assert "\n" not in refused.value.cause and "hf_secret" not in refused.value.cause
        return refused.value.cause

    assert "the hub refused the upload to me/a-taken: " in refusal(model, "me/a-taken")
    assert "'me/a/b' is not a repository" in refusal(model, "me/a/b")
    bare = saved(tiny_model(), tmp_path / "bare")
    assert "does not contain a model card" in refusal(bare, "me/student")
    assert "does not contain safetensors weights" in refusal(tmp_path, "me/student")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(model, "me/student")
    monkeypatch.delenv("HF_TOKEN")
    assert "no token of the hub is stored" in refusal(model, "me/student")
    assert not hub.files


def test_an_answer_of_another_server_than_the_hub(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*given: object, **named: object) -> None:
        raise ValueError("Unrecognized host 'x'")

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", other)
    with pytest.raises(UserError, match="the hub's answer cannot be read: Unrecognized host 'x'"):
        upload(model, "me/student")
