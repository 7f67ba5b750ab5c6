"""EAGLE-3 drafters go to other engines' folders and come back, and published ones come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdcore.components.choice import Choice
from kdcore.components.component import Component
from kdcore.components.hookspecs import hookimpl
from kdcore.components.registry import Registry, installed
from kdcore.decoding.drafters.exchange import export_drafter, import_drafter
from kdcore.decoding.drafters.files import load_drafter, read_config, save_drafter
from kdcore.decoding.loop import Decoder, Stop
from kdcore.errors import UserError
from kdcore.evaluation.doctor import examine
from kdcore.models.loading.loaded import LoadedModel
from kdcore.training.views import DrafterView
from kdcore_baselines import plugin as baselines
from kdcore_baselines.drafting_components import Eagle3Params
from kdcore_baselines.verifiers import Greedy
from kdcore_cli import main
from tests.tiny.targets import generated, padded
from tests.tiny.tiny_chat_models import saved, tiny_model
from tests.tiny.trained_drafters import batch_of, bound

ROWS = [[5, 9, 200, 31, 7, 7, 150, 64], [12, 13, 88]]
REGISTRY = installed()
THREE = (1, 2, 3)


@pytest.fixture(scope="module")
def target() -> LoadedModel:
    return tiny_model("llama")


def folder_of(path: Path, target: LoadedModel, **params: Any) -> Path:
    """A drafter of ours, with weights that all matter, as a folder."""
    given = {"depth": 3, "features": THREE, **params}
    drafter = bound("eagle3", target.model, **given)
    if "vocabulary" in given:
        counts = torch.zeros(target.classes, dtype=torch.int64)
        counts[torch.randperm(target.classes)[: given["vocabulary"]]] = 1
        drafter.choose_vocabulary(counts)
    choice = Choice("drafter", "eagle3", Eagle3Params(**given))
    save_drafter(path, drafter, choice, target, REGISTRY)
    return path


def logits(folder: Path, target: LoadedModel) -> Tensor:
    drafter: Any = load_drafter(folder, target, REGISTRY)
    batch = batch_of(ROWS)
    features, _ = DrafterView(target.model, drafter).read(batch)
    with torch.no_grad():
        hidden = drafter(batch.inputs["input_ids"], features)
        return drafter.head.finish(drafter.head.linear(hidden))


@pytest.mark.parametrize("layout", ["sglang", "vllm"])
@pytest.mark.parametrize("params", [{}, {"vocabulary": 40, "layer": {"ffn": 20, "theta": 50.0}}])
def test_what_was_exported_and_imported_gives_equal_logits(
    layout: str, params: dict, target: LoadedModel, tmp_path: Path
) -> None:
    ours = folder_of(tmp_path / "ours", target, **params)
    export_drafter(ours, layout, tmp_path / "theirs", target, REGISTRY)
    import_drafter(tmp_path / "theirs", tmp_path / "again", target, REGISTRY)
    before, after = (load_drafter(tmp_path / n, target, REGISTRY) for n in ("ours", "again"))
    assert before.layers == after.layers == THREE
    assert before.layer_size == after.layer_size
    known = (before.vocabulary, after.vocabulary)
    assert known == (None, None) or known[0].equal(known[1])
    assert torch.equal(logits(ours, target)[:, :, :3], logits(tmp_path / "again", target)[:, :, :3])


@pytest.mark.parametrize("layout", ["sglang", "vllm"])
def test_a_layout_holds_what_its_engine_reads(
    layout: str, target: LoadedModel, tmp_path: Path
) -> None:
    ours = folder_of(tmp_path / "ours", target, vocabulary=40)
    export_drafter(ours, layout, tmp_path / "theirs", target, REGISTRY)
    weights = load_file(tmp_path / "theirs/model.safetensors")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    drafter: Any = load_drafter(ours, target, REGISTRY)
    layer = "midlayer" if layout == "sglang" else "layers.0"
    of_layer = {
        **{f"self_attn.{n}_proj.weight": (16, 32) for n in "q"},
        **{f"self_attn.{n}_proj.weight": (8, 32) for n in "kv"},
        "self_attn.o_proj.weight": (16, 16),
        **{f"mlp.{n}_proj.weight": (24, 16) for n in ("gate", "up")},
        "mlp.down_proj.weight": (16, 24),
        **{
            f"{n}.weight": (16,)
            for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        },
    }
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        "fc.weight": (16, 48),
        "norm.weight": (16,),
        "lm_head.weight": (40, 16),
        "d2t": (40,),
        "t2d": (290,),
        **{f"{layer}.{name}": shape for name, shape in of_layer.items()},
    }
    assert weights["d2t"].dtype == torch.int64 and weights["t2d"].dtype == torch.bool
    assert (weights["d2t"] + torch.arange(40)).equal(drafter.vocabulary)
    assert weights["t2d"].nonzero()[:, 0].equal(drafter.vocabulary)
    assert config["draft_vocab_size"] == 40
    sizes = config if layout == "sglang" else config["transformer_layer_config"]
    assert (sizes["vocab_size"], sizes["hidden_size"], sizes["head_dim"]) == (290, 16, 8)
    if layout == "sglang":  # which counts the outputs of layers
        assert config["architectures"] == ["LlamaForCausalLMEagle3"]
        assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    else:  # which counts their inputs
        assert config["speculators_model_type"] == "eagle3"
        assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
        assert config["norm_before_residual"] is False
        methods = config["speculators_config"]
        assert methods["proposal_methods"][0]["speculative_tokens"] == 3
        assert methods["verifier"] == {
            "name_or_path": "tiny-llama",
            "architectures": ["LlamaForCausalLM"],
        }


PUBLISHED = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 290,
    "draft_vocab_size": 30,
}


def published(path: Path, config: dict[str, Any] = PUBLISHED, **more: Tensor) -> Path:
    """A folder as they are published: half precision, and a layer that is not the target's."""
    random = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return (0.2 * torch.randn(shape, generator=random)).half()

    known = torch.randperm(290, generator=random)[:30].sort().values
    weights = {
        "fc.weight": weight(16, 48),
        "norm.weight": weight(16),
        "lm_head.weight": weight(30, 16),
        "d2t": known - torch.arange(30),
        "t2d": torch.isin(torch.arange(290), known),
        "midlayer.self_attn.q_proj.weight": weight(16, 32),
        "midlayer.self_attn.k_proj.weight": weight(8, 32),
        "midlayer.self_attn.v_proj.weight": weight(8, 32),
        "midlayer.self_attn.o_proj.weight": weight(16, 16),
        "midlayer.mlp.gate_proj.weight": weight(24, 16),
        "midlayer.mlp.up_proj.weight": weight(24, 16),
        "midlayer.mlp.down_proj.weight": weight(16, 24),
        "midlayer.input_layernorm.weight": weight(16),
        "midlayer.hidden_norm.weight": weight(16),
        "midlayer.post_attention_layernorm.weight": weight(16),
    }
    path.mkdir()
    save_file({**weights, **more}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_published_folder_runs(tmp_path: Path, target: LoadedModel) -> None:
    theirs = published(tmp_path / "theirs")
    import_drafter(theirs, tmp_path / "ours", target, REGISTRY)
    drafter: Any = load_drafter(tmp_path / "ours", target, REGISTRY)
    weights = load_file(theirs / "model.safetensors")
    for name, weight in weights.items():
        if name not in ("d2t", "t2d"):
            assert drafter.state_dict()[name].equal(weight.float())
    size = drafter.layer_size
    assert (size.heads, size.key_heads, size.head) == (4, 2, 4)
    assert (size.eps, size.theta) == (1e-5, 10000.0)
    assert weights["t2d"].nonzero()[:, 0].equal(drafter.vocabulary)
    decoder = Decoder(target.model, drafter, Greedy(None, None))
    found = decoder.generate(*padded(ROWS), Stop(12))
    assert found == generated(target.model, ROWS, 12, eos_token_id=None)
    # what is not known of its training is not judged
    assert read_config(tmp_path / "ours")["trained"]["template"] is None
    judged = {
        each.check: each.verdict for each in examine(tmp_path / "ours", target, ROWS, REGISTRY, 8)
    }
    assert not {"chat template", "size of the features"} & judged.keys()
    assert "wrong" not in judged.values()


def test_rows_of_the_head_in_any_order_come_in(tmp_path: Path, target: LoadedModel) -> None:
    theirs = published(tmp_path / "theirs")
    weights = load_file(theirs / "model.safetensors")
    order = torch.randperm(30)
    known = weights["d2t"] + torch.arange(30)
    weights["d2t"] = known[order] - torch.arange(30)
    weights["lm_head.weight"] = weights["lm_head.weight"][order].contiguous()
    shuffled = published(tmp_path / "shuffled")
    save_file(weights, shuffled / "model.safetensors")
    import_drafter(theirs, tmp_path / "one", target, REGISTRY)
    import_drafter(shuffled, tmp_path / "other", target, REGISTRY)
    assert torch.equal(logits(tmp_path / "one", target), logits(tmp_path / "other", target))


def test_a_folder_of_the_original_repository_is_known_by_its_weights(
    tmp_path: Path, target: LoadedModel
) -> None:
    ours = {**PUBLISHED, "architectures": ["LlamaForCausalLM"]}
    for name, config in (("named", PUBLISHED), ("unnamed", ours)):
        theirs = published(tmp_path / f"theirs-{name}", config)
        assert import_drafter(theirs, tmp_path / name, target, REGISTRY)[1] == ()
    assert torch.equal(logits(tmp_path / "named", target), logits(tmp_path / "unnamed", target))


def test_layer_ids_that_engines_number_differently_have_a_note(
    tmp_path: Path, target: LoadedModel
) -> None:
    nested = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}
    theirs = published(tmp_path / "nested", {**PUBLISHED, **nested})
    _, notes = import_drafter(theirs, tmp_path / "outputs", target, REGISTRY)
    assert len(notes) == 1 and "lists the layers [0, 1, 2]" in notes[0]
    assert load_drafter(tmp_path / "outputs", target, REGISTRY).layers == (1, 2, 3)
    theirs = published(tmp_path / "top", {**PUBLISHED, **nested["eagle_config"]})
    assert import_drafter(theirs, tmp_path / "inputs", target, REGISTRY)[1] == ()
    assert load_drafter(tmp_path / "inputs", target, REGISTRY).layers == (0, 1, 2)


