"""llama.cpp through llama-cpp-python."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcore import UserError
from kdcore.components.optional_packages import optional_package
from kdcore.decoding.baseline import DecodedBatch
from kdcore.errors import first_line
from kdcore.models.folder.files import file_digest
from kdcore.models.folder.kept_files import cache_folder, made_once
from kdcore_baselines.decoders.gguf_file import FORMAT, write_gguf

if TYPE_CHECKING:
    from kdcore import BuildContext, LoadedModel
    from kdcore.decoding.baseline import DecodingSettings
    from kdcore_baselines.decoders.components import LlamaCppParams


class LlamaCpp:
    """llama.cpp on the CPU, which answers the prompts of a batch one after the other."""

    def __init__(self, params: LlamaCppParams, context: BuildContext) -> None:
        self.params = params
        self.library = _installed()
        self.digest = None if params.gguf is None else file_digest(params.gguf)
        self._model: Any = None

    def bind(self, target: LoadedModel) -> None:
        self._file = self.params.gguf or _written(target, self.params.weights)
        self._name = target.name

    def start(self, settings: DecodingSettings) -> None:
        self.close()
        self.settings = settings
        drafts = None
        if (count := self.params.prompt_lookup) is not None:
            lookup = importlib.import_module("llama_cpp.llama_speculative")
            drafts = lookup.LlamaPromptLookupDecoding(num_pred_tokens=count)
        try:
            self._model = self.library.Llama(
                str(self._file),
                n_ctx=settings.longest_prompt + settings.max_new_tokens + (count or 0),
                n_threads=settings.threads,
                n_threads_batch=settings.threads,
                draft_model=drafts,
                # it keeps the logits of all tokens with a draft model, and has room for them so
                logits_all=drafts is not None,
                verbose=False,
            )
        except (ValueError, RuntimeError) as fault:
            raise UserError(
                f"llama.cpp cannot load {self._file}: {first_line(fault)}",
                "set gguf to a file that this version of llama.cpp reads",
            ) from fault

    def decode(self, prompts: Sequence[Sequence[int]], seed: int) -> DecodedBatch:
        answers = [self._answer(prompt, seed + place) for place, prompt in enumerate(prompts)]
        return DecodedBatch.of(answers)

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None

    def _answer(self, prompt: Sequence[int], seed: int) -> list[int]:
        self._model.reset()  # otherwise it reuses what the last prompt has in common
        self._model.set_seed(seed)
        drawn = self._model.generate(
            prompt,
            temp=self.settings.temperature,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            typical_p=1.0,
            repeat_penalty=1.0,
        )
        answer: list[int] = []
        for token in islice(drawn, self.settings.max_new_tokens):
            answer.append(token)
            if token in self.settings.ends:
                break
        return answer


def _installed() -> Any:
    return optional_package(
        "llama_cpp",
        "kdcore[llama-cpp]",
        "llama_cpp",
        package="llama-cpp-python",
    )


def _written(target: LoadedModel, weights: str) -> Path:
    """The GGUF file of a target, written by the first call."""
    path = cache_folder() / "gguf" / f"{target.digest[:40]}-{weights}-{FORMAT}.gguf"
    return made_once(path, lambda place: write_gguf(target.model, weights, place))
