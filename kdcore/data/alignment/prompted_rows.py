"""The rows of a teacher whose last prompt says more than the student's, e.g. the reference answer.

Both models read the same responses, so that their learned positions are the same tokens. A response
that the student samples stands in the place of the data's last one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from kdcore.data.alignment.second_reading import SecondReading
from kdcore.data.conversation import Conversation
from kdcore.data.responses.on_policy import answered, prompt_of
from kdcore.data.rows import RowDataset, batch_of, collate
from kdcore.data.source import DataSource
from kdcore.data.store import row_key
from kdcore.errors import UserError
from kdcore.method.records import Batch, Row

_UNCUT = 2**31
"""A maximum row length that no row has: the student's row decides how much is learned."""


class PromptedSource(SecondReading):
    """A source whose conversations a teacher reads with another last prompt.

    Args:
        source: The source.
        template: The teacher's last prompt, see `kdcore.specs.distill.DataSpec`.

    Attributes:
        found: The teacher's row of each encoded row, by the `row_key` of the student's.
    """

    def __init__(self, source: DataSource, template: str) -> None:
        super().__init__(source)
        self._template = template
        self.found: dict[bytes, Row] = {}

    def encode(self, example: Any, tokenizer: Any, max_length: int) -> Row:
        """Encode an example for the student, and keep the teacher's row of it.

        Args:
            example: The example.
            tokenizer: The tokenizer of both models.
            max_length: Maximum number of positions of the student's row.

        Returns:
            The student's row.

        Raises:
            UserError: The example is not a conversation, lacks a field that the teacher's prompt
                names, has other response tokens behind that prompt, or has the tokens of a row with
                another prompt.
        """
        ours = self._source.encode(example, tokenizer, max_length)
        if not ours.mask.any():
            return ours  # training skips it
        theirs = self._source.encode(prompted(example, self._template), tokenizer, _UNCUT)
        learned = int(ours.mask.sum())
        theirs = replace(theirs, mask=theirs.mask & (theirs.mask.cumsum(0) <= learned))
        if not theirs.labels[theirs.mask].equal(ours.labels[ours.mask]):
            raise UserError(
                f"{ours.id}: with the teacher's prompt the response has other tokens",
                "change data.teacher_prompt, or use a chat template that leaves responses alone",
                "data.teacher_prompt",
            )
        known = self.found.setdefault(row_key(ours), theirs)
        if row_key(known) != row_key(theirs):
            raise UserError(
                f"{known.id} and {theirs.id} have the same prompt and response, and different "
                "prompts of the teacher",
                "remove one of these rows",
                "data.teacher_prompt",
            )
        return ours


class PromptedRows:
    """The teacher's rows, in the order of the student's.

    Args:
        source: The source that encoded the student's rows.
        rows: The student's rows.
        pad: Padding values of the inputs, see `kdcore.data.rows.collate`.

    Attributes:
        rows: The teacher's row of each of the student's.
    """

    def __init__(self, source: PromptedSource, rows: RowDataset, pad: Mapping[str, int]) -> None:
        self.rows = [source.found[row_key(row)] for row in rows.rows]
        self._pad = pad

    def collated(self, index: Tensor) -> dict[str, Any]:
        """The teacher's rows of the student's with some indices [B], see `collate`."""
        return collate([(number, self.rows[number]) for number in index.tolist()], self._pad)

    def sampled(self, ours: Batch) -> Batch:
        """The teacher's rows of a batch, with the responses that the student sampled."""
        own, read = [self.rows[number] for number in ours.index.tolist()], ours.on_cpu or ours
        tokens = [
            labels[mask].tolist() for labels, mask in zip(read.labels, read.mask, strict=True)
        ]
        whole = [answered(row, prompt_of(row), each) for row, each in zip(own, tokens, strict=True)]
        rows = list(zip(ours.index.tolist(), whole, strict=True))
        return batch_of(collate(rows, self._pad), ours.mask.device)


def prompted(example: Any, template: str) -> Conversation:
    """Write the last prompt that has a response by a template.

    Args:
        example: The conversation.
        template: The new prompt, with the names of fields in braces.

    Returns:
        The conversation with the new prompt.

    Raises:
        UserError: It is not a conversation, or lacks a field.
    """
    if not isinstance(example, Conversation):
        raise UserError(
            "data.teacher_prompt writes the prompts of conversations, and the rows are not "
            "conversations",
            "remove data.teacher_prompt, or use a source of conversations",
            "data.teacher_prompt",
        )
    roles = [message.role for message in example.messages]
    answer = max((n for n, role in enumerate(roles) if role == "assistant"), default=0)
    asked = max((n for n, role in enumerate(roles[:answer]) if role == "user"), default=None)
    if asked is None:
        raise UserError(
            f"{example.id} does not have a prompt with a response",
            "add a response, or remove data.teacher_prompt",
            "data.teacher_prompt",
        )
    fields = {
        **example.kept,
        "prompt": example.messages[asked].content,
        "response": example.messages[answer].content,
    }

    def value(found: re.Match[str]) -> str:
        if (name := found[1]) not in fields:
            raise UserError(
                f"{example.id} does not have the field '{name}' that data.teacher_prompt names",
                f"use one of {', '.join(sorted(fields))}, or set keep: [{name}] in the source",
                "data.teacher_prompt",
            )
        return str(fields[name])

    text = re.sub(r"\{(\w+)\}", value, template)
    messages = list(example.messages)
    messages[asked] = replace(messages[asked], content=text)
    return replace(example, messages=tuple(messages))
