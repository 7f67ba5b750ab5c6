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
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import product, zip_longest

import torch

from kdcore.components.registry import Registry, installed
from kdcore.data.conversation import Conversation
from kdcore.decoding.baseline import Baseline, DecodedBatch, DecodingSettings, left_padded
from kdcore.decoding.build import BoundEngines, build_decoder
from kdcore.decoding.drafters.files import drafter_digest
from kdcore.decoding.loop import Counter, Stop
from kdcore.errors import in_field
from kdcore.evaluation.replay import REPLAYED, replay
from kdcore.evaluation.speed.bench_outcome import Cell, Measurement, names, outcome
from kdcore.evaluation.speed.served_decoder import ServedDecoder, refuse_unreachable
from kdcore.evaluation.speed.turns import Decode, Turns, prompts_by_turn
from kdcore.jobs.resolution.benchmark import of_method, read_sets, refuse_methods
from kdcore.models.assembly import Assembly
from kdcore.models.device import chosen_device, processor_facts, synchronise
from kdcore.models.facts import end_ids
from kdcore.models.loading.load import load_model
from kdcore.models.loading.loaded import LoadedModel
from kdcore.runs.comparison_results import BENCH_RESULTS
from kdcore.runs.folder import Run
from kdcore.runs.inputs import settle
from kdcore.runs.progress import Progress, Silent
from kdcore.runs.results import REPLAYS, Replay
from kdcore.specs.bench import PLAIN, BenchSpec
from kdcore.specs.parts.decoding import sampling_at

MEASUREMENTS = "measurements.jsonl"


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What a benchmark reads.

    Attributes:
        target: The target.
        baselines: Name -> the baseline, bound to the target.
        questions: Task set -> its rows, without responses.
        prompts: Task set -> the prompts of their first turns.
        threads: Numbers of threads.
    """

    target: LoadedModel
    baselines: dict[str, Baseline]
    questions: dict[str, list[Conversation]]
    prompts: dict[str, list[list[int]]]
    threads: list[int]


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
            a baseline cannot run the target, or a prompt leaves no room in the context.
    """
    registry = registry or installed()
    progress = progress or Silent()
    with ExitStack() as held:
        # An existing run is replaced only once its successor's inputs could be read.
        read = _read_inputs(spec, registry, progress, held) if overwrite else None
        run = Run.open(spec.run, spec, registry, overwrite=overwrite, resume=resume)
        with run.closed_after():
            done = _read(run, spec)
            inputs = read or _read_inputs(spec, registry, progress, held)
            _settle(run, spec, inputs, begun=bool(done))
            alone = _settings(spec, inputs.target, (inputs.threads[0], 0.0, 1), longest_prompt=0)
            turns = prompts_by_turn(
                *(run, spec, inputs.target, inputs.questions, inputs.prompts),
                lambda: _ours(PLAIN, alone, spec, inputs.target, registry),
                progress,
                begun=bool(done),
            )
            longest = max(len(row) for of in turns.values() for rows in of for row in rows)
            cells = list(_cells(spec, inputs.threads, turns))
            measured = {each.cell for each in done}
            engines, compiled_for = BoundEngines(inputs.target, registry), inputs.threads[0]
            with progress.stage("decode", len(cells), len(measured)) as stage:
                for setting in dict.fromkeys(cell[:3] for cell in cells):
                    of = [cell for cell in cells if cell[:3] == setting]
                    if measured.issuperset(of):
                        continue
                    settings = _settings(spec, inputs.target, setting, longest)
                    if settings.threads != compiled_for:
                        engines = BoundEngines(inputs.target, registry)
                        compiled_for = settings.threads
                    with _methods(
                        spec, inputs, registry, settings, engines, progress.note
                    ) as methods:
                        device = inputs.target.model.device
                        # warm-up, not recorded
                        _one(methods, _rows(turns, of[0]), 0, of[0], spec, device)
                        for place, cell in enumerate(of):  # `place` of a resumed run is the same
                            if cell in measured:
                                continue
                            found = _one(methods, _rows(turns, cell), place, cell, spec, device)
                            _append(run, found)
                            done += found
                            stage.advance()
            first = next(iter(turns.values()))[0][0]
            run.write(REPLAYS, _replays(spec, inputs.target, registry, engines, first))
            run.write(BENCH_RESULTS, outcome(spec, done, *processor_facts()))
    return run


