"""How fast methods decode the same prompts: in one run, interleaved, with one counter of tokens.

Every batch of prompts is decoded by all methods one after the other, in an order that rotates, so
that whatever else the machine does falls on all of them alike. Speeds are compared within a batch.
"""

from __future__ import annotations

import collections
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from torch import Tensor

from kdcore.data.conversation import Conversation
from kdcore.data.template_mask import prompt_ids
from kdcore.decoding.build import build_before_target, build_decoder
from kdcore.decoding.drafters.files import drafter_digest
from kdcore.decoding.loop import Counter, Stop
from kdcore.decoding.replay import REPLAYED, replay
from kdcore.decoding.sampling import COLDEST
from kdcore.errors import UserError
from kdcore.evaluation.bench_outcome import Measurement, baselines, names, outcome
from kdcore.method.registry import Registry, installed
from kdcore.models.anatomy import context_of, short_length_of
from kdcore.models.assembly import Assembly
from kdcore.models.device import chosen_device, synchronise
from kdcore.models.facts import end_ids, refuse_crossing, tokenizer_digest
from kdcore.models.loaded import LoadedModel
from kdcore.models.loading import load_model
from kdcore.runs.comparison_results import BENCH_RESULTS
from kdcore.runs.folder import Run
from kdcore.runs.inputs import settle
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.results import REPLAYS, Replay
from kdcore.specs.bench import PLAIN, BenchSpec
from kdcore.specs.decoding import DraftingSpec, SamplingSpec

MEASUREMENTS = "measurements.jsonl"
Decode = Callable[[Tensor, Tensor, int], tuple[list[list[int]], Counter | None]]


