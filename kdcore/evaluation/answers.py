"""What a model answers to prompts, for people to read and for metrics to judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kdcore.data.conversation import Conversation
from kdcore.data.template_mask import prompt_ids
from kdcore.models import LoadedModel
from kdcore.progress import Progress


def answers(
    prompts: Sequence[Conversation],
    loaded: LoadedModel,
    max_new_tokens: int,
    progress: Progress,
    title: str,
) -> list[str]:
    """The greedy answer to each prompt: to the first response it lacks, or else to its last.

    title: names the work to whoever watches.
    Raises UserError when the tokenizer has no chat template, or one that refuses a prompt.
    """
    found = []
    model: Any = loaded.model
    tokenizer: Any = loaded.tokenizer
    model.eval()
    with progress.stage(title, len(prompts)) as stage:
        for conversation in prompts:
            ids = torch.tensor([prompt_ids(conversation, tokenizer)], device=model.device)
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                )
            text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            found.append(str(text).strip())
            stage.advance()
    return found
