"""The engine openvino: graphs of many families, the cache on disk, and when it is the default."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
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

from kdcore.components.registry import installed
from kdcore.decoding import build
from kdcore.decoding.loop import Decoder, Stop
from kdcore.errors import UserError
from kdcore.jobs.preflight.drafter_cost import quick_engine
from kdcore.models.loading.loaded import LoadedModel
from kdcore.specs.parts.decoding import DraftingSpec, SamplingSpec
from kdcore_baselines.drafters.untrained import Nothing
from kdcore_baselines.verifiers import Greedy
from kdcore_openvino import compiled_pass, fastest_form, graph, stored_weights
from kdcore_openvino import engine as engine_module
from kdcore_openvino.engine import OpenVinoEngine
from kdcore_openvino.plugin import OpenVinoParams
from kdcore_openvino.target_pass import TargetPass
from tests.fixtures.processes.forked import python
from tests.tiny.targets import (
    CLASSES,
    FAMILIES,
    SIZE,
    generated,
    padded,
    prompts,
    tiny,
    tokenizer_of,
)
from tests.tiny.trained_drafters import bound

COUNT = 16


def scaled(model: Any) -> None:
    for weight in model.parameters():
        weight.data = weight.data * 1.3


def set_by_data(model: Any) -> None:
    model.lm_head.weight.data[3:30] *= -1


def merged(model: Any) -> None:
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).merge_and_unload()


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


def test_decoding_reads_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the metadata of a package would be, for each tensor of the cache that is compacted."""
    model, rows = made("llama"), prompts(3)
    decoder, compacted = decoder_of(model), []
    engine = decoder.session.engine
    compact = engine.compact
    monkeypatch.setattr(engine, "compact", lambda slots: compacted.append(compact(slots)))
    opened: list[str] = []
    watched = [True]
    sys.addaudithook(  # which cannot be removed again
        lambda event, details: opened.append(details[0]) if event == "open" and watched else None
    )
    answers = decoder.generate(*padded(rows), Stop(COUNT))
    watched.clear()
    assert compacted and answers == generated(model, rows, COUNT)
    assert opened == []


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
    engine = OpenVinoEngine(OpenVinoParams(), None)  # type: ignore[arg-type]
    assert not engine.converted(model)
    bound_engine(model)
    assert engine.converted(copy.deepcopy(model))
    monkeypatch.setattr(compiled_pass, "converted", lambda *given: 1 / 0)
    bound_engine(copy.deepcopy(model), (0, 2))
    model.lm_head.weight.data[3] = 0.6
    assert not engine.converted(model)
    before = sorted(cache.iterdir())
    with pytest.raises(UserError, match="openvino cannot run LlamaForCausalLM"):
        bound_engine(model)
    assert {each.suffix for each in {*cache.iterdir()} - {*before}} <= {".lock", ".kdcore-part"}


def test_a_graph_that_differs_from_the_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.lm_head.weight.data[4] = 0.5
    monkeypatch.setattr(engine_module, "TOLERANCE", {"exact": 0.0})
    for _ in range(2):
        with pytest.raises(UserError, match=r"logits of openvino differ .* by \d"):
            bound_engine(model)


def test_torch_reads_the_logits_of_one_row_on_one_thread() -> None:
    """Its idle threads would wait actively on the cores of the next pass; other work keeps them."""
    target = tiny("llama")
    engine = bound_engine(target)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for rows, count in ((1, 1), (2, 3)):
            engine.start(rows)
            with engine.verifying():
                assert torch.get_num_threads() == count
                with ThreadPoolExecutor() as pool:
                    assert pool.submit(torch.get_num_threads).result() == 3
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("change", [scaled, set_by_data, merged])
def test_weights_that_change_are_used_from_the_next_start(
    change: Callable[[Any], None],
) -> None:
    """torch counts none of these writes in the version of a tensor."""
    model, rows = copy.deepcopy(tiny("llama")), prompts(2)
    decoder = decoder_of(model)
    before = decoder.generate(*padded(rows), Stop(COUNT))
    change(model)
    after = decoder.generate(*padded(rows), Stop(COUNT))
    assert after == generated(model, rows, COUNT) != before


