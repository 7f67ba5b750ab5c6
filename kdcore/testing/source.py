"""The conformance suite of data sources: a fixed order of examples and shifted labels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from kdcore.method.records import Row
from kdcore.testing.suite import Suite, same

END = "<|end|>"


class SourceSuite(Suite):
    """The checks of a `DataSource`.

    Attributes:
        max_length: Maximum length of a row.
        examples: Number of examples that are checked.
    """

    kind = "source"
    max_length: ClassVar[int] = 256
    examples: ClassVar[int] = 8

    def tokenizer(self) -> Any:
        """Make a byte tokenizer with a chat template; override it for an image processor."""
        # imported here, so that the suites of the other kinds start fast
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate([END, *alphabet])}
        raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=raw, eos_token=END, pad_token=END, chat_template=TEMPLATE
        )

    def rows(self, source: Any) -> list[Row]:
        """Encode the first examples as rows."""
        tokenizer = self.tokenizer()
        chosen = source.read()[: self.examples]
        return [source.encode(example, tokenizer, self.max_length) for example in chosen]

    def test_examples_come_in_a_fixed_order(self) -> None:
        """A resumed run finds its examples by their index."""
        first, second = self.component().read(), self.component().read()
        assert len(first) > 0, "there are no examples"
        assert list(first) == list(second), "read() returns another order the second time"

    def test_rows_have_one_length_and_something_to_learn(self) -> None:
        """A row has labels [T] int64 and a mask [T] bool, with T at most ``max_length``."""
        for row in self.rows(self.component()):
            assert row.labels.dtype == torch.int64 and row.mask.dtype == torch.bool, row.id
            assert row.labels.shape == row.mask.shape, f"{row.id}: labels and mask differ in T"
            assert row.labels.ndim == 1 and len(row.labels) <= self.max_length, f"{row.id}: T"
            assert row.mask.any(), f"{row.id}: no position is learned"
            assert (row.labels[row.mask] >= 0).all(), f"{row.id}: a learned label is negative"

    def test_labels_are_what_each_position_must_predict(self) -> None:
        """In a row of tokens, ``labels[t]`` is the token after ``input_ids[t]``."""
        source = self.component()
        classifies = hasattr(source, "classes")
        for row in self.rows(source):
            tokens = row.inputs.get("input_ids")
            if tokens is None or classifies:
                continue  # its labels are not tokens
            assert tokens.shape == row.labels.shape, f"{row.id}: tokens and labels differ in T"
            learned = row.mask[:-1]
            same(row.labels[:-1][learned], tokens[1:][learned], f"{row.id}: not shifted by one")

    def test_ids_name_one_example_each(self) -> None:
        """Messages name an example by its id."""
        ids = [row.id for row in self.rows(self.component())]
        assert len(set(ids)) == len(ids), f"an id occurs twice: {ids}"

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Return the rows' labels and masks."""
        return [tensor for row in self.rows(component) for tensor in (row.labels, row.mask)]


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% else %}"
    "{{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
