"""The bench job: decode the same prompts by several methods, interleaved, and compare their speeds.

All methods decode each batch of prompts one after the other, in an order that rotates, so that
other load on the machine affects all of them alike. Speeds are compared within a batch.
"""

from __future__ import annotations

import collections
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import compress, product
from typing import Any

import torch
from torch import Tensor

from kdcore.components.registry import Registry, installed
from kdcore.data.conversation import Conversation
from kdcore.data.templates.mask import prompt_ids
from kdcore.decoding.build import build_before_target, build_decoder
from kdcore.decoding.drafters.files import drafter_digest
from kdcore.decoding.loop import Counter, Stop
from kdcore.decoding.replay import REPLAYED, replay
from kdcore.decoding.sampling import COLDEST
from kdcore.errors import UserError
from kdcore.evaluation.speed.bench_outcome import (
    DecodedBatch,
    Measurement,
    baselines,
    names,
    outcome,
)
from kdcore.evaluation.speed.served_decoder import ServedDecoder, refuse_unreachable
from kdcore.models.anatomy import context_of, short_length_of
from kdcore.models.assembly import Assembly
from kdcore.models.device import chosen_device, synchronise
from kdcore.models.facts import end_ids, refuse_crossing, tokenizer_digest
from kdcore.models.loaded import LoadedModel
from kdcore.models.loading.load import load_model
from kdcore.runs.comparison_results import BENCH_RESULTS
from kdcore.runs.folder import Run
from kdcore.runs.inputs import settle
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.results import REPLAYS, Replay
from kdcore.specs.bench import PLAIN, BenchSpec
from kdcore.specs.parts.decoding import SamplingSpec, sampling_at

MEASUREMENTS = "measurements.jsonl"
Decode = Callable[[Tensor, Tensor, int], DecodedBatch]


