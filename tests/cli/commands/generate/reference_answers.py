"""What transformers answers."""

from __future__ import annotations

import torch

from kdcore.data.conversation import Conversation, Message
from kdcore.data.templates.mask import prompt_ids
from kdcore.models.loading.loaded import LoadedModel

LENGTH = 12


def reference(
    loaded: LoadedModel, *turns: str, plain: bool = False, marks: bool = False
) -> list[str]:
    """What transformers answers, turn by turn, with or without special tokens inside answers."""
    conversation = Conversation("x", (), plain)
    answers: list[str] = []
    for turn in turns:
        messages = (*conversation.messages, Message("user", turn))
        conversation = Conversation("x", messages, plain)
        ids = torch.tensor([prompt_ids(conversation, loaded.tokenizer)])
        output = loaded.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=LENGTH,
            eos_token_id=[2, loaded.tokenizer.eos_token_id],
        )
        made = output[0, ids.shape[1] :]
        if made[-1] in (2, loaded.tokenizer.eos_token_id):
            made = made[:-1]
        text = str(loaded.tokenizer.decode(made))
        bare = str(loaded.tokenizer.decode(made, skip_special_tokens=True))
        answers.append(text if marks else bare)
        conversation = conversation.answered(Message("assistant", text))
    return answers
