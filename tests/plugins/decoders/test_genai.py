"""The baseline openvino_genai: what it converts and refuses, and what it keeps on disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import PreTrainedModel

from kdcore.decoding.baseline import DecodingSettings
from kdcore.errors import UserError
from kdcore.models.assembly import Assembly
from kdcore.models.loading.load import load_model
from kdcore.models.loading.loaded import LoadedModel
from kdcore.specs.parts.fields import ModelSpec
from kdcore_openvino.genai import GenAi
from kdcore_openvino.plugin import GenAiParams
from kdcore_openvino.signal_stack import SignalStack
from tests.tiny.targets import generated, prompts, tiny
from tests.tiny.tiny_chat_models import saved, tiny_model

ROWS = prompts(3)
SETTINGS = DecodingSettings(
    batch_size=3,
    longest_prompt=max(map(len, ROWS)),
    max_new_tokens=6,
    temperature=0.0,
    ends=(),
    threads=1,
)


@pytest.fixture(autouse=True)
def same_signal_stack() -> Iterator[None]:
    """A stack that OpenVINO left would end the process at the next signal."""
    before = bytes(SignalStack.current())
    yield
    assert bytes(SignalStack.current()) == before


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def decoded(model: PreTrainedModel, params: GenAiParams) -> list[list[int]] | None:
    baseline = GenAi(params, Assembly())
    baseline.bind(LoadedModel(model, None, "tiny", "a digest"))
    baseline.start(SETTINGS)
    return baseline.decode(ROWS, 0).answers


def test_a_converted_folder_is_kept_and_can_be_given(cache: Path) -> None:
    """GPT-2 has learned positions and other names than the Llama of the conformance suite."""
    model = tiny("gpt2")
    found = decoded(model, GenAiParams())
    expected = generated(model, ROWS, SETTINGS.max_new_tokens)
    assert found == expected
    (folder,) = (each for each in (cache / "openvino").iterdir() if each.is_dir())
    before = (folder / "openvino_model.bin").stat().st_mtime_ns
    assert decoded(model, GenAiParams()) == found
    assert (folder / "openvino_model.bin").stat().st_mtime_ns == before
    given = GenAi(GenAiParams(model=folder), Assembly())
    assert given.digest is not None and GenAi(GenAiParams(), Assembly()).digest is None
    assert decoded(tiny("llama"), GenAiParams(model=folder)) == found


def test_another_model_drafts_in_its_own_speculative_decoding(tmp_path: Path) -> None:
    """It changes no token, and other files of the draft model are another input."""
    target, small = tiny_model(), tiny_model(seed=3)
    rows = [[5, 6, 7, 8], [9, 10, 11]]
    found = []
    for given in ({}, {"draft_model": str(saved(small, tmp_path / "small")), "draft_tokens": 2}):
        baseline = GenAi(GenAiParams(cache="float32", **given), Assembly())
        baseline.bind(target)
        baseline.start(replace(SETTINGS, batch_size=2))
        found.append(baseline.decode(rows, 0).answers)
        baseline.close()
    assert found[0] == found[1] == generated(target.model, rows, SETTINGS.max_new_tokens)
    assert baseline.digest == load_model(ModelSpec(model=str(tmp_path / "small"))).digest
    small.tokenizer.add_tokens(["another"])
    other = GenAi(GenAiParams(draft_model=str(saved(small, tmp_path / "other"))), Assembly())
    with pytest.raises(UserError, match="have different tokenizers") as refusal:
        other.bind(target)
    assert "set draft_model of the baseline openvino_genai" in str(refusal.value.cure)
    with pytest.raises(ValidationError, match="cannot both be set"):
        GenAiParams(draft_model="any", prompt_lookup=3)


def test_layers_with_a_window_are_refused() -> None:
    """GenAI's attention would read all tokens before."""
    with pytest.raises(UserError, match="MistralForCausalLM have a sliding window"):
        decoded(tiny("mistral"), GenAiParams())


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"openvino_model\.bin does not exist"):
        GenAi(GenAiParams(model=tmp_path), Assembly())


def test_without_the_package_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(UserError, match="openvino-genai is not installed") as refusal:
        GenAi(GenAiParams(), Assembly())
    assert refusal.value.cure == "pip install 'kdcore[openvino-genai]'"
