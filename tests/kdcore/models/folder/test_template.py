"""A model's template and its arguments are one template for rows, prompts and the saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from kdcore.data.conversation import Conversation, Message
from kdcore.data.templates.mask import prompt_ids
from kdcore.errors import UserError
from kdcore.models.folder.template import set_template
from kdcore.models.loading.load import load_model
from kdcore.specs.distill import DistillSpec
from kdcore.specs.parts.fields import ModelSpec
from tests.fixtures.chat_templates import LLAMA3, QWEN3
from tests.tiny.tiny_chat_models import saved, tiny_model, tiny_tokenizer

ASKED = Conversation("x", (Message("user", "one"),))


def spec(**fields: Any) -> ModelSpec:
    return ModelSpec.model_validate({"model": "some/model", **fields})


def prompt(tokenizer: Any, **arguments: Any) -> str:
    asked = Conversation("x", ASKED.messages, arguments=arguments)
    return str(tokenizer.decode(prompt_ids(asked, tokenizer)))


def test_arguments_are_defaults_of_the_template(tmp_path: Path) -> None:
    tokenizer = QWEN3.tokenizer()
    assert "<think>" not in prompt(tokenizer)
    set_template(tokenizer, spec(template_arguments={"enable_thinking": False}))
    assert prompt(tokenizer).endswith("<think>\n\n</think>\n\n")
    assert "<think>" not in prompt(tokenizer, enable_thinking=True)  # a row's own
    tokenizer.save_pretrained(tmp_path)
    assert prompt(AutoTokenizer.from_pretrained(tmp_path)) == prompt(tokenizer)


@pytest.mark.parametrize(
    "value", [None, True, 3, 1.5, 'it\'s "so" {{ 1 }} é\n', [1, None, {"a": False}]], ids=str
)
def test_an_argument_of_any_kind(value: Any) -> None:
    tokenizer = tiny_tokenizer("{{ value | tojson }}")
    expected = prompt(tokenizer, value=value)
    set_template(tokenizer, spec(template_arguments={"value": value}))
    assert prompt(tokenizer) == expected


def test_a_template_of_a_file_for_the_model_and_its_student(tmp_path: Path) -> None:
    folder = saved(tiny_model(), tmp_path / "model")
    (tmp_path / "mine.jinja").write_text("{{ greeting }} {{ messages[0].content }}<|im_end|>")
    fields = {"template": tmp_path / "mine.jinja", "template_arguments": {"greeting": "hello"}}
    loaded = load_model(spec(**fields | {"model": str(folder)}))
    assert prompt(loaded.tokenizer) == "hello one<|im_end|>"


def test_the_date_may_be_an_argument() -> None:
    tokenizer = LLAMA3.tokenizer()
    set_template(tokenizer, spec(template_arguments={"date_string": "26 Jul 2024"}))
    assert "Today is 26 Jul 2024" in prompt(tokenizer)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        set_template(tiny_tokenizer(), spec(template=tmp_path / "missing"))
    with pytest.raises(UserError, match="some/model does not have a chat template"):
        set_template(tiny_tokenizer(None), spec(template_arguments={"a": 1}))
    for name in ("messages", "not an identifier", "tools"):
        with pytest.raises(ValidationError, match=f"'{name}' is not an argument"):
            spec(template_arguments={name: 1})
    with pytest.raises(ValidationError, match="in teacher instead of student"):
        DistillSpec.model_validate(
            {
                "teacher": {"model": "some/teacher"},
                "student": {"model": "some/student", "template_arguments": {"a": 1}},
                "data": {"train": {"name": "chat", "path": "train.jsonl"}},
            }
        )
