"""What a spec says of a model reaches transformers: attention, dtype, place, adapter, subfolder."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from kdcore.errors import UserError
from kdcore.models.folder import quantization
from kdcore.models.folder.quantization import refuse_quantized_training
from kdcore.models.loading.load import load_model, load_student
from kdcore.specs.distill import DistillSpec, LoraSpec, StudentSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore.specs.train_drafter import TrainDrafterSpec
from tests.kdcore.models.loading.test_loading import complaint, logits
from tests.tiny.tiny_chat_models import saved, tiny_model

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16, in the subfolder of another."""
    home = tmp_path_factory.mktemp("model")
    saved(tiny_model(seed=1), home)
    coarse = tiny_model()
    coarse.model.to(torch.bfloat16)  # type: ignore[arg-type]
    saved(coarse, home / "coarse")
    return home


def asked_of_transformers(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, **replaced: Any
) -> dict[str, Any]:
    """The arguments that reach from_pretrained, which then loads the model with others."""
    read, seen = AutoModelForCausalLM.from_pretrained, {}

    def from_pretrained(folder: Path, **given: Any) -> Any:
        seen.update(given)
        return read(folder, **{k: v for k, v in given.items() if k not in replaced})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_model(spec)
    return seen


def test_the_fields_reach_from_pretrained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = asked_of_transformers(ModelSpec(model=str(folder)), monkeypatch)
    left = {"attn_implementation", "device_map", "quantization_config", "distributed_config"}
    assert plain["dtype"] == torch.float32 and not left & plain.keys()
    spec = ModelSpec(
        model=str(folder), dtype="auto", attention="eager", device="auto", quantization=FOUR_BITS
    )
    # transformers itself is not asked, so the package may be absent
    monkeypatch.setattr(quantization, "refuse_without_package", lambda _: None)
    asked = asked_of_transformers(spec, monkeypatch, quantization_config=None)
    assert (asked["dtype"], asked["attn_implementation"], asked["device_map"]) == (
        "auto", "eager", "auto",
    )  # fmt: skip
    assert isinstance(asked["quantization_config"], BitsAndBytesConfig)
    assert asked["quantization_config"].bnb_4bit_quant_type == "nf4"


def test_dtype_auto_is_that_of_the_files(folder: Path) -> None:
    spec = {"model": str(folder), "subfolder": "coarse", "dtype": "auto"}
    assert load_model(ModelSpec(**spec)).model.dtype == torch.bfloat16
    assert load_model(ModelSpec(**spec), weights=False).model.dtype == torch.bfloat16
    student = load_student(StudentSpec(**spec), None)
    assert student.model.dtype == torch.bfloat16


def test_a_float16_student_is_refused(folder: Path, tmp_path: Path) -> None:
    half = tiny_model()
    half.model.to(torch.float16)  # type: ignore[arg-type]
    spec = StudentSpec(model=str(saved(half, tmp_path)), dtype="auto")
    with pytest.raises(UserError, match="are in float16, which cannot be trained"):
        load_student(spec, None, weights=False)


def test_a_subfolder_is_another_model(folder: Path) -> None:
    within = load_model(ModelSpec(model=str(folder), subfolder="coarse"))
    assert within.digest == load_model(ModelSpec(model=str(folder / "coarse"))).digest
    assert within.digest != load_model(ModelSpec(model=str(folder))).digest
    lost = complaint(ModelSpec(model=str(folder), subfolder="fine"))
    assert "does not contain a folder fine" in lost.cause and "coarse" in lost.cure
    with pytest.raises(ValidationError, match="not a folder inside the model's"):
        ModelSpec(model=str(folder), subfolder="../other")


def test_an_own_device_stays(folder: Path) -> None:
    loaded = load_model(ModelSpec(model=str(folder), device="cpu"))
    loaded.to(torch.device("meta"))
    assert loaded.model.device.type == "cpu"
    assert "no device 'cuda:7'" in complaint(ModelSpec(model=str(folder), device="cuda:7")).cause
    alone = complaint(ModelSpec(model=str(folder), device="sharded"))
    assert "over several processes, and there is one" in alone.cause
    assert "accelerate launch" in alone.cure


