"""Every installed component but the sources, which need files, held to the conformance kit.

A plugin that is installed beside kdcore is walked through as well.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kdcore.components.registry import installed
from kdcore.method.records import StateSizes
from kdcore.testing import suite_of

KINDS = (
    *("gate", "splitter", "divergence", "advantage", "matcher"),
    *("momentum", "drafter", "tree", "verifier", "engine", "baseline"),
)
DISTILLED = ("task", "target", "non_target")

# What a component needs beside its defaults, or is tried with beside them: a suite for each.
ADASPEC = {"name": "adaspec", "reference": "a model"}
MEMBERS: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("gate", "uniform"): [{"params": {"weight": 0.3}}],
    ("gate", "random"): [{"params": {"rate": 0.4, "floor": 0.1}}],
    ("gate", "inverted"): [{"params": {"gate": gate}} for gate in ("speckd", "adakd", ADASPEC)],
    ("gate", "se_kd"): [
        {},
        {"params": {"fraction": [[0, 0.1], [1, 1]], "window": [[0, 0], [0.4, 1]]}},
    ],
    ("gate", "se_kd_queue"): [{"params": {"queue": 40}}],
    ("gate", "entropy"): [{}, {"params": {"threshold": 1.0}}],
    ("gate", "speckd"): [
        {"params": {"verification": verification, "beta": beta}}
        for verification in ("greedy", "sampling", "expected")
        for beta in (0.01, 1.0)
    ],
    # by its own choice, OpenVINO GenAI rounds keys and values to int8
    ("baseline", "openvino_genai"): [
        {"params": {"cache": "float32"}},
        {"params": {"cache": "float32", "prompt_lookup": 4}},
    ],
    # tests/plugins/decoders/test_gguf_file.py has what holds without its package
    ("baseline", "llama_cpp"): [],
    ("advantage", "minillm"): [
        {},
        {"params": {"length_norm": False, "own": True, "gamma": 0.9, "clip": None}},
    ],
    ("matcher", "hidden"): [
        {},
        {"params": {"pairs": [[-1, -1], [2, 3]], "distance": "cosine", "shared": False}},
    ],
    ("matcher", "attention"): [
        *({"params": {"distance": each, "pairs": None}} for each in ("kl", "mse", "mse_of_scores")),
        {"params": {"heads": "groups"}, "student": StateSizes(4, 16, 1)},
        {"params": {"heads": "mean"}, "student": StateSizes(4, 16, 3)},
    ],
    ("splitter", "by_position"): [{"params": {"positions": 3}}],
    ("splitter", "top_k_mask"): [{"params": {"part": "kd"}}],
    ("divergence", "alpha_beta"): [
        {"params": {"alpha": alpha, "beta": beta}}
        for alpha, beta in ((0.2, 0.7), (0, 0.5), (0.1, 0), (1, 1))
    ],
    ("divergence", "jsd"): [{"params": {"beta": beta}} for beta in (0, 0.5, 1)],
    ("drafter", "model"): [{"params": {"temperature": temperature}} for temperature in (0, 1.0)],
    ("tree", "backbone"): [{"params": {"k": k}} for k in (1, 3, 10)],
    ("drafter", "self_speculative"): [
        {"params": {"layers": layers, "temperature": temperature}}
        for layers, temperature in ((1, 0), ((0, 2), 1.0))
    ],
    **{
        ("drafter", name): [{"params": {"depth": 3, "layers": layers}} for layers in (1, 2)]
        for name in ("p_eagle", "dflash")
    },
    ("drafter", "eagle3"): [
        {"params": {"depth": 4, "tree": tree}}
        for tree in ({"name": "dynamic", "beams": 3, "nodes": 12}, "chain", "backbone")
    ],
    ("tree", "dynamic"): [
        {"params": {"beams": beams, "nodes": nodes}}
        for beams, nodes in ((1, 3), (4, 20), (10, 999))
    ],
    ("tree", "bestfirst"): [{"params": {"nodes": nodes}} for nodes in (1, 16, 300)],
    ("tree", "autotune"): [{"params": {"most": most}} for most in (1, 31)],
    **{
        ("momentum", policy): [
            {"terms": DISTILLED, "params": {"kernel": kernel, "weight_decay": 0.1, "clip": 1.0}}
            for kernel in ("sgd", "adamw")
        ]
        for policy in ("per_term", "dot", "deepkd")
    },
}


@pytest.fixture(autouse=True, scope="module")
def uncompiled() -> Iterator[None]:
    """What is compiled runs as it is written; test_compiled.py compiles it."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where an engine keeps what it converts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


for component, _ in installed().components():
    if component.kind in KINDS:
        for number, members in enumerate(MEMBERS.get((component.kind, component.name), [{}])):
            suite = suite_of(component, **members)
            globals()[f"{suite.__name__}{number or ''}"] = suite


def test_every_component_is_walked() -> None:
    """A misspelt entry of the table would leave a component with its defaults, unnoticed."""
    known = {(component.kind, component.name) for component, _ in installed().components()}
    assert MEMBERS.keys() <= known
    assert {kind for kind, _ in known} >= set(KINDS)


def test_every_component_says_what_it_is() -> None:
    """Sources too, which the kit walks in tests of their own."""
    for component, _ in installed().components():
        assert component.summary and component.source, component.name
        for name, field in component.params.model_fields.items():
            assert field.description, f"{component.name}.{name}"
