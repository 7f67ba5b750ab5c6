"""The engine compiled: the passes of torch.compile, the shapes that recur, and what is refused.

The conformance kit runs it uncompiled, which tests all but the compilation. Here, passes are traced
and what was traced runs in torch; benchmarks/gpu.py runs what torch makes of it on a device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._dynamo.utils import counters

from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.tree import DraftTree
from kdcore.errors import UserError
from kdcore_baselines.drafting_components import DynamicParams
from kdcore_baselines.trees import Backbone, Dynamic
from kdcore_baselines.verifiers import Greedy
from kdcore_compiled.engine import CompiledEngine
from kdcore_compiled.plugin import CompiledParams
from kdcore_compiled.static_cache import recurring
from tests.tiny.targets import generated, padded, prompts, tiny
from tests.tiny.trained_drafters import bound

COUNT = 16


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing that another test compiled."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what was traced: a compiler of C++ takes minutes, and is not on every machine."""
    real = torch.compile

    def compile(function: Any, *, mode: str, **options: Any) -> Any:
        return real(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", compile)


def engine_of(model: Any, layers: tuple[int, ...] = (), **params: Any) -> CompiledEngine:
    engine = CompiledEngine(CompiledParams(**params))
    engine.bind(model, layers)
    return engine


def decoder_of(model: Any) -> Decoder:
    drafter = bound("medusa", model, depth=2)
    engine = engine_of(model, drafter.layers)
    return Decoder(model, drafter, Greedy(None, None), engine=engine)  # type: ignore[arg-type]


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_it_decodes_what_transformers_generates(family: str) -> None:
    """Rows of different lengths leave one after the other; a second answer compiles nothing."""
    model, rows = tiny(family), prompts(3)
    decoder = decoder_of(model)
    expected = generated(model, rows, COUNT)
    assert decoder.generate(*padded(rows), Stop(COUNT)) == expected
    compiled = graphs()
    assert 0 < compiled <= 3, "a shape for 3, 2 and 1 rows at most"
    assert decoder.generate(*padded(rows), Stop(COUNT)) == expected
    assert graphs() == compiled


def _set_by_data(model: Any) -> None:
    model.lm_head.weight.data = -model.lm_head.weight.data


def _merged(model: Any) -> None:
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).merge_and_unload()


@pytest.mark.usefixtures("traced")
def test_the_weights_are_those_of_the_moment() -> None:
    """`.data` replaces what a weight points to, and a merged adapter replaces modules."""
    model, rows = copy.deepcopy(tiny("llama")), prompts(1)
    decoder = decoder_of(model)
    found = [decoder.generate(*padded(rows), Stop(COUNT))]
    for change in (_set_by_data, _merged):
        change(model)
        found.append(decoder.generate(*padded(rows), Stop(COUNT)))
        assert found[-1] == generated(model, rows, COUNT) != found[-2]


TREES: dict[str, tuple[dict[str, Any], Any]] = {
    "fasteagle": ({}, Backbone(2)),
    "medusa": ({}, Backbone(2)),
    "p_eagle": ({"layers": 2}, Backbone(2)),
    "eagle3": ({}, Dynamic(DynamicParams(beams=2, nodes=4), None)),  # type: ignore[arg-type]
}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", TREES)
def test_a_drafter_proposes_what_it_proposes_in_torch(name: str) -> None:
    """In each round; after a change of its weights too, for which nothing is compiled."""
    params, tree = TREES[name]
    model, rows = tiny("llama"), prompts(2)
    drafter = bound(name, model, depth=2, **params).eval()
    drafter.tree = tree
    engine = engine_of(model, drafter.layers)
    proposed: list[list[int]] = []
    propose = drafter.propose

    def recorded(*given: Any) -> DraftTree:
        tree = propose(*given)
        proposed.append(tree.tokens[tree.mask].tolist())
        return tree

    drafter.propose = recorded
    expected, compiled = generated(model, rows, 8), []
    for factor in (1.0, 1.5):
        with torch.no_grad():
            for weight in drafter.parameters():
                weight *= factor
        found = []
        for runs in (None, engine):
            drafter.use_engine(runs)
            proposed.clear()
            decoder = Decoder(model, drafter, Greedy(None, None))  # type: ignore[arg-type]
            assert decoder.generate(*padded(rows), Stop(8)) == expected
            found.append([*proposed])
        assert found[0] == found[1]
        compiled.append(graphs())
    assert 0 < compiled[0] == compiled[1] <= 4


