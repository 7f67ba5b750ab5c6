"""Tiny targets and drafters in folders, vLLM that serves them, and what it drafted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from vllm import LLM, SamplingParams

from kdcore.components.choice import Choice
from kdcore.components.registry import installed
from kdcore.decoding.drafters.exchange import export_drafter
from kdcore.decoding.drafters.files import save_drafter
from kdcore.decoding.loop import Decoder, Stop
from kdcore.models.loading.loaded import LoadedModel
from kdcore.training.views import DrafterView
from kdcore_baselines.verifiers import Greedy
from tests.tiny.tiny_chat_models import saved, tiny_tokenizer
from tests.tiny.trained_drafters import batch_of, bound

CONTEXT, WINDOW = 256, 20
NEW = 32
"""Tokens that each request generates."""
SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
PROMPTS = [[(7 * place + start) % 280 for place in range(10 + 3 * start)] for start in range(4)]


def config_of(family: str, classes: int) -> PreTrainedConfig:
    if family == "mistral":  # all of its layers have a window, and the drafter's do not
        return MistralConfig(**SIZE, vocab_size=classes, sliding_window=WINDOW)
    if family == "qwen3":  # whose heads are wider than its hidden states
        return Qwen3Config(**(SIZE | {"head_dim": 64, "vocab_size": classes}))
    if family == "qwen2":
        sizes = {name: value for name, value in SIZE.items() if name != "head_dim"}
        return Qwen2Config(**sizes, vocab_size=classes)
    deeper = {"num_hidden_layers": 5} if family == "deeper" else {}
    return LlamaConfig(**(SIZE | deeper), vocab_size=classes)


def target_in(folder: Path, family: str = "llama") -> LoadedModel:
    """A random model, saved; its logits are far from uniform."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, len(tokenizer)))
    loaded = LoadedModel(
        model.eval().requires_grad_(False), tokenizer, str(folder), f"digest-{family}"
    )
    saved(loaded, folder)
    return loaded


@torch.no_grad()
def continued(target: LoadedModel, prompt: list[int], count: int) -> list[int]:
    """What transformers generates greedily, without an end token."""
    ids = torch.tensor([prompt])
    out = target.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
        eos_token_id=None,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@dataclass(frozen=True)
class Exported:
    """A drafter of ours, its folder for vLLM and the settings with which it is served."""

    drafter: Any
    folder: Path
    command: str

    @property
    def settings(self) -> dict[str, Any]:
        """vLLM's speculative config, from the command that the export names."""
        return json.loads(shlex.split(self.command)[-1])


def drafter_in(
    folder: Path, target: LoadedModel, name: str, steps: int = 0, **params: Any
) -> Exported:
    """A drafter with random weights, or trained on what the target generates, and its export."""
    given = {"depth": 3, "tree": {"name": "chain"}, **params}
    drafter = bound(name, target.model, **given)
    if "vocabulary" in given:
        counts = torch.zeros(target.classes, dtype=torch.int64)
        for prompt in PROMPTS:
            counts += torch.bincount(
                torch.tensor(continued(target, prompt, NEW)), minlength=target.classes
            )
        drafter.choose_vocabulary(counts)
    if steps:
        train(drafter, target, steps)
    registry = installed()
    made = registry.component("drafter", name).params(**given)
    save_drafter(folder / "ours", drafter, Choice("drafter", name, made), target, registry)
    command = export_drafter(folder / "ours", "vllm", folder / "theirs", target, registry)
    return Exported(drafter, folder / "theirs", command)