def bench(
    spec: BenchSpec,
    *,
    registry: Registry | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Decode the batches that are not measured yet, and write ``bench.json``.

    Args:
        spec: The bench spec.
        registry: The components that the spec may name (default: the installed ones).
        overwrite: Whether an existing run folder is replaced.
        resume: Whether an unfinished run is continued.
        progress: The display of stages and notes (default: none).

    Returns:
        The run, whose ``bench.json`` holds the results.

    Raises:
        UserError: `kdcore.runs.folder.Run.open` refuses the folder, a component cannot be built,
            or a prompt leaves no room in the context.
    """
    registry = registry or installed()
    progress = progress or Silent()
    # An existing run is replaced only once its successor's inputs could be read.
    read = _read_inputs(spec, registry, progress) if overwrite else None
    run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume)
    with run.closed_after():
        done = _read(run, spec)
        target, assistant, prompts = read or _read_inputs(spec, registry, progress)
        _settle(run, spec, target, assistant, prompts, begun=bool(done))
        cells = list(_cells(spec, prompts))
        measured = {each.cell for each in done}
        with progress.stage("decode", len(cells), len(measured)) as stage:
            for temperature, size in product(spec.temperatures, spec.batch_sizes):
                of = [c for c in cells if c[:2] == (temperature, size)]
                if measured.issuperset(of):
                    continue
                with ExitStack() as connections:
                    methods = _methods(
                        *(spec, target, assistant and assistant.model, registry, temperature, size),
                        progress.note,
                    )
                    for server in spec.servers:
                        methods[server] = _served(
                            server, spec, target, temperature, size, connections
                        )
                    _, _, name, _ = of[0]
                    device = target.model.device
                    # warm-up, not recorded
                    _one(methods, prompts[name][:size], 0, of[0], spec, device)
                    for place, cell in enumerate(of):  # `place` of a resumed run is the same
                        if cell in measured:
                            continue
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
    """Load the target, the assistant if the spec names one, and the prompts of each set."""
    for temperature, drafting in product(spec.temperatures, spec.methods.values()):
        # A bad combination is refused now, not after hours at the first temperature.
        build_before_target(drafting, sampling_at(temperature), registry)
    refuse_unreachable(spec.servers, progress)
    device = chosen_device(spec.device)
    progress.note(f"device: {device}")
    with progress.stage("load the target", 1) as stage:
        target = load_model(spec.target, device=device)
        assistant = load_assistant(spec, target)
        stage.advance()
    sources = {name: Assembly(registry).build(choice) for name, choice in spec.sets.items()}
    prompts = {name: read_prompts(source, name, spec, target) for name, source in sources.items()}
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
    """Record the inputs. Raises OtherInput when an input changed since batches were measured."""
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


def read_prompts(source: Any, name: str, spec: BenchSpec, target: LoadedModel) -> list[list[int]]:
    """Encode the first turns of ``limit`` rows, spread evenly over the set."""
    examples = source.read()
    if not isinstance(examples[0], Conversation):
        raise UserError(
            f"sets.{name} does not contain conversations",
            "choose a source of conversations, e.g. chat",
        )
    count = min(spec.limit, len(examples))
    chosen = [examples[place * len(examples) // count] for place in range(count)]
    context, short = context_of(target.model), short_length_of(target.model)
    asked = []
    for conversation in chosen:
        ids = prompt_ids(conversation.questions(), target.tokenizer)
        if context is not None and len(ids) + spec.max_new_tokens > context:
            raise UserError(
                f"sets.{name}: {conversation.id} has {len(ids)} tokens; with "
                f"{spec.max_new_tokens} new tokens it exceeds the target's context of {context}",
                "lower max_new_tokens, or remove that prompt",
            )
        refuse_crossing(short, len(ids), spec.max_new_tokens, f"sets.{name}: {conversation.id}")
        asked.append(ids)
    return asked


def _cells(
    spec: BenchSpec, prompts: dict[str, list[list[int]]]
) -> Iterator[tuple[float, int, str, int]]:
    """Yield (temperature, batch size, set, batch number); the sets take turns."""
    for temperature, size in product(spec.temperatures, spec.batch_sizes):
        batches = {name: -(-len(rows) // size) for name, rows in prompts.items()}
        for number in range(max(batches.values())):
            for name, count in batches.items():
                if number < count:
                    yield temperature, size, name, number


def load_assistant(
    spec: BenchSpec, target: LoadedModel, *, weights: bool = True
) -> LoadedModel | None:
    """Load the model of assisted generation. Raises UserError when its tokenizer differs."""
    if spec.assistant is None:
        return None
    device = target.model.device if weights else None
    assistant = load_model(spec.assistant, weights=weights, device=device)
    if tokenizer_digest(assistant.tokenizer) != tokenizer_digest(target.tokenizer):
        raise UserError(
            f"{assistant.name} and {target.name} have different tokenizers",
            "set assistant to a small model of the target's family",
        )
    return assistant


def _methods(
    spec: BenchSpec,
    target: LoadedModel,
    assistant: Any,
    registry: Registry,
    temperature: float,
    size: int,
    note: Callable[[str], None],
) -> dict[str, Decode]:
    sampling = sampling_at(temperature)
    found: dict[str, Decode] = {PLAIN: _ours(PLAIN, sampling, spec, target, registry, note)}
    for baseline in baselines(spec, size):
        found[baseline] = _theirs(baseline, spec, target, assistant, temperature)
    for name in spec.methods:
        found[name] = _ours(name, sampling, spec, target, registry)
    return found


def _ours(
    name: str,
    sampling: SamplingSpec,
    spec: BenchSpec,
    target: LoadedModel,
    registry: Registry,
    note: Callable[[str], None] | None = None,
) -> Decode:
    decoder = build_decoder(target, spec.drafting(name), sampling, registry, note)
    stop = Stop(spec.max_new_tokens, tuple(end_ids(target)))

    def decode(ids: Tensor, real: Tensor, seed: int) -> DecodedBatch:
        decoder.counter = Counter()
        generator = torch.Generator(ids.device).manual_seed(seed)
        answers = decoder.generate(ids, real, stop, generator)
        return DecodedBatch(sum(map(len, answers)), answers, decoder.counter)

    return decode


def _replays(
    spec: BenchSpec, target: LoadedModel, registry: Registry, prompt: Sequence[int]
) -> list[Replay]:
    """Decode a prompt with each drafting method, at the first temperature."""
    sampling = sampling_at(spec.temperatures[0])
    stop = Stop(min(spec.max_new_tokens, REPLAYED), tuple(end_ids(target)))
    decoders = {
        name: build_decoder(target, spec.drafting(name), sampling, registry)
        for name in spec.methods
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

    def decode(ids: Tensor, real: Tensor, seed: int) -> DecodedBatch:
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=real,
            max_new_tokens=spec.max_new_tokens,
            do_sample=bool(temperature),
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,  # without an end token all rows are equally long
            repetition_penalty=1.0,
            **(drawn if temperature else {}),
            **extra,
        )
        answers = [row[: _end(row, ends)] for row in out[:, ids.shape[1] :].tolist()]
        return DecodedBatch(sum(map(len, answers)), answers)

    return decode


def _served(
    name: str, spec: BenchSpec, target: LoadedModel, temperature: float, size: int, open_: ExitStack
) -> Decode:
    """Decoding by a server, whose connection ``open_`` closes."""
    ends = end_ids(target)
    server = ServedDecoder(spec.servers[name], size, spec.max_new_tokens, temperature, ends)
    open_.callback(server.close)

    def decode(ids: Tensor, real: Tensor, seed: int) -> DecodedBatch:
        rows = zip(ids.tolist(), real.tolist(), strict=True)
        return server.decode([list(compress(*row)) for row in rows], seed)

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
    """Decode a batch with every method; prompts are padded on the left, as `generate` needs."""
    temperature, size, name, number = cell
    width = max(map(len, rows))
    padded = [[0] * (width - len(row)) + list(row) for row in rows]
    ids = torch.tensor(padded, device=device)
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    order = list(methods)
    turn = place % len(order)
    took: dict[str, tuple[float, DecodedBatch]] = {}
    for method in order[turn:] + order[:turn]:
        synchronise(device)
        began = time.perf_counter()
        decoded = methods[method](ids, real, spec.seed + number)
        synchronise(device)
        took[method] = decoded.seconds or time.perf_counter() - began, decoded
    plain = took[PLAIN][1].answers
    return [
        Measurement(
            name,
            number,
            temperature,
            size,
            method,
            seconds,
            decoded.tokens,
            c.rounds if (c := decoded.counter) else None,
            c.draft_seconds if c and decoded.seconds is None else None,
            c.verify_seconds if c and decoded.seconds is None else None,
            c.accepted if c else None,
            None if temperature else _identical(decoded.answers, plain),
        )
        for method, (seconds, decoded) in took.items()
    ]


def _identical(
    answers: Sequence[list[int]] | None, plain: Sequence[list[int]] | None
) -> float | None:
    """Share of answers that equal the plain loop's; None for a server that returns no tokens."""
    if answers is None or plain is None:
        return None
    return sum(map(list.__eq__, answers, plain)) / len(plain)


def _append(run: Run, found: Sequence[Measurement]) -> None:
    """Append a batch in one write, so that a kill leaves whole batches or a truncated last line."""
    with run.path(MEASUREMENTS).open("a") as file:
        file.write("".join(json.dumps(asdict(each)) + "\n" for each in found))


def _read(run: Run, spec: BenchSpec) -> list[Measurement]:
    """Read the measurements of the batches that every method has decoded."""
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
