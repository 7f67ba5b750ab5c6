"""OpenVINO GenAI, a baseline of `bench`: the target in the form of graph that it reads."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcore import DecodedBatch, UserError
from kdcore.components.optional_packages import optional_package
from kdcore.decoding.baseline import left_padded
from kdcore.models.facts import refuse_other_tokenizer, tokenizer_digest
from kdcore.models.folder.files import file_digest
from kdcore.models.folder.kept_files import cache_folder, made_once
from kdcore.models.transformers_versions import cache_argument
from kdcore_openvino.compiled_pass import explained
from kdcore_openvino.graph import converted, openvino, traced
from kdcore_openvino.signal_stack import signal_stack_kept
from kdcore_openvino.stored_weights import store
from kdcore_openvino.target_pass import TargetPass, TracedCache

if TYPE_CHECKING:
    from kdcore import BuildContext, DecodingSettings, LoadedModel
    from kdcore.components.construction import NamedModel
    from kdcore_openvino.plugin import GenAiParams

FORMAT = 1
"""Raise it when the conversion gives another graph for the same target."""
DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "u8"}
"""OpenVINO's names of dtypes."""
CURE = (
    "remove the baseline openvino_genai, or set its model to a folder that optimum-intel exported"
)


class GenAi:
    """A pipeline of OpenVINO GenAI on the CPU, with GenAI's own settings of precision."""

    def __init__(self, params: GenAiParams, context: BuildContext) -> None:
        self.params = params
        self.library = _installed()
        self.draft = None
        if params.draft_model is not None:
            self.draft = context.load_model(params.draft_model)
        read = [None if params.model is None else _digest(params.model)]
        read.append(None if self.draft is None else self.draft.digest)
        self.digest = "-".join(filter(None, read)) or None
        self._pipeline: Any = None

    def bind(self, target: LoadedModel) -> None:
        if target.model.device.type != "cpu":
            raise UserError(
                f"openvino_genai runs on a CPU, and {target.name} is on {target.model.device}",
                "set device to cpu, or remove that baseline",
            )
        self._place = self.params.model or _written(target, self.params.weights)
        if self.draft is not None:
            refuse_other_tokenizer(self.draft, target, "draft_model of the baseline openvino_genai")
            if self.params.model is None:
                self._place = _with_tokenizer(self._place, target.tokenizer)
            written = _written(self.draft, self.params.weights)
            self._draft_place = _with_tokenizer(written, self.draft.tokenizer)

    def start(self, settings: DecodingSettings) -> None:
        self.close()
        self.settings = settings
        params, lookup = self.params, self.params.prompt_lookup
        running: dict[str, Any] = {"INFERENCE_NUM_THREADS": settings.threads}
        if params.arithmetic is not None:
            running["INFERENCE_PRECISION_HINT"] = DTYPES[params.arithmetic]
        if params.cache is not None:
            running["KV_CACHE_PRECISION"] = DTYPES[params.cache]
        drafting: dict[str, Any] = {} if lookup is None else {"prompt_lookup": True}
        with explained(str(self._place), CURE), signal_stack_kept():
            if self.draft is not None:
                place = str(self._draft_place)
                drafting["draft_model"] = self.library.draft_model(place, "CPU", **running)
            self._pipeline = self.library.LLMPipeline(
                str(self._place),
                self.library.Tokenizer(str(self._place)),
                "CPU",
                **running,
                **drafting,
            )
        config = self._config = self.library.GenerationConfig()
        config.apply_chat_template = False
        config.max_new_tokens = settings.max_new_tokens
        config.ignore_eos = not settings.ends
        # without one, it takes that of the model, and -1 for none, which it refuses
        config.set_eos_token_id(settings.ends[0] if settings.ends else 0)
        config.stop_token_ids = set(settings.ends)
        config.do_sample = bool(settings.temperature)
        if settings.temperature:
            config.temperature = settings.temperature
        if lookup is not None:
            config.num_assistant_tokens = lookup
            config.max_ngram_size = self.params.longest
        if self.draft is not None:
            config.num_assistant_tokens = self.params.draft_tokens

    def decode(self, prompts: Sequence[Sequence[int]], seed: int) -> DecodedBatch:
        tokens, mask = (openvino().Tensor(np.array(rows)) for rows in left_padded(prompts))
        self._config.rng_seed = seed
        given = self.library.TokenizedInputs(tokens, mask)
        found = self._pipeline.generate(given, self._config)
        answers = [self.settings.answer(tokens) for tokens in found.tokens]
        return DecodedBatch.of(answers)

    def close(self) -> None:
        self._pipeline = None