REFUSED = {
    "a scaled RoPE": (
        {"rope_scaling": {"rope_type": "llama3"}},
        {},
        "type of RoPE of the drafter is llama3",
    ),
    "two layers": ({"num_hidden_layers": 2}, {}, "num_hidden_layers of the drafter is 2"),
    "another width": ({"hidden_size": 32}, {}, "hidden_size of the drafter is 32"),
    "another residual": (
        {"norm_before_residual": True},
        {},
        "norm_before_residual of the drafter is True",
    ),
    "a normed output": ({"norm_output": True}, {}, "norm_output of the drafter is True"),
    "a norm of each feature": ({"fc_norm": True}, {}, "fc_norm of the drafter is True"),
    "hidden states of the last layer alone": (
        {"eagle_config": {"use_aux_hidden_state": False}},
        {},
        "use_aux_hidden_state of the drafter is False",
    ),
    "a nested flag": (
        {"eagle_config": {"norm_before_fc": True}},
        {},
        "norm_before_fc of the drafter is True",
    ),
    "no heads": ({"num_attention_heads": None}, {}, "does not describe a drafter"),
    "heads that do not divide": (
        {"num_attention_heads": 3},
        {},
        "q_proj.weight is 16, .* requires 15",
    ),
    "a layer beyond all memory": ({"intermediate_size": 2**50}, {}, "is 24, .* requires 11258"),
    "more features than weights": (
        {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0] * 9}},
        {},
        "fc.weight is 48, .* requires 144",
    ),
    "a setting of another kind": ({"eagle_config": 7}, {}, "does not describe a drafter"),
    "no draft vocabulary": ({}, {"d2t": torch.zeros(0)}, "d2t of the drafter has 0 tokens"),
    "a head without rows": ({}, {"lm_head.weight": torch.ones(())}, "does not describe a drafter"),
    "fewer tokens than the head has": (
        {},
        {"d2t": torch.zeros(9)},
        "d2t of the drafter has 9 tokens, .* 30",
    ),
    "weights that are no floats": ({}, {"norm.weight": torch.ones(16).long()}, "torch.int64, not"),
    "no numbers": (
        {},
        {"norm.weight": torch.full((16,), torch.nan)},
        "norm.weight .* contains NaN or infinite",
    ),
    "norms of the heads": ({}, {"midlayer.self_attn.q_norm.weight": torch.ones(4)}, "q_norm"),
    "an embedding": ({}, {"embed_tokens.weight": torch.ones(290, 16)}, "has its own embedding"),
    "other tokens": (
        {},
        {"d2t": torch.full((30,), 280)},
        "draft vocabulary does not fit tiny-llama",
    ),
    "two vocabularies": (
        {},
        {"t2d": torch.arange(290) < 30},
        "d2t and t2d of the drafter define diff",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_ours_does_not_do_is_refused(case: str, tmp_path: Path, target: LoadedModel) -> None:
    changes, weights, words = REFUSED[case]
    theirs = published(tmp_path / "theirs", {**PUBLISHED, **changes}, **weights)
    with pytest.raises(UserError, match=words):
        import_drafter(theirs, tmp_path / "ours", target, REGISTRY)
    assert not (tmp_path / "ours").exists()


def test_a_broken_plugin_does_not_stop_an_import(tmp_path: Path, target: LoadedModel) -> None:
    class Broken:
        @hookimpl
        def kdcore_components(self) -> list[Component]:
            return [
                Component(
                    kind="drafter",
                    name="absent",
                    build="nowhere.at_all:Drafter",
                    summary="does not import",
                    source="none",
                ),
                Component(
                    kind="drafter",
                    name="baffled",
                    build=f"{__name__}:Baffled",
                    summary="raises",
                    source="none",
                ),
            ]

    registry = Registry()
    registry.register(baselines, "baselines", "kdcore", "1")
    registry.register(Broken(), "broken", "broken", "1")
    theirs = published(tmp_path / "theirs")
    choice, _ = import_drafter(theirs, tmp_path / "ours", target, registry)
    assert choice.name == "eagle3"


class Baffled:
    """A drafter that takes every config for one of its own."""

    @classmethod
    def imported(cls, config: Any, weights: Any, target: Any) -> Any:
        raise KeyError("of another layout")


def test_a_residual_that_its_readers_take_differently_is_asked_for(
    tmp_path: Path, target: LoadedModel
) -> None:
    export_drafter(
        folder_of(tmp_path / "ours", target), "vllm", tmp_path / "theirs", target, REGISTRY
    )
    file = tmp_path / "theirs/config.json"
    config = json.loads(file.read_text())
    del config["norm_before_residual"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks norm_before_residual"):
        import_drafter(tmp_path / "theirs", tmp_path / "again", target, REGISTRY)
    file.write_text(json.dumps(config | {"norm_before_residual": False}))
    import_drafter(tmp_path / "theirs", tmp_path / "again", target, REGISTRY)


def test_the_targets_own_embedding_is_no_hindrance(tmp_path: Path, target: LoadedModel) -> None:
    shared = target.model.get_input_embeddings().weight.detach().half()
    theirs = published(tmp_path / "theirs", **{"embed_tokens.weight": shared})
    import_drafter(theirs, tmp_path / "ours", target, REGISTRY)


def test_a_head_of_all_tokens_in_another_order_comes_in(
    tmp_path: Path, target: LoadedModel
) -> None:
    order = torch.randperm(290)
    head = torch.randn(290, 16)
    whole = {**PUBLISHED, "draft_vocab_size": 290}
    offsets, known = order - torch.arange(290), torch.ones(290).bool()
    for name, own in (
        ("one", {"d2t": torch.zeros(290).long(), "lm_head.weight": head}),
        ("other", {"d2t": offsets, "lm_head.weight": head[order]}),
    ):
        published(tmp_path / f"theirs-{name}", whole, t2d=known, **own)
        import_drafter(tmp_path / f"theirs-{name}", tmp_path / name, target, REGISTRY)
    assert torch.equal(logits(tmp_path / "one", target), logits(tmp_path / "other", target))


def test_folders_that_cannot_be_read_are_refused(tmp_path: Path, target: LoadedModel) -> None:
    theirs = published(tmp_path / "theirs")
    (theirs / "model.safetensors").rename(theirs / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is pickled, which can run code"):
        import_drafter(theirs, tmp_path / "ours", target, REGISTRY)
    (theirs / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="is damaged"):
        import_drafter(theirs, tmp_path / "ours", target, REGISTRY)
    for text in ("{", "[" * 100_000):
        (theirs / "config.json").write_text(text)
        with pytest.raises(UserError, match="does not contain a readable config"):
            import_drafter(theirs, tmp_path / "ours", target, REGISTRY)
    with pytest.raises(UserError, match="already exists"):
        import_drafter(theirs, theirs, target, REGISTRY)


def test_no_link_is_written_through(tmp_path: Path, target: LoadedModel) -> None:
    theirs, elsewhere = published(tmp_path / "theirs"), tmp_path / "elsewhere"
    (tmp_path / "link").symlink_to(elsewhere)
    for _ in range(2):  # to nothing, then to an empty folder
        for write in (
            lambda: import_drafter(theirs, tmp_path / "link", target, REGISTRY),
            lambda: export_drafter(theirs, "vllm", tmp_path / "link", target, REGISTRY),
        ):
            with pytest.raises(UserError, match="is a symbolic link to"):
                write()
        elsewhere.mkdir(exist_ok=True)
        assert not any(elsewhere.iterdir())


def test_what_a_layout_cannot_say_is_refused(tmp_path: Path, target: LoadedModel) -> None:
    final = folder_of(tmp_path / "final", target, features=(1, 2, 4))
    with pytest.raises(UserError, match=r"but the drafter reads \[1, 2, 4\]"):
        export_drafter(final, "sglang", tmp_path / "theirs", target, REGISTRY)
    with pytest.raises(
        UserError, match=r"does not support the layout 'sglnag'\ndid you mean 'sglang'"
    ):
        export_drafter(final, "sglnag", tmp_path / "theirs", target, REGISTRY)
    assert not (tmp_path / "theirs").exists()
    medusa = bound("medusa", target.model)
    choice = Choice("drafter", "medusa", REGISTRY.component("drafter", "medusa").params())
    save_drafter(tmp_path / "medusa", medusa, choice, target, REGISTRY)
    with pytest.raises(UserError, match=r"\(Medusa\) does not support the layout 'sglang'"):
        export_drafter(tmp_path / "medusa", "sglang", tmp_path / "theirs", target, REGISTRY)


def test_both_ways_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tiny_model("llama"), tmp_path / "model")
    theirs = str(published(tmp_path / "theirs"))
    into = ["--target", "model", "--out", "ours"]
    Path("file").write_text("")
    assert main.run(["import", theirs, "--target", "model", "--out", "file/ours"]) == 2
    assert "file/ours cannot be written: file is a file" in " ".join(
        capsys.readouterr().err.split()
    )
    assert main.run(["import", theirs, *into]) == 0
    assert main.run(["import", theirs, *into]) == 2
    assert "ours already exists" in capsys.readouterr().err
    out = ["--format", "vllm", "--out", "again"]
    assert main.run(["export", "ours", *out]) == 2
    assert "but the drafter reads [1, 2, 4]" in " ".join(capsys.readouterr().err.split())
