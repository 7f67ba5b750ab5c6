"""A GGUF file becomes a folder that later versions read as the same model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest

from kdcore.errors import UserError
from kdcore.models.folder import gguf_file
from kdcore.models.folder.files import weights_digest
from tests.tiny.tiny_chat_models import tiny_model


def test_a_gguf_file_is_parsed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However often transformers asks, and for this file only."""
    opened: list[Path] = []
    monkeypatch.setattr(gguf, "GGUFReader", opened.append)
    own = gguf.GGUFReader

    def fails(file: Path) -> None:
        for _ in range(3):
            gguf.GGUFReader(file)
        raise UserError("damaged", "use another")

    monkeypatch.setattr(gguf_file, "_read", fails)
    for _ in range(2):
        with pytest.raises(UserError, match="damaged"):
            gguf_file.dequantise(tmp_path / "a.gguf", tmp_path)
    assert len(opened) == 2 and gguf.GGUFReader == own


def test_a_gguf_file_is_the_same_target_to_a_later_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafter that was trained for it knows it by its digest."""
    packed = tiny_model()
    read = {
        "AutoConfig": packed.model.config,
        "AutoModelForCausalLM": packed.model,
        "AutoTokenizer": packed.tokenizer,
    }
    readers = {
        name: SimpleNamespace(from_pretrained=lambda *_, found=found, **__: found)
        for name, found in read.items()
    }
    monkeypatch.setattr(gguf_file, "transformers", SimpleNamespace(**readers))
    digests = set()
    for version in ("5.23.0", "99.1.0"):
        monkeypatch.setattr("transformers.configuration_utils.__version__", version)
        folder = tmp_path / version
        gguf_file.dequantise(tmp_path / "a.gguf", folder)
        assert json.loads((folder / "config.json").read_text())["transformers_version"] == "5.23.0"
        digests.add(weights_digest(folder))
    assert len(digests) == 1
    (folder / "config.json").write_text("{}")
    assert weights_digest(folder) not in digests