def train(drafter: Any, target: LoadedModel, steps: int) -> None:
    """Overfit a drafter to what the target generates after the prompts."""
    rows = [prompt + continued(target, prompt, NEW) for prompt in PROMPTS]
    batch = batch_of(rows)
    tokens, real = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    features, _ = DrafterView(target.model, drafter).read(batch)
    classes = torch.full((target.classes,), -100)
    own = torch.arange(target.classes) if drafter.vocabulary is None else drafter.vocabulary
    classes[own] = torch.arange(len(own))
    optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-2)
    for _ in range(steps):
        logp = drafter.logp(drafter(tokens, features.clone()))  # [B, T, D, V']
        loss = torch.zeros(())
        for level in range(drafter.depth):
            ahead = 2 + level
            labels = classes[tokens[:, ahead:]].masked_fill(~real[:, ahead:], -100)
            loss = loss + F.nll_loss(logp[:, :-ahead, level].transpose(1, 2), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@dataclass
class Served:
    """A running vLLM.

    Attributes:
        llm: vLLM's engine.
        rounds: (request, length of the committed tokens, verified drafts) in order.
        passes: (request, number of rows that are read after the pass) in order.
    """

    llm: LLM
    rounds: list[tuple[str, int, list[int]]] = field(default_factory=list)
    passes: list[tuple[str, int]] = field(default_factory=list)

    @classmethod
    def start(cls, target: str, settings: dict[str, Any] | None, **engine: Any) -> Served:
        """Start vLLM in this process.

        Args:
            target: Folder of the target.
            settings: vLLM's speculative config.
            **engine: Further settings of vLLM.
        """
        given = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": CONTEXT,
            "max_num_seqs": 4,
            "block_size": 32,
            "disable_log_stats": False,
            # the scheduler then knows the drafts, and not only how many there are
            "async_scheduling": False,
            **engine,
        }
        served = cls(LLM(model=target, speculative_config=settings, **given))
        if settings is not None:
            served._listen()
        return served

    def generate(self, prompts: list[list[int]], count: int = NEW) -> dict[str, list[int]]:
        """Request -> prompt and new tokens, in the order of the prompts."""
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(asked, sampling, use_tqdm=False)
        return {
            each.request_id: [*each.prompt_token_ids, *each.outputs[0].token_ids]
            for each in outputs
        }

    def metric(self, name: str) -> Any:
        """A counter of speculative decoding: an int, or a list by position."""
        named = {each.name: each for each in self.llm.get_metrics()}
        found: Any = named[f"vllm:spec_decode_num_{name}"]
        return found.values if hasattr(found, "values") else found.value

    def stop(self) -> None:
        """End the engine, so that another one can start in this process."""
        self.llm.llm_engine.engine_core.shutdown()

    def _listen(self) -> None:
        core: Any = self.llm.llm_engine.engine_core
        worker = core.engine_core.model_executor.driver_worker
        runner = getattr(worker, "worker", worker).model_runner
        execute = runner.execute_model

        def heard(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            cached = scheduled.scheduled_cached_reqs
            read = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            read |= {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
            for request, count in scheduled.num_scheduled_tokens.items():
                self.passes.append((request, read[request] + count))
            for request, drafts in scheduled.scheduled_spec_decode_tokens.items():
                # the newest token is committed, though not read yet
                self.rounds.append((request, read[request] + 1, list(drafts)))
            return execute(scheduled, *args, **kwargs)

        runner.execute_model = heard


@torch.no_grad()
def drafts_of_ours(
    drafter: Any, target: LoadedModel, tokens: list[int], lengths: list[int], pieces: list[int]
) -> list[list[int]]:
    """Step kdcore's drafter along the rounds of a request.

    Args:
        drafter: Drafter with a chain.
        target: Its target.
        tokens: Prompt and new tokens.
        lengths: Number of committed tokens at each round.
        pieces: Number of rows after each pass over a part of the prompt. vLLM gives the drafter
            the prompt's last token as the one after such a part, so the step does the same.
    """
    features, _ = DrafterView(target.model, drafter).read(batch_of([tokens]))
    drafter.start(torch.zeros(1))
    after = [*tokens[1:], 0]
    prompt = lengths[0] - 1
    for end in pieces:
        if end < prompt:
            after[end - 1] = tokens[prompt - 1]
    found, read = [], 0
    for length in lengths:
        new: Tensor = torch.tensor([after[read : length - 1]])
        rows = features[:, read : length - 1].clone()
        tree = drafter.propose(new, rows, torch.tensor([new.shape[1]]), None)
        found.append(tree.tokens[0].tolist())
        read = length - 1
    return found


def compare_drafts(served: Served, exported: Exported, target: LoadedModel, texts: Any) -> int:
    """Assert that vLLM drafted what kdcore drafts; return the number of equal tokens."""
    equal = 0
    for request, tokens in texts.items():
        own = [(length, drafts) for who, length, drafts in served.rounds if same(who, request)]
        pieces = [rows for who, rows in served.passes if same(who, request)]
        lengths = [length for length, _ in own]
        ours = drafts_of_ours(exported.drafter, target, tokens, lengths, pieces)
        for (length, drafts), expected in zip(own, ours, strict=True):
            assert drafts == expected[: len(drafts)], f"after {length} tokens of {request}"
            equal += len(drafts)
    return equal


def same(internal: str, request: str) -> bool:
    """Whether the engine's name of a request, which may have a suffix, is that of a request."""
    return internal == request or internal.startswith(f"{request}-")


def counted(
    target: LoadedModel, exported: Exported, texts: Sequence[tuple[list[int], list[int]]]
) -> tuple[int, list[int]]:
    """Count the drafts of kdcore's own loop by an engine's rule.

    Args:
        target: The target.
        exported: The drafter.
        texts: Each prompt and its new tokens.

    Returns:
        The rounds from the second new token on, and the accepted drafts by position; the last
        round of each text counts whole.
    """
    depth = exported.drafter.depth
    rounds, accepted = 0, [0] * depth
    for prompt, new in texts:
        ids = torch.tensor([[*prompt, new[0]]])
        decoder = Decoder(target.model, exported.drafter, Greedy(None, None))
        emitted = 1
        for ((*tokens,),) in decoder.stream(ids, torch.ones_like(ids), Stop(len(new) + depth)):
            if emitted >= len(new):
                break
            rounds += 1
            emitted += len(tokens)
            for place in range(len(tokens) - 1):
                accepted[place] += 1
    return rounds, accepted
