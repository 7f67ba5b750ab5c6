"""Train the tokenizer of the student of `cross_tokenizer.yaml`: byte-level BPE on GSM8K.

    python examples/studies/student_tokenizer.py runs/studies/student-tokenizer

It reads the training rows only, of the file in $KDCORE_DATA. Unlike SmolLM2's tokenizer it joins
digits, and it has a twelfth as many tokens.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TOKENS = 4096
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def texts(rows: Path) -> Iterator[str]:
    """The questions and the answers of a file of rows."""
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        yield from (row["question"], row["answer"])


def trained(rows: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that the rows of a file give."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts(rows), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
    )


if __name__ == "__main__":
    data = Path(os.environ["KDCORE_DATA"])
    trained(data / "train/gsm8k_train.jsonl").save_pretrained(sys.argv[1])
