"""Tokens a second of each way to decode, its waits of the host, and whether outputs are equal."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter as Counts
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_check.models import precision, random_llama
from gpu_check.section import Section
from gpu_check.sizes import Size
from kdcore.components.choice import Choice
from kdcore.components.registry import installed
from kdcore.decoding.build import greedy_decoder
from kdcore.decoding.loop import Counter, Stop
from kdcore.decoding.tree import DraftTree
from kdcore.models.assembly import Assembly
from kdcore.models.device import default_device, synchronise
from kdcore.models.loading.loaded import LoadedModel

GENERATE = "transformers_generate"
DRAFTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("nothing", {}),
    "fasteagle_untrained": ("fasteagle", {}),
    "eagle3_untrained": ("eagle3", {}),
    "fasteagle_told": ("fasteagle", {"tree": "chain"}),
    "eagle3_told": ("eagle3", {"tree": "chain"}),
    "plain_compiled": ("nothing", {}),
    "fasteagle_told_compiled": ("fasteagle", {"tree": "chain"}),
    "fasteagle_told_drafter_compiled": ("fasteagle", {"tree": "chain"}),
    "eagle3_told_drafter_compiled": ("eagle3", {"tree": "chain"}),
}
"""Way to decode -> the drafter and its params. All drafters have random weights. Those that are
told do all their work, and then propose the target's own continuation in its place: each draft is
accepted, so theirs is the speed of a drafter that is always right. The target of those that are
compiled runs in the engine of that name, and the drafter too where the name says so."""
COMPILED = "_compiled"
DRAFTER_COMPILED = "_drafter_compiled"
NAMES = ("prompts", GENERATE, *DRAFTERS, "in_float32")
WAIT = "called a synchronizing CUDA operation"

Rows = list[list[int]]
Decode = Callable[[Tensor], tuple[list[int], Counter | None]]


def measure(section: Section, size: Size) -> None:
    """Decode the same prompts in each way, greedily and one at a time.

    Args:
        section: The section for the entries of `NAMES`.
        size: The target, the prompts and the number of repeats.
    """
    device = default_device()
    asked = prompts(size)
    section.measure(
        "prompts",
        lambda: {"count": size.prompts, "tokens": size.prompt_tokens, "new": size.new_tokens},
    )
    target = random_llama(size.teacher, device, precision(device)).requires_grad_(False)
    ways = Ways(target, size)
    for name in (GENERATE, *DRAFTERS):
        section.measure(name, lambda name=name: _timed(name, ways, asked, size.repeats))
    section.measure("in_float32", lambda: _in_float32(target, size, asked))


def prompts(size: Size) -> Rows:
    """Random prompts, each with a first token of its own."""
    generator = torch.Generator().manual_seed(2)
    classes = size.teacher["vocab_size"]
    rest = torch.randint(classes, (size.prompts, size.prompt_tokens - 1), generator=generator)
    return [[first, *row] for first, row in enumerate(rest.tolist(), start=1)]


class Ways:
    """The ways to decode with a target; the answers of `GENERATE` are kept to compare with.

    Args:
        target: The target.
        size: The number of new tokens and the depth of the drafters.
    """

    def __init__(self, target: Any, size: Size) -> None:
        self.target, self.size = target, size
        self.reference: Rows | None = None

    def decode(self, name: str, asked: Rows) -> Decode:
        """The function that decodes one prompt [1, T] in a way.

        Args:
            name: `GENERATE`, or a key of `DRAFTERS`.
            asked: All prompts that it will decode.

        Returns:
            A function that returns the new tokens, and the counter of the rounds.

        Raises:
            ValueError: A drafter is told answers that are not known.
        """
        if name == GENERATE:
            return self._generate
        kind, params = DRAFTERS[name]
        registry = installed()
        if kind != "nothing":
            params = {"depth": self.size.depth, **params}
        model = registry.component("drafter", kind).params
        choice = Choice(
            "drafter", kind, model.model_validate(params, context={"registry": registry})
        )
        torch.manual_seed(3)
        drafter: Any = Assembly(registry).build(choice)
        drafter.bind(self.target, None)
        if isinstance(drafter, torch.nn.Module):
            drafter.to(self.target.dtype).eval().requires_grad_(False)
        engine = None
        if name.endswith(COMPILED):
            declared = registry.component("engine", "compiled").params
            engine = Assembly(registry).build(Choice("engine", "compiled", declared()))
            engine.bind(self.target, drafter.layers)
        if name.endswith(DRAFTER_COMPILED):
            drafter.use_engine(engine)
        if "_told" in name:
            if self.reference is None:
                raise ValueError(f"{GENERATE} failed, so the answers are not known")
            drafter = Told(drafter, [p + r for p, r in zip(asked, self.reference, strict=True)])
        loaded = LoadedModel(self.target, None, "target", "")
        decoder = greedy_decoder(loaded, drafter, registry, engine)

        def decode(ids: Tensor) -> tuple[list[int], Counter]:
            decoder.counter = Counter()
            [row] = decoder.generate(ids, torch.ones_like(ids), Stop(self.size.new_tokens))
            return row, decoder.counter

        return decode

    def _generate(self, ids: Tensor) -> tuple[list[int], None]:
        found = self.target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.size.new_tokens,
            do_sample=False,
        )
        return found[0, ids.shape[1] :].tolist(), None


class Told:
    """A drafter that does its own work, and then proposes what it was told in place of it.

    Args:
        drafter: A bound drafter whose tree is a chain.
        texts: Prompts with their answers, each with a first token of its own; one is decoded at
            a time.
    """

    def __init__(self, drafter: Any, texts: Rows) -> None:
        self.drafter, self.layers = drafter, drafter.layers
        device = next(drafter.parameters()).device
        self._texts = {text[0]: torch.tensor(text, device=device) for text in texts}

    def bind(self, target: Any, tokenizer: Any) -> None:
        """Do nothing: the drafter is bound."""

    def start(self, first: Tensor) -> None:
        """Start a row [1]; see `kdcore.decoding.protocols.Drafter`."""
        self.drafter.start(first)
        self._text = self._texts[int(first)]
        self._committed = torch.ones_like(first)

    def propose(
        self, tokens: Tensor, features: Tensor, lengths: Tensor, generator: Any
    ) -> DraftTree:
        """Propose the text's next tokens, in the drafter's own chain."""
        tree: DraftTree = self.drafter.propose(tokens, features, lengths, generator)
        self._committed = self._committed + lengths
        ahead = torch.arange(tree.tokens.shape[1], device=tokens.device)
        places = (self._committed[:, None] + ahead).clamp(max=len(self._text) - 1)
        return DraftTree(self._text[places], tree.shape, tree.mask)


def _timed(name: str, ways: Ways, asked: Rows, repeats: int) -> dict[str, Any]:
    """Decode all prompts, once to warm up and count the host's waits, then timed."""
    device = ways.target.device
    decode, rows = ways.decode(name, asked), [torch.tensor([each], device=device) for each in asked]
    decode(rows[0])  # allocates, and chooses kernels
    waits = HostWaits(device)
    with waits:
        answers = [decode(ids) for ids in rows]
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        began = time.perf_counter()
        for ids in rows:
            decode(ids)
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    found = [tokens for tokens, _ in answers]
    emitted = sum(map(len, found))
    # generate has a pass for each token
    rounds = sum(counter.rounds if counter else len(tokens) for tokens, counter in answers)
    entry = {
        "tokens_per_second": emitted / statistics.median(seconds),
        "seconds": seconds,
        "tokens": emitted,
        "rounds": rounds,
        "tokens_per_round": emitted / rounds,
        **_milliseconds([counter for _, counter in answers if counter], rounds),
        **waits.per(rounds),
    }
    if name == GENERATE:
        ways.reference = found
        return entry | {"distinct_tokens": len(set().union(*found))}
    return entry | compared(ways, asked, found)