def _read_inputs(
    spec: BenchSpec, registry: Registry, progress: Progress, held: ExitStack
) -> _Inputs:
    """Load the target, prepare the baselines, which ``held`` closes, and read the prompts."""
    refuse_methods(spec, registry)  # now, and not after hours at the first temperature
    with in_field("servers"):
        refuse_unreachable(spec.servers, progress)
    device = chosen_device(spec.device)
    progress.note(f"device: {device}")
    assembly = Assembly(registry, device=device)
    baselines = assembly.built(spec.baselines, "baselines.{}".format)
    with progress.stage("load the target", 1) as stage, in_field("target"):
        target = load_model(spec.target, device=device)
        stage.advance()
    for name, baseline in baselines.items():
        held.callback(baseline.close)
        with in_field(f"baselines.{name}"):
            baseline.bind(target)
    questions, prompts = read_sets(spec, target, assembly)
    threads = spec.threads or [torch.get_num_threads()]
    return _Inputs(target, baselines, questions, prompts, threads)


def _settle(run: Run, spec: BenchSpec, inputs: _Inputs, *, begun: bool) -> None:
    """Record the inputs. Raises OtherInput when an input changed since batches were measured."""
    said = spec.model_dump(mode="json")
    target = inputs.target
    settle(run, "the device", said["device"], target.model.device.type, begun=begun)
    settle(run, "the number of threads", said["threads"], str(inputs.threads), begun=begun)
    settle(run, "the target", said["target"], target.digest, begun=begun)
    for name, baseline in inputs.baselines.items():
        if baseline.digest is not None:
            asked = said["baselines"][name]
            settle(run, f"the model of {name}", asked, baseline.digest, begun=begun)
    for name, drafting in spec.methods.items():
        if drafting.folder is not None:
            digest = drafter_digest(drafting.folder)
            settle(run, f"the drafter of {name}", said["methods"][name], digest, begun=begun)
    for name, rows in inputs.questions.items():
        questions = [[m.plain() for m in row.messages] for row in rows]
        digest = hashlib.sha256(json.dumps([questions, inputs.prompts[name]]).encode()).hexdigest()
        asked = [said["sets"][name], said["limit"], said["turns"]]
        settle(run, f"the prompts of sets.{name}", asked, digest, begun=begun)