def adapter(folder: Path, place: Path) -> Any:
    """A trained adapter for a model, in a folder of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    adapted.save_pretrained(place)
    return adapted


def test_an_adapter_is_part_of_the_model(folder: Path, tmp_path: Path) -> None:
    right = logits(adapter(folder, tmp_path / "adapter"))
    spec = {"model": str(folder), "adapter": str(tmp_path / "adapter")}
    for loaded in (load_model(ModelSpec(**spec)), load_student(StudentSpec(**spec), None)):
        torch.testing.assert_close(logits(loaded.model), right, rtol=1e-4, atol=1e-4)
        assert loaded.digest != load_model(ModelSpec(model=str(folder))).digest
    assert not torch.allclose(logits(load_model(ModelSpec(model=str(folder))).model), right)


def test_adapters_that_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    adapter(folder, tmp_path / "adapter")
    other = saved(tiny_model("gpt2"), tmp_path / "other")
    spec = {"adapter": str(tmp_path / "adapter")}
    unlike = complaint(ModelSpec(model=str(other), **spec))
    assert f"does not fit {other}" in unlike.cause and "trained on" in unlike.cure
    alone = complaint(ModelSpec(model=str(tmp_path / "adapter")))
    assert alone.cause.endswith("contains an adapter of peft, and no model")
    assert "model/ of a run" in alone.cure
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))  # peft would unpickle it
    pickled = complaint(ModelSpec(model=str(folder), **spec))
    assert "does not contain adapter_model.safetensors" in pickled.cause
    nowhere = complaint(ModelSpec(model=str(folder), adapter=str(tmp_path / "nowhere")))
    assert nowhere.cause == f"the adapter '{tmp_path}/nowhere' is not a folder or a hub id"
    assert nowhere.cure == pickled.cure


TORCHAO = ("'quant_type' is missing", "TorchAoConfig")
if not find_spec("torchao"):
    TORCHAO = ("requires the package torchao", "kdcore[quantized]")


@pytest.mark.parametrize(
    ("fields", "cause", "cure"),
    [
        ({"attention": "flash_attention_2"}, "requires the package flash-attn", "attention: sdpa"),
        ({"quantization": {"quant_method": "gptx"}}, "'gptx' is unknown", "gptq"),
        ({"quantization": {"quant_method": "bitsandbytes"}}, "how many bits", "load_in_4bit: true"),
        ({"quantization": {"quant_method": "torchao"}}, *TORCHAO),
    ],
)
def test_what_transformers_could_not_do(
    folder: Path, fields: dict[str, Any], cause: str, cure: str
) -> None:
    for weights in (True, False):
        with pytest.raises(UserError) as caught:
            load_model(ModelSpec(model=str(folder), **fields), weights=weights)
        assert cause in caught.value.cause and cure in caught.value.cure


@pytest.mark.parametrize(
    ("method", "student", "cause", "cure"),
    [
        ("gptq", {}, "quantised (gptq), and quantised weights cannot be trained", "student.lora"),
        ("gptq", {"lora": LoraSpec()}, "cannot be merged", "load_in_4bit: true"),
        ("bitsandbytes", {}, "quantised (bitsandbytes)", "full precision"),
    ],
)
def test_a_quantised_student_is_refused_by_its_config(
    tmp_path: Path, method: str, student: dict[str, Any], cause: str, cure: str
) -> None:
    config = json.loads(tiny_model().model.config.to_json_string(use_diff=False))
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))  # there are no weights to read
    with pytest.raises(UserError) as caught:
        refuse_quantized_training(StudentSpec(model=str(tmp_path), **student), None)
    assert cause in caught.value.cause and cure in caught.value.cure
    twice = StudentSpec(model=str(tmp_path), quantization=FOUR_BITS, lora=LoraSpec())
    with pytest.raises(UserError, match="are quantised already"):
        refuse_quantized_training(twice, None)
    adapted = StudentSpec(model=str(tmp_path), lora=LoraSpec())
    with pytest.raises(UserError, match=r"FSDP does not shard the quantised weights of .*\n.*fsdp"):
        refuse_quantized_training(adapted, None, sharded=True)


SOURCE = {"name": "chat", "path": "rows.jsonl"}
DISTILL = {"data": {"train": SOURCE}, "student": {"model": "s"}, "teacher": {"model": "t"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"model": "s", "quantization": FOUR_BITS}}, "set lora"),
        ({"student": {"model": "s", "device": "cuda:1"}}, "trained on the devices of its process"),
        ({"student": {"layers": [0], "adapter": "a"}}, "adapter applies to the files of a model"),
        (
            {"student": {"model": "s", "quantization": FOUR_BITS, "lora": {}, "layers": [0]}},
            "a quantised student does not support layers",
        ),
        (
            {"student": {"layers": [0]}, "teacher": {"model": "t", "device": "sharded"}},
            "set student.model to t too",
        ),
        (
            {"student": {"layers": [0]}, "teacher": {"model": "t", "quantization": FOUR_BITS}},
            "a teacher that is quantised cannot be copied",
        ),
        (
            {
                "teacher": {"model": "t", "device": "sharded"},
                "data": {"train": SOURCE, "responses": {"by": "teacher"}},
            },
            "generate the responses first",
        ),
        (
            {
                "teacher": {"model": "t", "device": "sharded"},
                "data": {"train": SOURCE, "on_policy": {"policy": "interleaved"}},
            },
            "on_policy.policy=interleaved asks the teacher in each process",
        ),
    ],
)
def test_specs_that_cannot_be_carried_out(changes: dict[str, Any], message: str) -> None:
    DistillSpec.model_validate(DISTILL)
    with pytest.raises(ValidationError, match=message):
        DistillSpec.model_validate(DISTILL | changes)


def test_a_target_is_where_its_drafter_is() -> None:
    spec = {"job": "train-drafter", "target": {"model": "t"}, "drafter": "medusa"}
    TrainDrafterSpec.model_validate(spec | {"data": {"train": SOURCE}})
    spec["target"] = {"model": "t", "device": "auto"}
    with pytest.raises(ValidationError, match=r"remove target\.device"):
        TrainDrafterSpec.model_validate(spec | {"data": {"train": SOURCE}})