def bench(
    spec: BenchSpec,
    *,
    registry: Registry | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Decode what is not decoded yet; the folder's ``bench.json`` holds the outcome.

    Raises UserError as `kdcore.runs.folder.Run.open` does, for what cannot be built, and for
    prompts that leave no room in the context.
    """
    registry = registry or installed()
    progress = progress or Silent()
    read = _read_inputs(spec, registry, progress) if overwrite else None  # or they could not be
    run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume)
    with run.closed_after():
        done = _read(run, spec)
        target, assistant, prompts = read or _read_inputs(spec, registry, progress)
        _settle(run, spec, target, assistant, prompts, begun=bool(done))
        cells = list(_cells(spec, prompts))
        left = [cell for cell in cells if cell not in {each.cell for each in done}]
        with progress.stage("decode", len(cells), len(cells) - len(left)) as stage:
            for temperature, size in product(spec.temperatures, spec.batch_sizes):
                of = [c for c in left if c[:2] == (temperature, size)]
                if not of:
                    continue
                methods = _methods(
                    spec, target, assistant and assistant.model, registry, temperature, size
                )
                _, _, name, _ = of[0]
                device = target.model.device
                _one(methods, prompts[name][:size], 0, of[0], spec, device)  # warms up: forgotten
                for place, cell in enumerate(of):
                    rows = prompts[cell[2]][cell[3] * size : (cell[3] + 1) * size]
                    found = _one(methods, rows, place, cell, spec, device)
                    _append(run, found)
                    done += found
                    stage.advance()
        shown = _replays(spec, target, registry, next(iter(prompts.values()))[0])
        run.write(REPLAYS, shown)
        run.write(BENCH_RESULTS, outcome(spec, done))
    return run


def _read_inputs(
    spec: BenchSpec, registry: Registry, progress: Progress
) -> tuple[LoadedModel, LoadedModel | None, dict[str, list[list[int]]]]:
    """The target, the assistant if there is one, and the prompts of each set."""
    for temperature, drafting in product(spec.temperatures, spec.methods.values()):
        # refused here, not after hours at the first temperature
        build_before_target(drafting, _sampling(temperature), registry)
    device = chosen_device(spec.device)
    progress.note(f"device: {device}")
    with progress.stage("load the target", 1) as stage:
        target = load_model(spec.target)
        target.to(device)
        assistant = _assistant(spec, target)
        stage.advance()
    sources = {name: Assembly(registry).build(choice) for name, choice in spec.sets.items()}
    prompts = {name: _prompts(source, name, spec, target) for name, source in sources.items()}
    return target, assistant, prompts


def _settle(
    run: Run,
    spec: BenchSpec,
    target: LoadedModel,
    assistant: LoadedModel | None,
    prompts: Mapping[str, list[list[int]]],
    *,
    begun: bool,
) -> None:
    """Raises OtherInput when batches were measured with something else by the same names."""
    said = spec.model_dump(mode="json")
    settle(run, "the device", said["device"], target.model.device.type, begun=begun)
    settle(run, "the target", said["target"], target.digest, begun=begun)
    if assistant is not None:
        settle(run, "the assistant", said["assistant"], assistant.digest, begun=begun)
    for name, drafting in spec.methods.items():
        if drafting.folder is not None:
            digest = drafter_digest(drafting.folder)
            settle(run, f"the drafter of {name}", said["methods"][name], digest, begun=begun)
    for name, rows in prompts.items():
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        asked = [said["sets"][name], said["limit"]]
        settle(run, f"the prompts of sets.{name}", asked, digest, begun=begun)


def _prompts(source: Any, name: str, spec: BenchSpec, target: LoadedModel) -> list[list[int]]:
    """The first turns of ``limit`` rows, spread evenly over the set."""
    examples = source.read()
    if not isinstance(examples[0], Conversation):
        raise UserError(f"sets.{name} has no conversations", "name a source of prompts, as chat")
    count = min(spec.limit, len(examples))
    chosen = [examples[place * len(examples) // count] for place in range(count)]
    context, short = context_of(target.model), short_length_of(target.model)
    asked = []
    for conversation in chosen:
        ids = prompt_ids(conversation.questions(), target.tokenizer)
        if context is not None and len(ids) + spec.max_new_tokens > context:
            raise UserError(
                f"sets.{name}: {conversation.id} has {len(ids)} tokens, and with "
                f"{spec.max_new_tokens} new ones exceeds the target's context of {context}",
                "lower max_new_tokens, or remove that prompt",
            )
        refuse_crossing(short, len(ids), spec.max_new_tokens, f"sets.{name}: {conversation.id}")
        asked.append(ids)
    return asked


def _cells(
    spec: BenchSpec, prompts: dict[str, list[list[int]]]
) -> Iterator[tuple[float, int, str, int]]:
    """Temperature, batch size, set, number of the batch; the sets take turns."""
    for temperature, size in product(spec.temperatures, spec.batch_sizes):
        batches = {name: -(-len(rows) // size) for name, rows in prompts.items()}
        for number in range(max(batches.values())):
            for name, count in batches.items():
                if number < count:
                    yield temperature, size, name, number


def _assistant(spec: BenchSpec, target: LoadedModel) -> LoadedModel | None:
    """The model of assisted generation, if one is asked for.

    Raises UserError when its tokenizer gives other ids.
    """
    if spec.assistant is None:
        return None
    assistant = load_model(spec.assistant)
    if tokenizer_digest(assistant.tokenizer) != tokenizer_digest(target.tokenizer):
        raise UserError(
            f"{assistant.name} and {target.name} have different tokenizers",
            "name a small model of the target's family as the assistant",
        )
    assistant.to(target.model.device)
    return assistant


def _methods(
    spec: BenchSpec,
    target: LoadedModel,
    assistant: Any,
    registry: Registry,
    temperature: float,
    size: int,
) -> dict[str, Decode]:
    sampling = _sampling(temperature)
    nothing = DraftingSpec.model_validate({})
    found: dict[str, Decode] = {PLAIN: _ours(nothing, sampling, spec, target, registry)}
    for baseline in baselines(spec, size):
        found[baseline] = _theirs(baseline, spec, target, assistant, temperature)
    for name, drafting in spec.methods.items():
        found[name] = _ours(drafting, sampling, spec, target, registry)
    return found


def _sampling(temperature: float) -> SamplingSpec:
    return SamplingSpec.model_validate({"temperature": temperature})


def _ours(
    drafting: DraftingSpec,
    sampling: SamplingSpec,
    spec: BenchSpec,
    target: LoadedModel,
    registry: Registry,
) -> Decode:
    decoder = build_decoder(target, drafting, sampling, registry)
    stop = Stop(spec.max_new_tokens, tuple(end_ids(target)))

    def decode(ids: Tensor, real: Tensor, seed: int) -> tuple[list[list[int]], Counter]:
        decoder.counter = Counter()
        generator = torch.Generator(ids.device).manual_seed(seed)
        return decoder.generate(ids, real, stop, generator), decoder.counter

    return decode


def _replays(
    spec: BenchSpec, target: LoadedModel, registry: Registry, prompt: Sequence[int]
) -> list[Replay]:
    """A prompt decoded by each method that drafts, at the first temperature."""
    sampling = _sampling(spec.temperatures[0])
    stop = Stop(min(spec.max_new_tokens, REPLAYED), tuple(end_ids(target)))
    decoders = {
        name: build_decoder(target, drafting, sampling, registry)
        for name, drafting in spec.methods.items()
    }
    return [
        replay(decoder, prompt, target.tokenizer, name, stop, spec.seed)
        for name, decoder in decoders.items()
    ]


def _theirs(
    name: str, spec: BenchSpec, target: LoadedModel, assistant: Any, temperature: float
) -> Decode:
    ends = end_ids(target)
    model: Any = target.model
    drawn = {"temperature": max(temperature, COLDEST), "top_k": 0, "top_p": 1.0}
    extra: dict[str, Any] = {
        "generate": {},
        "prompt_lookup": {"prompt_lookup_num_tokens": 10},
        "assisted": {"assistant_model": assistant},
    }[name]

    def decode(ids: Tensor, real: Tensor, seed: int) -> tuple[list[list[int]], None]:
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=real,
            max_new_tokens=spec.max_new_tokens,
            do_sample=bool(temperature),
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,  # without an end all rows are of one length
            repetition_penalty=1.0,
            **(drawn if temperature else {}),
            **extra,
        )
        rows = out[:, ids.shape[1] :].tolist()
        return [row[: _end(row, ends)] for row in rows], None

    return decode


def _end(row: Sequence[int], ends: Sequence[int]) -> int:
    return next((place + 1 for place, token in enumerate(row) if token in ends), len(row))


def _one(
    methods: dict[str, Decode],
    rows: Sequence[Sequence[int]],
    place: int,
    cell: tuple[float, int, str, int],
    spec: BenchSpec,
    device: torch.device,
) -> list[Measurement]:
    """A batch by every method; prompts are padded on the left, as `generate` wants them."""
    temperature, size, name, number = cell
    width = max(map(len, rows))
    padded = [[0] * (width - len(row)) + list(row) for row in rows]
    ids = torch.tensor(padded, device=device)
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    order = list(methods)
    turn = place % len(order)
    took: dict[str, tuple[float, list[list[int]], Counter | None]] = {}
    for method in order[turn:] + order[:turn]:
        synchronise(device)
        began = time.perf_counter()
        answers, counter = methods[method](ids, real, spec.seed + number)
        synchronise(device)
        took[method] = time.perf_counter() - began, answers, counter
    plain = took[PLAIN][1]
    return [
        Measurement(
            name,
            number,
            temperature,
            size,
            method,
            seconds,
            sum(map(len, answers)),
            c.rounds if c else None,
            c.draft_seconds if c else None,
            c.verify_seconds if c else None,
            c.accepted if c else None,
            None if temperature else sum(map(list.__eq__, answers, plain)) / len(plain),
        )
        for method, (seconds, answers, c) in took.items()
    ]


def _append(run: Run, found: Sequence[Measurement]) -> None:
    """A batch in one write, so that a kill leaves whole batches or a cut last line."""
    with run.path(MEASUREMENTS).open("a") as file:
        file.write("".join(json.dumps(asdict(each)) + "\n" for each in found))


def _read(run: Run, spec: BenchSpec) -> list[Measurement]:
    """The measurements of batches that every method has decoded."""
    path = run.path(MEASUREMENTS)
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            accepted = row.pop("accepted")
            counts = None if accepted is None else {int(k): v for k, v in accepted.items()}
            found.append(Measurement(**row, accepted=counts))
    seen = collections.Counter(m.cell for m in found)
    whole = [m for m in found if seen[m.cell] == len(names(spec, m.batch_size))]
    run.write_text(MEASUREMENTS, "".join(json.dumps(asdict(each)) + "\n" for each in whole))
    return whole