def _milliseconds(counters: Sequence[Counter], rounds: int) -> dict[str, float]:
    """The times of a round's proposal and verification; none for a way without rounds."""
    if not counters:
        return {}
    return {
        "draft_ms": 1000 * sum(each.draft_seconds for each in counters) / rounds,
        "verify_ms": 1000 * sum(each.verify_seconds for each in counters) / rounds,
    }


def compared(ways: Ways, asked: Rows, found: Rows) -> dict[str, Any]:
    """Compare answers with those of transformers' generate.

    Args:
        ways: The target and the reference.
        asked: The prompts.
        found: The answers.

    Returns:
        Whether all are equal (null without a reference), and the first difference of the first
        prompt that differs. Its margin is the logit of generate's token minus that of the other,
        in one pass without a cache over what both have in common: near 0, either may win.
    """
    if ways.reference is None:
        return {"equals_generate": None}
    for number, (prompt, own, other) in enumerate(zip(asked, found, ways.reference, strict=True)):
        if own == other:
            continue
        place = next(
            (n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b),
            min(len(own), len(other)),
        )
        first = {"prompt": number, "place": place}
        if place < min(len(own), len(other)):
            text = torch.tensor([prompt + own[:place]], device=ways.target.device)
            with torch.inference_mode():
                logits = ways.target(text, logits_to_keep=1).logits[0, -1].float()
            first |= {"token": own[place], "generate": other[place]}
            first |= {"margin": float(logits[other[place]] - logits[own[place]])}
            first |= {"logit": float(logits[other[place]])}
        return {"equals_generate": False, "first_difference": first}
    return {"equals_generate": True}


def _in_float32(target: Any, size: Size, asked: Rows) -> dict[str, Any]:
    """Compare all ways again in float32, where ties are rare; the target changes its dtype."""
    if target.dtype == torch.float32:
        return {"note": "the entries above are in float32"}
    ways = Ways(target.float(), size)
    rows = [torch.tensor([each], device=target.device) for each in asked]
    ways.reference = [ways.decode(GENERATE, asked)(ids)[0] for ids in rows]
    return {
        name: compared(ways, asked, [ways.decode(name, asked)(ids)[0] for ids in rows])
        for name in DRAFTERS
        if not name.endswith(COMPILED)  # minutes to compile again, for rounding that is known
    }


@dataclass
class HostWaits:
    """Counts how often the host waits for the device inside a ``with``, by the line that asks.

    torch counts copies to the host and what else synchronises, not an explicit synchronise.

    Attributes:
        device: The device; only CUDA can count.
    """

    device: torch.device

    def __enter__(self) -> None:
        self._lines: Counts[str] = Counts()
        if self.device.type == "cuda":
            self._caught = warnings.catch_warnings(record=True)
            self._seen = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def __exit__(self, *fault: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self._lines.update(
                f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}"
                for each in self._seen or ()
                if WAIT in str(each.message)
            )

    def per(self, rounds: int) -> dict[str, Any]:
        """The waits per round, and of the lines that ask most; null where nothing counts."""
        if self.device.type != "cuda":
            return {"host_waits_per_round": None}
        most = {line: count / rounds for line, count in self._lines.most_common(6)}
        return {"host_waits_per_round": self._lines.total() / rounds, "host_waits_by_line": most}
