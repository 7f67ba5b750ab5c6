"""`generate` of transformers: plain, with prompt lookup, and with an assistant model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from kdcore.decoding.baseline import DecodedBatch, left_padded
from kdcore.decoding.sampling import COLDEST
from kdcore.models.facts import refuse_other_tokenizer

if TYPE_CHECKING:
    from kdcore import BuildContext, LoadedModel
    from kdcore.decoding.baseline import DecodingSettings
    from kdcore_baselines.decoders.components import AssistedParams, PromptLookupParams


class Generate:
    """Plain `generate`, the prompts of a batch at once."""

    digest: str | None = None
    at_once = True
    """Whether `generate` decodes several prompts at once; assisted generation does not."""

    def __init__(self, params: Any, context: BuildContext) -> None:
        self.options: dict[str, Any] = {}

    def bind(self, target: LoadedModel) -> None:
        self.model: Any = target.model

    def start(self, settings: DecodingSettings) -> None:
        self.settings = settings

    def decode(self, prompts: Sequence[Sequence[int]], seed: int) -> DecodedBatch:
        torch.manual_seed(seed)
        step = len(prompts) if self.at_once else 1
        groups = (prompts[place : place + step] for place in range(0, len(prompts), step))
        answers = [answer for group in groups for answer in self._answers(group)]
        return DecodedBatch.of(answers)

    def close(self) -> None:
        self.model = None

    def _answers(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Answer prompts, which are padded on the left, as `generate` needs."""
        device = self.model.device
        tokens, mask = (torch.tensor(rows, device=device) for rows in left_padded(prompts))
        limits, ends = self.settings, self.settings.ends
        drawn = {"temperature": max(limits.temperature, COLDEST), "top_k": 0, "top_p": 1.0}
        out = self.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=limits.max_new_tokens,
            do_sample=bool(limits.temperature),
            eos_token_id=list(ends) or None,
            pad_token_id=ends[0] if ends else 0,  # without an end token all rows are equally long
            repetition_penalty=1.0,
            **(drawn if limits.temperature else {}),
            **self.options,
        )
        return [limits.answer(row) for row in out[:, tokens.shape[1] :].tolist()]


class PromptLookup(Generate):
    """`generate` that copies drafts from the prompt."""

    at_once = False

    def __init__(self, params: PromptLookupParams, context: BuildContext) -> None:
        self.options = {"prompt_lookup_num_tokens": params.tokens}


class Assisted(Generate):
    """`generate` with the drafts of a smaller model."""

    at_once = False

    def __init__(self, params: AssistedParams, context: BuildContext) -> None:
        self.assistant = context.load_model(params.model)
        self.digest = self.assistant.digest

    def bind(self, target: LoadedModel) -> None:
        assistant = self.assistant
        refuse_other_tokenizer(assistant, target, "the model of the baseline assisted")
        super().bind(target)
        model = assistant.model.to(self.model.device, self.model.dtype)
        self.options = {"assistant_model": model}
