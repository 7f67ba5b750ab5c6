"""Students cut from a teacher: which layers, adapters, dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Qwen3NextConfig,
)

from kdcore.errors import UserError
from kdcore.models.loading.load import load_student
from kdcore.models.loading.loaded import LoadedModel
from kdcore.specs.distill import LoraSpec, StudentSpec
from tests.kdcore.models.loading.test_loading import IDS, logits
from tests.tiny.models import FAMILIES
from tests.tiny.tiny_chat_models import saved, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [[0, 2, -1], [1], [0, 1, 2, 3]], ids=str)
def test_a_cut_is_what_its_layers_compute_and_loads_again(
    family: str, layers: list[int], tmp_path: Path
) -> None:
    teacher = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    student = load_student(StudentSpec(layers=layers), teacher)

    # the same computation, by skipping layers of the teacher
    kept = {index % 4 for index in layers}
    whole = teacher.model.get_decoder()
    of = whole.h if family == "gpt2" else whole.layers
    hooks = [
        layer.register_forward_hook(
            lambda module, args, out: (args[0],) if isinstance(out, tuple) else args[0]
        )
        for place, layer in enumerate(of)
        if place not in kept
    ]
    with torch.inference_mode():
        expected = teacher.model(input_ids=IDS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(logits(student.model), expected)

    folder = saved(student, tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again), logits(student.model))
    assert again.config.num_hidden_layers == len(layers)
    answer = again.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(
        answer,
        student.model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0),
    )

    # nothing is shared: the teacher is whole, before and after the student learns
    assert all(parameter.requires_grad for parameter in student.model.parameters())
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(1.0)
    assert teacher.model.config.num_hidden_layers == 4
    assert before.keys() == teacher.model.state_dict().keys()
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_cut_keeps_its_tied_weights_tied() -> None:
    student = load_student(StudentSpec(layers=[0]), tiny_model("llama")).model
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert tiny_model("llama").model.lm_head.weight is not student.lm_head.weight


def test_students_have_digests_of_their_own() -> None:
    teacher = tiny_model()
    digests = {
        load_student(StudentSpec(layers=layers), teacher).digest for layers in ([0], [1], [0, 1])
    }
    assert len(digests | {teacher.digest}) == 4


@pytest.mark.parametrize(
    ("layers", "cause"),
    [
        ([0, 4], "layers [4] do not exist: the model has layers 0 to 3"),
        ([-5], "layers [-5] do not exist: the model has layers 0 to 3"),
        ([0, 0], "layers [0, 0] must be in increasing order without repeats"),
        ([3, -1], "layers [3, -1] must be in increasing order without repeats"),
        ([2, 1], "layers [2, 1] must be in increasing order without repeats"),
        ([], "layers [] must be in increasing order without repeats"),
    ],
)
def test_layers_that_cannot_be_kept(layers: list[int], cause: str) -> None:
    with pytest.raises(UserError) as raised:
        load_student(StudentSpec(layers=layers), tiny_model())
    assert raised.value.cause == cause


def test_layers_that_would_change_their_kind_are_refused() -> None:
    from transformers import Qwen2MoeConfig

    config = Qwen2MoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, num_experts=4, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, decoder_sparse_step=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    teacher = LoadedModel(model, tiny_tokenizer(), "experts", "digest")
    with pytest.raises(UserError, match="a layer's index decides its type"):
        load_student(StudentSpec(layers=[1, 3]), teacher)
    assert load_student(StudentSpec(layers=[2, 3]), teacher).model.config.num_hidden_layers == 2


def test_layers_without_attention_are_refused() -> None:
    config = Qwen3NextConfig(
        vocab_size=290, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    teacher = LoadedModel(model, tiny_tokenizer(), "linear", "digest")
    with pytest.raises(UserError, match=r"layers \[0, 1\] of .* do not contain an attention"):
        load_student(StudentSpec(layers=[0, 1]), teacher)
    student = load_student(StudentSpec(layers=[0, 3]), teacher).model
    assert student.config.layer_types == ["linear_attention", "full_attention"]
    assert logits(student).shape == (1, 8, 290)


def test_a_student_of_its_own_may_be_cut_too(tmp_path: Path) -> None:
    folder = saved(tiny_model("qwen2", seed=3), tmp_path / "own")
    student = load_student(StudentSpec(model=str(folder), layers=[0, 3]), tiny_model())
    assert student.model.config.num_hidden_layers == 2
    assert student.model.config.layer_types == ["full_attention", "sliding_attention"]
    assert student.name == f"{folder}, layers [0, 3]"


def test_adapters_alone_learn() -> None:
    teacher = tiny_model()
    student = load_student(StudentSpec(lora=LoraSpec(r=2)), teacher)
    learns = [name for name, p in student.model.named_parameters() if p.requires_grad]
    assert learns and all("lora_" in name for name in learns)
    cut: Any = load_student(StudentSpec(layers=[0], lora=LoraSpec(r=2)), teacher).model
    named = cut.peft_config["default"].base_model_name_or_path
    assert named == f"{teacher.name}, layers [0]", "as the user names it, and no folder of a cache"
    torch.testing.assert_close(logits(student.model), logits(teacher.model))
    assert not any("lora" in name for name, _ in teacher.model.named_parameters())
    with pytest.raises(UserError, match="do not fit LlamaForCausalLM"):
        load_student(StudentSpec(lora=LoraSpec(targets=["nothing"])), teacher)


def test_a_student_takes_its_dtype() -> None:
    student = load_student(StudentSpec(layers=[0], dtype="bfloat16"), tiny_model())
    assert student.model.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_more_classes_is_cut_to_those_of_its_teacher(
    family: str, tmp_path: Path
) -> None:
    """Nothing would teach it to give the others no probability, which the saved model would."""
    teacher, wide = tiny_model(extra=4), tiny_model(family, extra=30)
    right = logits(wide.model)[..., :294]
    spec = StudentSpec(model=str(saved(wide, tmp_path)))
    student = load_student(spec, teacher, classes=teacher.classes)
    assert student.classes == student.model.config.vocab_size == 294
    torch.testing.assert_close(logits(student.model), right)
    outline = load_student(spec, teacher, classes=teacher.classes, weights=False)
    assert outline.classes == 294
    narrow = load_student(StudentSpec(layers=[0]), teacher, classes=300)
    assert narrow.classes == 294


def test_a_students_router_has_no_loss_of_its_own(tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    asked = {"model_type": "mixtral", "output_router_logits": True, **shape}
    with pytest.raises(UserError, match="new mixtral sets output_router_logits") as caught:
        load_student(StudentSpec(model="new", config=asked), tiny_model(), weights=False)
    assert "output_router_logits: false" in caught.value.cure
    asked["output_router_logits"] = False
    load_student(StudentSpec(model="new", config=asked), tiny_model(), weights=False)