@pytest.mark.usefixtures("traced")
def test_a_drafter_in_bfloat16_stays_so() -> None:
    """Its masks are rounded to its dtype, in which the least float32 would be infinite."""
    model = copy.deepcopy(tiny("llama")).bfloat16()
    drafter = bound("fasteagle", model, depth=2).eval().bfloat16()
    drafter.use_engine(engine_of(model, drafter.layers))
    random = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, drafter.fuse_features.in_features, generator=random).bfloat16()
    tokens, logp = torch.arange(10).view(2, 5), []
    for compiled in (drafter.compiled, None):
        drafter.compiled = compiled
        drafter.start(tokens[:, 0])
        with torch.no_grad():
            for counts in ([5, 3], [1, 0], [2, 3]):
                given = tokens[:, : max(counts)], features[:, : max(counts)], torch.tensor(counts)
                found = _logp(drafter, *given)
                logp.append(found[given[2] > 0])
    for own, other in zip(logp[:3], logp[3:], strict=True):
        torch.testing.assert_close(own, other, rtol=0.05, atol=0.05)
        assert own.isfinite().all()
    assert graphs() == 2


def _logp(drafter: Any, tokens: Tensor, features: Tensor, lengths: Tensor) -> Tensor:
    """The log-probs [B, D, V] that a FastEagle makes its tree of."""
    seen: list[Tensor] = []
    drafter.tree = lambda logp, active: seen.append(logp) or Backbone(1)(logp, active)
    drafter.propose(tokens, features, lengths, None)
    return seen[0].float()


@pytest.mark.usefixtures("traced")
def test_passes_of_similar_sizes_share_a_shape() -> None:
    model = tiny("llama")
    engine = engine_of(model)
    engine.start(1)
    engine.run(torch.ones(1, 3).long(), torch.arange(3)[None], None, None)
    for count in (5, 6, 8):
        seen = torch.ones(1, count, engine.slots + count).bool().tril(engine.slots)
        places = engine.slots + torch.arange(count)[None]
        engine.run(torch.ones(1, count).long(), places, {"full_attention": seen}, None)
    assert graphs() == 1 and engine.slots == 3 + 5 + 6 + 8
    assert [recurring(size) for size in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]


@pytest.mark.usefixtures("traced")
def test_a_longer_pass_runs_uncompiled() -> None:
    model = tiny("llama")
    for longest, compiled in ((4, 0), (5, 1)):
        engine = engine_of(model, tokens=longest)
        engine.start(1)
        engine.run(torch.ones(1, 1).long(), torch.zeros(1, 1).long(), None, None)
        seen = torch.ones(1, 5, 6).bool().tril(1)
        places = 1 + torch.arange(5)[None]
        engine.run(torch.ones(1, 5).long(), places, {"full_attention": seen}, None)
        assert graphs() == compiled


@pytest.mark.usefixtures("traced")
def test_hooks_are_refused() -> None:
    """Those of the first pass would be compiled, and later ones not seen."""
    model = copy.deepcopy(tiny("llama"))
    engine = engine_of(model)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    for act in (lambda: engine.start(1), lambda: engine_of(model)):
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp has forward hooks"):
            act()


@pytest.mark.usefixtures("traced")
def test_a_model_that_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny("llama"))
    forward = model.model.layers[0].mlp.forward

    def broken(states: Any) -> Any:
        torch._dynamo.graph_break()
        return forward(states)

    monkeypatch.setattr(model.model.layers[0].mlp, "forward", broken)
    with pytest.raises(UserError, match=r"torch cannot compile LlamaForCausalLM: .*graph_break"):
        decoder_of(model).generate(*padded(prompts(1)), Stop(COUNT))
