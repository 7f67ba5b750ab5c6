"""Random models and a tokenizer, made in code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def precision(device: torch.device) -> torch.dtype:
    """The dtype of the teacher's weights and of autocast: bfloat16, on a CPU float32."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def random_llama(
    shape: dict[str, Any], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> LlamaForCausalLM:
    """A Llama with random weights, in eval mode.

    Args:
        shape: Fields of its LlamaConfig.
        device: The device on which the weights are drawn.
        dtype: The dtype of the weights.
        seed: The seed of the weights.

    Returns:
        The model.
    """
    torch.manual_seed(seed)
    with torch.device(device):
        made = LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=dtype)
    made.generation_config.pad_token_id = 0
    return made.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the bytes and three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def save_chat_model(folder: Path, shape: dict[str, Any]) -> None:
    """Write a random chat model with its tokenizer, for commands that read a folder.

    Args:
        folder: The folder.
        shape: Fields of its LlamaConfig.
    """
    tokenizer = byte_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    fields = shape | ends | {"vocab_size": len(tokenizer)}
    random_llama(fields, torch.device("cpu"), torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
