"""Rows that are longer than a model reads: found by the check and before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma3nTextConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XLNetConfig,
    XLNetModel,
)

from kdcore.errors import UserError
from kdcore.jobs.evaluate import evaluate
from kdcore.models.anatomy import context_of, final_scale
from kdcore.models.facts import end_ids, token_texts
from kdcore.specs.evaluate import EvaluateSpec
from kdcore.specs.jobs import JOBS
from kdcore.specs.parts.fields import SpecModel
from tests.fixtures.json_lines import write_lines
from tests.tiny.tiny_chat_models import saved, tiny_model, tiny_tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["</s>"], show_progress=False)
    core.train_from_iterator(["the teacher and a student sat on the mat"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), sentencepiece()], ids=["bytes", "pieces"])
def test_a_token_is_shown_with_its_space(tokenizer: Any) -> None:
    ids = tokenizer("the teacher sat on")["input_ids"]
    assert len(ids) > 3
    assert "".join(token_texts(tokenizer, ids)).lstrip() == "the teacher sat on"
    end = tokenizer.eos_token_id
    assert token_texts(tokenizer, [end]) == [tokenizer.eos_token]


def test_a_character_of_several_tokens_belongs_to_the_last_of_them() -> None:
    tokenizer = tiny_tokenizer()
    text = "a日 mat \ufffd 😀é"
    ids = tokenizer(text)["input_ids"]
    shown = token_texts(tokenizer, ids)
    assert len(shown) == len(ids)
    assert "".join(shown).replace("\ufffd", "") == text.replace("\ufffd", "")
    assert shown[:4] == ["a", "", "", "日"]
    assert shown[-2:] == ["", "é"]
    assert token_texts(tokenizer, ids[1:2]) == ["\ufffd"]


ROWS = 300  # more than the check encodes
TOO_LONG = r"rows\.jsonl:2 has \d+ tokens, but the context of \S+ is 512\nset data.max_length"


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, Any]:
    lines = [{"prompt": f"the mat of {n}?", "response": "sat"} for n in range(ROWS)]
    lines[1]["response"] = "sat 1 " * 300
    write_lines(tmp_path / "rows.jsonl", lines)
    return {"name": "chat", "path": str(tmp_path / "rows.jsonl")}


def asked(folder: Path, family: str, job: str, data: dict[str, Any]) -> SpecModel:
    model = {"model": str(saved(tiny_model(family), folder / family))}
    of_job = {
        "distill": {"teacher": model, "student": {"layers": [0, 2]}},
        "train-drafter": {"target": model, "drafter": {"name": "medusa", "depth": 2}},
    }
    data = {"responses": {"by": "dataset"}} | data
    spec = {"job": job, "run": str(folder / "run"), "data": data, "training": {"steps": 1}}
    return JOBS[job].spec.model_validate(spec | of_job[job])


@pytest.mark.parametrize("job", ["distill", "train-drafter"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_row_beyond_the_context_is_refused_by_the_check_and_by_the_job(
    tmp_path: Path, rows: dict[str, Any], family: str, job: str
) -> None:
    spec = asked(tmp_path, family, job, {"train": rows})
    with pytest.raises(UserError, match=TOO_LONG):
        JOBS[job].look_ahead(spec)
    with pytest.raises(UserError, match=TOO_LONG):
        JOBS[job].carry_out(spec)
    assert not list((tmp_path / "run").glob("before.json")), "before anything is measured"


def test_a_row_that_is_cut_to_the_context_is_read(tmp_path: Path, rows: dict[str, Any]) -> None:
    data = {"train": rows | {"limit": 2}, "max_length": 512}
    spec = asked(tmp_path, "gpt2", "distill", data)
    assert JOBS["distill"].look_ahead(spec).train.longest == 512
    assert JOBS["distill"].carry_out(spec).finished


def test_a_model_is_not_measured_beyond_its_context(tmp_path: Path, rows: dict[str, Any]) -> None:
    model = {"model": str(saved(tiny_model("gpt2"), tmp_path / "gpt2"))}
    spec = {"job": "evaluate", "model": model, "heldout": rows}
    with pytest.raises(UserError, match=TOO_LONG):
        evaluate(EvaluateSpec.model_validate(spec))


def test_the_student_too_is_asked_what_it_reads(tmp_path: Path, rows: dict[str, Any]) -> None:
    """Also where the teacher, which reads more, has yet to answer."""
    short = tiny_model("llama", seed=1)
    short.model.config.max_position_embeddings = 64  # type: ignore[attr-defined]
    student = {"model": str(saved(short, tmp_path / "short"))}
    responses = {"by": "teacher", "max_new_tokens": 60}
    spec = asked(tmp_path, "llama", "distill", {"train": rows, "responses": responses})
    changed = spec.model_dump(mode="json") | {"student": student}
    with pytest.raises(UserError, match=r"the context of \S+ is 64"):
        JOBS["distill"].look_ahead(JOBS["distill"].spec.model_validate(changed))


@pytest.mark.parametrize(
    ("config", "model", "context"), [(RobertaConfig, RobertaModel, 38), (BertConfig, BertModel, 40)]
)
def test_the_context_is_what_the_model_has_places_for(
    config: Any, model: Any, context: int
) -> None:
    made = model(
        config(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8, max_position_embeddings=40, pad_token_id=1,
        )
    )  # fmt: skip
    assert context_of(made) == context
    ids = torch.full((1, context), 5)
    assert made(ids).last_hidden_state.shape[1] == context
    with pytest.raises((IndexError, RuntimeError)):
        made(torch.full((1, context + 1), 5))


def test_a_model_that_names_no_limit_has_none() -> None:
    assert context_of(XLNetModel(XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=1))) is None


def test_the_final_norm_is_not_that_of_a_projection() -> None:
    """Gemma 3n has a norm of another width after its final one."""
    config = Gemma3nTextConfig(
        vocab_size=61,
        vocab_size_per_layer_input=61,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * 2,
        laurel_rank=4,
        altup_num_inputs=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    weight = torch.rand(32, generator=torch.Generator().manual_seed(0))
    model.get_decoder().norm.weight.data.copy_(weight)
    torch.testing.assert_close(final_scale(model), weight, rtol=1e-4, atol=1e-5)


def test_an_end_token_that_is_no_id_is_told() -> None:
    loaded = tiny_model()
    loaded.model.generation_config.eos_token_id = ["</s>", 3]
    with pytest.raises(UserError, match=r"eos_token_id of tiny-llama is .*, not a token id"):
        end_ids(loaded)
