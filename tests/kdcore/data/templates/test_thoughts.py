"""The answer after a thought, by the marks of public templates."""

from __future__ import annotations

from typing import Any

import pytest

from kdcore.data.conversation import Conversation, Message
from kdcore.data.templates.thoughts import PLAIN, answer_of, thoughts_of
from tests.fixtures.chat_templates import FAMILIES, LLAMA3, Family

# the generation prompt opens the thought, which the template prints where it is given
THINKING = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}{{- '<think>\n' + (m.reasoning_content or '') }}"
    "{{- '\n</think>\n\n' }}{%- endif %}{{- m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
# the thought is a part of the content, between special tokens
IN_PARTS = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}"
    "{%- elif m.content is string %}{{- m.content + eos_token }}{%- else %}"
    "{%- for part in m.content %}{%- if part.type == 'thinking' %}"
    "{{- '[THINK]' + part.thinking + '[/THINK]' }}{%- else %}{{- part.text }}{%- endif %}"
    "{%- endfor %}{{- eos_token }}{%- endif %}{%- endfor %}"
)
# a thought is printed before a call alone; the generation prompt has an empty one
BEFORE_A_CALL = (
    "{%- for m in messages %}{{- '<|turn>' + m.role + '\n' }}"
    "{%- if m.tool_calls %}{%- if m.thinking %}"
    "{{- '<|channel>thought\n' + m.thinking + '\n<channel|>' }}{%- endif %}"
    "{{- m.tool_calls[0] | tojson }}{%- endif %}{{- (m.content or '') + '<turn|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|turn>assistant\n' }}"
    "{%- if not thinks %}{{- '<|channel>thought\n<channel|>' }}{%- endif %}{%- endif %}"
)
TEMPLATES = FAMILIES | {
    "before a call": Family(
        BEFORE_A_CALL, ("<|turn>", "<turn|>", "<|channel>", "<channel|>"), "<turn|>"
    ),
    "thinking": Family(THINKING, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "in parts": Family(IN_PARTS, ("[INST]", "[/INST]", "[THINK]", "[/THINK]", "</s>"), "</s>"),
}


def read(family: str, text: str, *, plain: bool = False, **arguments: Any) -> Any:
    tokenizer = TEMPLATES[family].tokenizer()
    asked = Conversation("x", (Message("user", "the cat"),), plain=plain, arguments=arguments)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return answer_of(ids, thoughts_of(asked, tokenizer), tokenizer, [tokenizer.eos_token_id])


@pytest.mark.parametrize(
    ("family", "text", "answer", "thought"),
    [
        ("qwen3", "<think>\nthe mat\n</think>\n\nsat<|im_end|>", "\n\nsat", True),
        ("qwen3", "<think>\n\n</think>\n\nsat<|im_end|>", "\n\nsat", True),
        ("qwen3", "<think>\nthe mat", "", None),
        ("qwen3", "<think>a</think><think>b</think>sat", "sat", True),
        ("qwen3", "sat<|im_end|>", "sat", False),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>the mat<|end|><|start|>assistant<|channel|>final"
            "<|message|>sat<|return|>",
            "sat",
            True,
        ),
        ("gpt-oss", "<|channel|>analysis<|message|>the mat", "", None),
        ("gpt-oss", "<|channel|>final<|message|>sat<|return|>", "sat", False),
        ("gpt-oss", "<think>the mat</think>sat<|return|>", "sat", True),
        ("gpt-oss", "sat <think>the mat</think><|return|>", "sat <think>the mat</think>", False),
        ("deepseek", "the mat\n</think>\n\nsat<|eos|>", "\n\nsat", True),
        ("deepseek", "the mat", "", None),
        ("deepseek", "sat<|eos|>", "sat", False),
        ("deepseek", "<think>the mat<|eos|>", "", None),
        ("thinking", "the mat\n</think>\n\nsat<|im_end|>", "\n\nsat", True),
        ("thinking", "the mat", "", None),
        ("thinking", "sat<|im_end|>", "sat", False),
        ("in parts", "[THINK]the mat[/THINK]sat</s>", "sat", True),
        ("in parts", "[THINK]the mat", "", None),
        ("in parts", "sat</s>", "sat", False),
        ("llama3", "<think>the mat</think>sat<|eot_id|>", "sat", True),
        ("llama3", "</think>\n\nsat<|eot_id|>", "\n\nsat", False),
        ("llama3", "the mark </think> ends it<|eot_id|>", "the mark </think> ends it", False),
        ("llama3", "the mark <think> begins it", "the mark <think> begins it", False),
    ],
)
def test_the_answer_follows_the_thought(
    family: str, text: str, answer: str, thought: bool | None
) -> None:
    assert read(family, text) == (answer, thought)


def test_a_prompt_with_an_empty_thought_has_no_thought() -> None:
    """With ``enable_thinking: false`` the generation prompt ends the thought itself."""
    assert read("qwen3", "sat<|im_end|>", enable_thinking=False) == ("sat", False)


def test_a_thought_that_the_template_prints_before_a_call_alone() -> None:
    said = "<|channel>thought\nthe mat\n<channel|>sat<turn|>"
    for thinks in (True, False):
        assert read("before a call", said, thinks=thinks) == ("sat", True)
        assert read("before a call", said[:20], thinks=thinks) == ("", None)
        assert read("before a call", "sat<turn|>", thinks=thinks) == ("sat", False)


def test_text_without_a_template_has_the_plain_marks() -> None:
    assert read("deepseek", "the mat", plain=True) == ("the mat", False)
    assert read("deepseek", "<think>the mat", plain=True) == ("", None)
    tokenizer = LLAMA3.tokenizer()
    assert thoughts_of(Conversation("x", (Message("user", "a"),)), tokenizer) == PLAIN


@pytest.mark.parametrize(
    ("family", "content", "read"),
    [
        ("deepseek", "the mat\n</think>\n\nsat", "\n\nsat"),
        ("deepseek", "sat", "sat"),
        ("qwen3", "<think>the mat</think>sat", "sat"),
        ("qwen3", "the mark </think> ends it", "the mark </think> ends it"),
        ("gpt-oss", "<think>the mat</think>sat", "sat"),
        ("in parts", "[THINK]the mat[/THINK]sat", "sat"),
        ("in parts", "[THINK]the mat", ""),
        ("llama3", "</think>\n\nsat", "\n\nsat"),
    ],
)
def test_a_reference_follows_its_thought(family: str, content: str, read: str) -> None:
    """A mark within an ordinary reference is text, unless the prompt opens the thought."""
    asked = Conversation("x", (Message("user", "the cat"), Message("assistant", content)))
    assert thoughts_of(asked, TEMPLATES[family].tokenizer()).reference_in(content) == read
