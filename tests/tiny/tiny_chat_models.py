"""Random models of five families and a tokenizer for them, small enough to be built in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from kdcore.models.loading.loaded import LoadedModel
from tests.tiny.models import config_of

# as SmolLM2's: a system turn is supplied, responses are not marked
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = CHATML.replace(
    "message['content'] + '<|im_end|>' + '\n'}}",
    "}}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}",
).replace("'\n' + }}", "'\n' }}")
LAYERS = 4


TEXT = "the teacher and the student sat on the mat\n    for"
OTHER_TEXT = "a cat and a dog are in the house on the hill"
"""A tokenizer trained on it has other merges, and so other borders."""


def tiny_tokenizer(
    template: str | None = CHATML, text: str = TEXT, size: int = 290
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, of 290 tokens: all bytes, three special tokens and a few merges."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([text] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


_OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "mistral": {"tie_word_embeddings": False},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
}


WIDE = {"hidden_size": 64, "intermediate_size": 64}
"""Sizes of which bitsandbytes restores 4-bit weights right with AVX-512 too, in blocks of 64."""


def tiny_config(family: str, vocabulary: int, **sizes: Any) -> PreTrainedConfig:
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | sizes
    padding = {} if family == "gpt2" else {"pad_token_id": 0}
    return config_of(family, **shape, **padding, **_OWN.get(family, {}))


def tiny_model(
    family: str = "llama",
    *,
    seed: int = 0,
    extra: int = 0,
    template: str | None = CHATML,
    **sizes: Any,
) -> LoadedModel:
    """A random model with ``extra`` rows of padding in its vocabulary."""
    tokenizer = tiny_tokenizer(template)
    torch.manual_seed(seed)
    config = tiny_config(family, len(tokenizer) + extra, **sizes)
    # weights larger than usual, so that logits are far from uniform
    config.initializer_range = 0.5
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, f"tiny-{family}", f"digest-{family}-{seed}")


def saved(loaded: LoadedModel, folder: Path) -> Path:
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder
