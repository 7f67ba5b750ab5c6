"""CPU time of decoding by engine: transformers' generate, torch and openvino, one after the other.

    python benchmarks/decoding_engines.py MODEL [--tokens 64] [--rounds 5] [--drafter FOLDER]

Each round decodes the same prompts once by every method, in an order that rotates, and measures the
CPU time of this process (``process_time``), which other work on the machine disturbs less than wall
time. The table has the median over rounds, per token, and the ratio to ``generate``. Every answer
is compared with the plain one of the same engine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kdcore.decoding.build import build_decoder
from kdcore.decoding.loop import Decoder, Stop
from kdcore.method.registry import installed
from kdcore.models.loading import load_model
from kdcore.specs.decoding import DraftingSpec, SamplingSpec
from kdcore.specs.fields import ModelSpec

PROMPTS = (
    "The lighthouse keeper wrote in his diary every night. On the third of March he wrote:",
    "Q: A farmer has 17 sheep and buys 5 more each week. How many are there after 6 weeks?\nA:",
    "def fibonacci(n):\n    ",
)
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"name": "torch"},
    "openvino": {"name": "openvino"},
    "openvino, float16 weights": {"name": "openvino", "weights": "float16"},
}


def processor() -> str:
    """The name of the processor, and whether it multiplies bfloat16."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    multiplies = "multiplies" if bfloat16 else "does not multiply"
    return f"{names[0] if names else platform.processor()} ({multiplies} bfloat16)"


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--drafter", type=Path)
    options.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    target = load_model(ModelSpec.model_validate({"model": given.model, "dtype": given.dtype}))
    model: Any = target.model
    tokens = [target.tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]

    drafts: dict[str, dict[str, Any]] = {"plain": {}, "ngram": {"drafter": "ngram"}}
    if given.drafter is not None:
        drafts["drafter"] = {"folder": str(given.drafter)}
    decoders: dict[str, Decoder] = {}
    for engine in given.engines:
        for drafter, said in drafts.items():
            spec = DraftingSpec.model_validate(said | {"engine": ENGINES[engine]})
            sampling = SamplingSpec.model_validate({})
            decoders[f"{engine}, {drafter}"] = build_decoder(target, spec, sampling, installed())

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

    methods = {"generate": generate} | {name: by(each) for name, each in decoders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    answers: dict[str, list[list[int]]] = {}
    for turn in range(1 + given.rounds):
        order = list(methods)
        place = turn % len(order)
        for name in order[place:] + order[:place]:
            began = time.process_time()
            answers[name] = [methods[name](ids) for ids in tokens]
            seconds[name].append(time.process_time() - began)
    print(f"{given.model}, {given.dtype}, threads: {given.threads}, {processor()}")
    print("| method | ms of CPU a token | times generate | tau | same as plain |")
    print("| --- | --- | --- | --- | --- |")
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    for name, median in medians.items():
        engine = name.rpartition(",")[0]
        plain = answers.get(f"{engine}, plain", answers[name])
        same = sum(map(list.__eq__, answers[name], plain))
        tau = f"{decoders[name].counter.tau:.2f}" if name in decoders else ""
        each = 1000 * median / (given.tokens * len(PROMPTS))
        print(
            f"| {name} | {each:.1f} | {medians['generate'] / median:.2f} | {tau} | "
            f"{same} of {len(PROMPTS)} |"
        )


if __name__ == "__main__":
    main()