def test_hooks_are_refused() -> None:
    """A trace would have those of its moment, and a graph from the cache would have none."""
    model = copy.deepcopy(tiny("llama"))
    engine = bound_engine(model)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    for act in (lambda: engine.start(1), lambda: bound_engine(model)):
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp has forward hooks"):
            act()


def test_a_model_that_has_returned_hidden_states_is_no_other() -> None:
    """transformers leaves hooks on each layer, which listen only when they are asked."""
    model, rows = copy.deepcopy(tiny("llama")), prompts(2)
    with torch.no_grad():
        model(torch.ones(1, 2, dtype=torch.long), output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    assert decoder_of(model).generate(*padded(rows), Stop(COUNT)) == generated(model, rows, COUNT)


# drafters in the engine


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("fasteagle", {"depth": 3, "vocabulary": 40}),
        ("eagle3", {"depth": 3, "vocabulary": 40, "tree": {"name": "dynamic", "beams": 2}}),
        ("medusa", {"depth": 2}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_drafter_in_the_engine_drafts_as_in_torch(
    name: str, params: dict[str, Any], dtype: torch.dtype
) -> None:
    model, rows = copy.deepcopy(tiny("llama")).to(dtype), prompts(3)
    drafter = bound(name, model, **params).to(dtype)
    found = {}
    for where in ("torch", "engine"):
        engine = bound_engine(model, drafter.layers)
        drafter.use_engine(engine if where == "engine" else None)
        decoder = Decoder(model, drafter, Greedy(None, None), engine=engine)  # type: ignore[arg-type]
        answers = decoder.generate(*padded(rows), Stop(3 * COUNT))
        found[where] = answers, decoder.counter.accepted
    assert found["torch"][0] == found["engine"][0]
    if dtype == torch.float32:
        assert found["torch"] == found["engine"]


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


def stored(model: PreTrainedModel, weights: str) -> list[tuple[str, int]]:
    """The type and size of each constant in a graph of the model."""
    source = TargetPass(model)
    converted = graph.converted(source, *graph.traced(source, source.module()))
    stored_weights.store(converted, weights)
    constants = graph.of_type(converted, "Constant")
    return [(each.get_element_type().to_string(), each.data.size) for each in constants]


def test_only_matrices_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without rounding weights, unless that is asked for; the rotary frequencies stay exact."""
    monkeypatch.setattr(stored_weights, "LARGE", 1000)
    model = copy.deepcopy(tiny("llama"))
    sizes = {
        (weights, kind): [size for each, size in stored(model, weights) if each == kind]
        for weights, kind in (("exact", "f16"), ("float16", "f16"), ("int8", "u8"))
    }
    assert not sizes["exact", "f16"]
    assert sizes["float16", "f16"] and min(sizes["float16", "f16"]) >= 1000
    assert len(sizes["int8", "u8"]) == 2 * (5 * len(model.model.layers) + 1)
    rounded = stored(model.to(torch.bfloat16).float(), "exact")
    assert [size for kind, size in rounded if kind == "f16"] == sizes["float16", "f16"]


@pytest.mark.parametrize("weights", ["float16", "int8"])
def test_with_rounded_weights_drafted_output_is_that_of_plain_decoding(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_weights, "LARGE", 1000)
    model, rows = tiny("llama"), prompts(3)
    answers = []
    for drafter in (bound("medusa", model, depth=2), Nothing(None, None)):
        engine = bound_engine(model, drafter.layers, weights=weights)
        decoder = Decoder(model, drafter, Greedy(None, None), engine=engine)  # type: ignore[arg-type]
        answers.append(decoder.generate(*padded(rows), Stop(COUNT)))
    assert answers[0] == answers[1]


def test_the_faster_form_is_measured_once_and_computes_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bfloat16 model can be stored in float16 or in float32 without rounding."""
    monkeypatch.setattr(stored_weights, "LARGE", 1000)
    model = copy.deepcopy(tiny("llama")).to(torch.bfloat16)
    model.lm_head.weight.data[3] = 0.5
    tokens, places = torch.tensor([[1, 2, 3]]), torch.arange(3)[None]
    widened: list[bool] = []
    monkeypatch.setattr(
        fastest_form, "widen", lambda given: widened.append(stored_weights.widen(given)) or True
    )
    logits = []
    for order in ({"stored": 1.0, "float32": 2.0}, {"stored": 2.0, "float32": 1.0}):
        monkeypatch.setattr(fastest_form, "_times", lambda *given, order=order: order)
        for file in cache.glob("*/times.json"):
            file.unlink()
        bound_engine(model)
        monkeypatch.setattr(fastest_form, "_times", lambda *given: 1 / 0)
        widened.clear()
        engine = bound_engine(model)
        assert widened == ([] if order["stored"] < order["float32"] else [True])
        engine.start(1)
        logits.append(engine.run(tokens, places, None, None)[0])
        (file,) = cache.glob("*/times.json")
        assert [*json.loads(file.read_text()).values()] == [order]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_a_signal_is_handled_after_engines_have_gone() -> None:
    """In the order in which they came, which once left the process a stack that was unmapped."""
    done = python(
        "-c",
        """
import gc, signal
from tests.plugins.test_openvino import decoder_of, padded, prompts, Stop, tiny

engines = []
for _ in range(2):
    engines.append(decoder_of(tiny("llama")))
    engines[-1].generate(*padded(prompts(1)), Stop(2))
while engines:
    del engines[0]
    gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
signal.raise_signal(signal.SIGUSR1)
""",
    )
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_telemetry_is_off() -> None:
    ov = graph.openvino()
    assert ov.tools.ovc.telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
    assert sys.modules["openvino_telemetry"] is None


def test_a_drafters_graph_is_cached_and_follows_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny("llama")
    drafter = bound("medusa", model, seed=5, depth=2)
    engine = bound_engine(model, drafter.layers)
    drafter.use_engine(engine)
    monkeypatch.setattr(compiled_pass, "converted", lambda *given: 1 / 0)
    drafter.use_engine(engine)
    drafter.start(torch.tensor([1]))
    drafter.heads.bias.data[3] += 1
    with pytest.raises(UserError, match="openvino cannot run the drafter: ZeroDivisionError"):
        drafter.start(torch.tensor([1]))


@pytest.mark.parametrize("unsuited", [False, True])
def test_a_built_decoder_drafts_in_the_engine_where_it_can(
    unsuited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise UserError("openvino cannot run it", "another engine")

    if unsuited:
        monkeypatch.setattr(OpenVinoEngine, "compile", refuse)
    notes: list[str] = []
    said = {"drafter": {"name": "medusa", "depth": 2}, "engine": "openvino"}
    decoder = build.build_decoder(
        LoadedModel(tiny("llama"), tokenizer_of(), "llama", ""),
        DraftingSpec.model_validate(said),
        SamplingSpec.model_validate({}),
        installed(),
        notes.append,
    )
    assert (decoder.drafter.compiled is None) == unsuited  # type: ignore[attr-defined]
    assert notes == ["drafter: in torch, because openvino cannot run it"] * unsuited


# the default


def chosen(monkeypatch: pytest.MonkeyPatch, **said: Any) -> tuple[str, list[str]]:
    """The engine that a decoder has, and the lines that are shown."""
    monkeypatch.setattr(build, "WORTH", 0)
    notes: list[str] = []
    loaded = LoadedModel(tiny("llama"), tokenizer_of(), "llama", "")
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
    with pytest.raises(UserError, match=r"openvino, which is not installed\nrun: pip install"):
        bound_engine(tiny("llama"))


def test_a_check_uses_it_for_targets_that_it_has_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "WORTH", 0)
    model = copy.deepcopy(tiny("llama"))
    model.lm_head.weight.data[3] = 0.7
    loaded = LoadedModel(model, tokenizer_of(), "llama", "")
    for expected in ("torch", "openvino"):
        notes: dict[str, None] = {}
        assert quick_engine(loaded, None, installed(), notes).name == expected
        told = [line for line in notes if "openvino has not converted this target yet" in line]
        assert len(told) == len(notes) == (expected == "torch")
        bound_engine(model)