def _cells(spec: BenchSpec, threads: Sequence[int], turns: Turns) -> Iterator[Cell]:
    """Yield the batches of each setting, of one turn each; the sets take turns."""
    settings = product(threads, spec.temperatures, spec.batch_sizes)
    for count, temperature, size in settings:
        batches = {
            name: [
                Cell(count, temperature, size, name, turn, batch)
                for turn, rows in enumerate(prompts, start=1)
                for batch in range(-(-len(rows) // size))
            ]
            for name, prompts in turns.items()
        }
        for together in zip_longest(*batches.values()):
            yield from filter(None, together)


def _rows(turns: Turns, cell: Cell) -> list[list[int]]:
    first = cell.batch * cell.batch_size
    return turns[cell.task_set][cell.turn - 1][first : first + cell.batch_size]


def _settings(
    spec: BenchSpec,
    target: LoadedModel,
    setting: tuple[int, float, int],
    longest_prompt: int,
) -> DecodingSettings:
    threads, temperature, size = setting
    return DecodingSettings(
        batch_size=size,
        longest_prompt=longest_prompt,
        max_new_tokens=spec.max_new_tokens,
        temperature=temperature,
        ends=tuple(end_ids(target)),
        threads=threads,
    )


@contextmanager
def _methods(
    spec: BenchSpec,
    inputs: _Inputs,
    registry: Registry,
    settings: DecodingSettings,
    engines: BoundEngines,
    note: Callable[[str], None],
) -> Iterator[dict[str, Decode]]:
    """The methods with a setting, in the order of `names`."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        with ExitStack() as connections:
            found: dict[str, Decode] = {}
            for name, baseline in inputs.baselines.items():
                baseline.start(settings)
                found[name] = baseline.decode
            found[PLAIN] = _ours(PLAIN, settings, spec, inputs.target, registry, note, engines)
            for name in spec.methods:
                found[name] = _ours(name, settings, spec, inputs.target, registry, None, engines)
            for name, endpoint in spec.servers.items():
                server = ServedDecoder(endpoint, settings)
                connections.callback(server.close)
                found[name] = server.decode
            yield found
    finally:
        torch.set_num_threads(before)


def _ours(
    name: str,
    settings: DecodingSettings,
    spec: BenchSpec,
    target: LoadedModel,
    registry: Registry,
    note: Callable[[str], None] | None = None,
    engines: BoundEngines | None = None,
) -> Decode:
    sampling = sampling_at(settings.temperature)
    with of_method(name):
        decoder = build_decoder(target, spec.drafting(name), sampling, registry, note, engines)
    stop = Stop(settings.max_new_tokens, settings.ends)
    device = target.model.device

    def decode(prompts: Sequence[Sequence[int]], seed: int) -> DecodedBatch:
        decoder.counter = Counter()
        generator = torch.Generator(device).manual_seed(seed)
        ids, mask = (torch.tensor(rows, device=device) for rows in left_padded(prompts))
        answers = decoder.generate(ids, mask, stop, generator)
        return DecodedBatch.of(answers, decoder.counter)

    return decode


def _replays(
    spec: BenchSpec,
    target: LoadedModel,
    registry: Registry,
    engines: BoundEngines,
    prompt: Sequence[int],
) -> list[Replay]:
    """Decode a prompt with each drafting method, at the first temperature."""
    sampling = sampling_at(spec.temperatures[0])
    stop = Stop(min(spec.max_new_tokens, REPLAYED), tuple(end_ids(target)))

    def replayed(name: str) -> Replay:
        with of_method(name):
            drafting = spec.drafting(name)
            decoder = build_decoder(target, drafting, sampling, registry, engines=engines)
        return replay(decoder, prompt, target.tokenizer, name, stop, spec.seed)

    return [replayed(name) for name in spec.methods]


def _one(
    methods: Mapping[str, Decode],
    rows: Sequence[Sequence[int]],
    place: int,
    cell: Cell,
    spec: BenchSpec,
    device: torch.device,
) -> list[Measurement]:
    """Decode a batch with every method."""
    order = list(methods)
    turn = place % len(order)
    took: dict[str, tuple[float, float, DecodedBatch]] = {}
    for method in order[turn:] + order[:turn]:
        synchronise(device)
        began, busy = time.perf_counter(), time.process_time()
        decoded = methods[method](rows, spec.seed + cell.batch)
        synchronise(device)
        took[method] = time.perf_counter() - began, time.process_time() - busy, decoded
    plain = took[PLAIN][2].answers
    return [
        _measured(cell, method, *figures, None if cell.temperature else plain)
        for method, figures in took.items()
    ]


def _measured(
    cell: Cell,
    method: str,
    seconds: float,
    busy: float,
    decoded: DecodedBatch,
    plain: Sequence[list[int]] | None,
) -> Measurement:
    counter, elsewhere = decoded.counter, decoded.seconds is not None
    counted = counter if not elsewhere else None
    return Measurement(
        *cell,
        method,
        decoded.seconds or seconds,
        decoded.tokens,
        cpu=None if elsewhere else busy,
        rounds=counter.rounds if counter else None,
        emitted=counter.emitted if counter else None,
        draft=counted.draft_seconds if counted else None,
        verify=counted.verify_seconds if counted else None,
        accepted=counter.accepted if counter else None,
        undrafted=counter.undrafted if counter else None,
        identical=_mean_over(list.__eq__, decoded.answers, plain),
        agreed=_mean_over(_agreed, decoded.answers, plain),
    )


def _mean_over(
    alike: Callable[[list[int], list[int]], float],
    answers: Sequence[list[int]] | None,
    plain: Sequence[list[int]] | None,
) -> float | None:
    """Mean likeness to the plain loop's answers; None if sampled, or without tokens."""
    if answers is None or plain is None:
        return None
    return sum(map(alike, answers, plain)) / len(plain)


def _agreed(answer: list[int], plain: list[int]) -> float:
    """Share of the tokens before the first that differs."""
    same = (place for place, (a, b) in enumerate(zip(answer, plain, strict=False)) if a != b)
    return next(same, min(len(answer), len(plain))) / len(plain)


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
    whole = [m for m in found if seen[m.cell] == len(names(spec))]
    run.write_text(MEASUREMENTS, "".join(json.dumps(asdict(each)) + "\n" for each in whole))
    return whole
