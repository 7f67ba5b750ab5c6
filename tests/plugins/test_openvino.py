"""The engine openvino: graphs of many families, the cache on disk, and when it is the default."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
    SmolLM3Config,
)

from kdcore.decoding import build
from kdcore.decoding.loop import Decoder, Stop
from kdcore.errors import UserError
from kdcore.method.registry import installed
from kdcore.models.loaded import LoadedModel
from kdcore.specs.decoding import DraftingSpec, SamplingSpec
from kdcore_baselines.verifiers import Greedy
from kdcore_openvino import engine as engine_module
from kdcore_openvino import graph
from kdcore_openvino.engine import OpenVinoEngine
from kdcore_openvino.plugin import OpenVinoParams
from tests.tiny.targets import CLASSES, FAMILIES, SIZE, generated, padded, prompts, tiny
from tests.tiny.trained_drafters import bound

COUNT = 16
OTHERS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: Qwen3Config(**SIZE, head_dim=8),
    "phi3": lambda: Phi3Config(**SIZE),
    "olmo2": lambda: Olmo2Config(**SIZE),
    "smollm3": lambda: SmolLM3Config(**SIZE),
    "granite": lambda: GraniteConfig(**SIZE),
    "gpt_neox": lambda: GPTNeoXConfig(
        **{name: SIZE[name] for name in SIZE if name != "num_key_value_heads"}
    ),
    "opt": lambda: OPTConfig(
        vocab_size=CLASSES,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=96,
        init_std=0.4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    ),
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCORE_CACHE", str(folder))
        yield folder / "openvino"


def made(family: str) -> PreTrainedModel:
    if family in FAMILIES:
        return tiny(family)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(OTHERS[family]()).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model  # type: ignore[no-any-return]


def bound_engine(model: PreTrainedModel, layers: tuple[int, ...] = (), **params: Any) -> Any:
    engine = OpenVinoEngine(OpenVinoParams(**params), None)  # type: ignore[arg-type]
    engine.bind(model, layers)
    return engine


def decoder_of(model: PreTrainedModel) -> Decoder:
    drafter = bound("medusa", model, depth=2)
    engine = bound_engine(model, drafter.layers)
    return Decoder(model, drafter, Greedy(None, None), engine=engine)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_it_decodes_what_transformers_generates(family: str) -> None:
    """Three rows of different lengths, with draft trees, until the cache is compacted."""
    model, rows = made(family), prompts(3)
    answers = decoder_of(model).generate(*padded(rows), Stop(COUNT))
    assert answers == generated(model, rows, COUNT)


def test_a_bfloat16_model_is_computed_in_float32() -> None:
    rounded = copy.deepcopy(tiny("llama")).to(torch.bfloat16)
    engine = bound_engine(rounded)
    engine.start(1)
    tokens = torch.tensor([prompts(1)[0]])
    logits, features = engine.run(tokens, torch.arange(tokens.shape[1])[None], None, None)
    assert features.shape == (*tokens.shape, 0)
    with torch.no_grad():
        expected = copy.deepcopy(rounded).float()(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_a_graph_is_converted_once_for_each_model(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.lm_head.weight.data[3] = 0.5
    bound_engine(model)
    monkeypatch.setattr(engine_module, "converted", lambda *given: 1 / 0)
    bound_engine(copy.deepcopy(model))
    model.lm_head.weight.data[3] = 0.6
    for each, layers in ((model, ()), (tiny("llama"), (2,))):
        before = sorted(cache.iterdir())
        with pytest.raises(UserError, match="openvino cannot run LlamaForCausalLM"):
            bound_engine(each, layers)
        assert {each.suffix for each in {*cache.iterdir()} - {*before}} <= {".lock", ".part"}


def test_a_graph_that_differs_from_the_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.lm_head.weight.data[4] = 0.5
    monkeypatch.setattr(engine_module, "TOLERANCE", {"exact": 0.0})
    for _ in range(2):
        with pytest.raises(UserError, match=r"logits of openvino differ .* by \d"):
            bound_engine(model)


def test_another_device_is_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny("llama").config).eval()
    with pytest.raises(UserError, match="runs on a CPU, and LlamaForCausalLM is on meta"):
        bound_engine(model)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_positions_that_depend_on_the_longest_row_are_refused(kind: str) -> None:
    """A trace would follow one of the branches for every row."""
    model = copy.deepcopy(tiny("llama"))
    model.config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0}
    with pytest.raises(UserError, match=rf"rotary positions \({kind}\) depend on the longest row"):
        bound_engine(model)


def test_a_mask_of_another_width_is_refused() -> None:
    """OpenVINO itself would read it without an error."""
    engine = bound_engine(tiny("llama"))
    engine.start(1)
    tokens, mask = torch.tensor([[1, 2]]), torch.ones(1, 2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"full_attention is \(1, 2, 3\), not \(1, 2, 2\)"):
        engine.run(tokens, torch.tensor([[0, 1]]), {"full_attention": mask}, None)


@pytest.mark.parametrize("rounded", [False, True])
def test_only_matrices_are_stored_in_float16(
    rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rounding weights, unless that is asked for; the rotary frequencies stay exact."""
    monkeypatch.setattr(graph, "LARGE", 1000)
    model = copy.deepcopy(tiny("llama"))
    halves = {}
    for weights in ("exact", "float16"):
        stored = list(graph.converted(model, (), weights).get_ops())
        constants = [each for each in stored if each.get_type_name() == "Constant"]
        sizes = [
            each.data.size for each in constants if each.get_element_type().to_string() == "f16"
        ]
        halves[weights] = len(sizes)
        assert all(size >= 1000 for size in sizes)
    assert halves["exact"] == 0 < halves["float16"]
    if rounded:
        model = model.to(torch.bfloat16).float()
        stored = graph.converted(model, (), "exact").get_ops()
        kinds = [
            e.get_element_type().to_string() for e in stored if e.get_type_name() == "Constant"
        ]
        assert kinds.count("f16") == halves["float16"]


def test_telemetry_is_off() -> None:
    ov = graph.openvino()
    assert ov.tools.ovc.telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
    assert sys.modules["openvino_telemetry"] is None


# the default


def chosen(monkeypatch: pytest.MonkeyPatch, **said: Any) -> tuple[str, list[str]]:
    """The engine that a decoder has, and the lines that are shown."""
    monkeypatch.setattr(build, "WORTH", 0)
    notes: list[str] = []
    loaded = LoadedModel(tiny("llama"), None, "llama", "")
    spec = DraftingSpec.model_validate(said)
    decoder = build.build_decoder(
        loaded, spec, SamplingSpec.model_validate({}), installed(), notes.append
    )
    return type(decoder.session.engine).__name__, notes


def test_it_is_the_default_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch) == ("OpenVinoEngine", [])
    assert chosen(monkeypatch, engine="torch") == ("TorchEngine", [])


def test_a_model_that_it_cannot_run_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise UserError("openvino cannot run it", "another engine")

    monkeypatch.setattr(OpenVinoEngine, "bind", refuse)
    assert chosen(monkeypatch) == (
        "TorchEngine",
        ["engine: torch, because openvino cannot run it"],
    )
    with pytest.raises(UserError, match="openvino cannot run it"):
        chosen(monkeypatch, engine="openvino")


def test_a_small_model_or_a_machine_without_it_uses_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = LoadedModel(tiny("llama"), None, "llama", "")
    assert build.bound_engine(loaded, (), None, installed()) is None
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert chosen(monkeypatch) == ("TorchEngine", [])
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"openvino is not installed\npip install"):
        bound_engine(tiny("llama"))