class StandardPass:
    """A `kdcore.decoding.engines.protocols.TraceablePass` with the inputs that GenAI gives.

    These are input_ids [B, A], attention_mask [B, S + A] and position_ids [B, A]; the output is
    logits [B, A, V].

    Args:
        target: The model in eval mode, on the CPU.

    Raises:
        UserError: Its layers do not all see all tokens before, or a trace would not follow it.
    """

    def __init__(self, target: Any) -> None:
        self.source = TargetPass(target)
        if len(self.source.kinds) > 1 or getattr(target.config, "sliding_window", None):
            raise UserError(
                f"the layers of {type(target).__name__} have a sliding window, which the "
                "conversion for openvino_genai does not support",
                CURE,
            )
        self.sizes, self.facts = self.source.sizes, self.source.facts

    def weights(self) -> Mapping[str, Tensor]:
        """Those of the target's pass."""
        return self.source.weights()

    def example(self, rows: int, count: int, slots: int) -> dict[str, Tensor]:
        """Constant inputs; see `kdcore.decoding.engines.protocols.TraceablePass.example`."""
        return {
            "input_ids": torch.ones(rows, count, dtype=torch.int64),
            "attention_mask": torch.ones(rows, slots + count, dtype=torch.int64),
            "position_ids": torch.arange(slots, slots + count).repeat(rows, 1),
        }

    def module(self, float32: bool = True) -> nn.Module:
        """The model, or a copy of it in float32, with a causal mask."""
        return _Causal(self.source.module(float32).model)


class _Causal(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, given: Mapping[str, Tensor], past: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
        count, real = given["input_ids"].shape[1], given["attention_mask"]
        slots = torch.arange(real.shape[1])
        seen = slots[None] <= (torch.arange(count) + real.shape[1] - count)[:, None]
        hidden = ~(seen[None] & (real != 0)[:, None])
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        cache = TracedCache(past)
        output = self.model(
            input_ids=given["input_ids"],
            attention_mask=mask[:, None],
            position_ids=given["position_ids"],
            use_cache=True,
            **{cache_argument(self.model): cache},
        )
        return {"logits": output.logits}, cache.tensors()


def _installed() -> Any:
    openvino()  # without its telemetry
    return optional_package(
        "openvino_genai", "kdcore[openvino-genai]", "the baseline openvino_genai"
    )


def _digest(model: Path) -> str:
    if model.is_dir():
        model = model / "openvino_model.bin"
    if not model.is_file():
        raise UserError(
            f"{model} does not exist",
            "set model of the baseline openvino_genai to a GGUF file, or to a folder that "
            "optimum-intel exported",
        )
    return file_digest(model)


def _written(target: NamedModel, weights: str) -> Path:
    """The folder of a target's graph, written by the first call."""

    def write(place: Path) -> None:
        source = StandardPass(target.model)
        graph = converted(source, *traced(source, source.module()))
        store(graph, weights)
        place.mkdir()
        openvino().save_model(graph, place / "openvino_model.xml", compress_to_fp16=False)
        target.model.config.save_pretrained(place)

    key = f"genai-{target.digest[:40]}-{weights}-{version('openvino')}-{FORMAT}"
    with explained(target.name, CURE):
        return made_once(cache_folder() / "openvino" / key, write)


def _with_tokenizer(folder: Path, tokenizer: Any) -> Path:
    """A folder with the files of another one and the tokenizer, which GenAI compares first."""

    def write(place: Path) -> None:
        converted = importlib.import_module("openvino_tokenizers").convert_tokenizer(tokenizer)
        place.mkdir()
        for each in folder.resolve().iterdir():
            (place / each.name).symlink_to(each)
        openvino().save_model(converted, place / "openvino_tokenizer.xml")

    named = folder.with_name(f"{folder.name}-{tokenizer_digest(tokenizer)[:16]}")
    with explained(f"the tokenizer of {folder.name}", CURE):
        return made_once(named, write)
