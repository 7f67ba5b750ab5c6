"""A command that is killed anywhere, and then resumed or repeated, ends with the same bits.

Each is killed at random moments and at the n-th change of a file, by itself and with the processes
of its cells, or finds the disk full from then on; ``KDCORE_KILLS`` is the number of each kind
(`make kills`). The draws are those of a seed, ``KDCORE_KILLS_SEED``.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from kdcore.specs.reading import plain_yaml
from tests.fixtures.json_lines import write_lines
from tests.fixtures.processes.killed import Ended
from tests.fixtures.processes.killed import ended as run_to_its_end
from tests.tiny.distill_specs import chat
from tests.tiny.tiny_chat_models import saved, tiny_model

KILLS = int(os.environ.get("KDCORE_KILLS", "1"))
SEED = int(os.environ.get("KDCORE_KILLS_SEED", "0"))


@dataclass(frozen=True)
class Command:
    """A command line and what it makes.

    Attributes:
        words: The words after ``kdcore``.
        results: Patterns of the files whose bits must be the same; none for one that only reads.
        again: The words that are added when it is repeated.
        needs: Commands whose results it reads.
        replaces: A setting of a finished run of the same command that is in its folder before.
    """

    words: tuple[str, ...]
    results: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    replaces: str | None = None

    @property
    def plain(self) -> tuple[str, ...]:
        """The words of the command in an empty folder."""
        return tuple(word for word in self.words if word != "--overwrite")


RESUME = ("--resume",)
TRAINED = ("run/[adm]*/*.safetensors", "run/results.json", "run/heldout_rows.json", "run/README.md")
COMMANDS = {
    "distill": Command(("distill", "distill.yaml"), TRAINED, RESUME),
    "train-drafter": Command(("train-drafter", "drafter.yaml"), TRAINED, RESUME),
    "generate-data": Command(("generate-data", "data.yaml"), ("run/responses.jsonl",), RESUME),
    "cache": Command(("cache", "build", "distill.yaml", "--out", "run", "--k", "4"), ("run/*.s*",)),
    "share": Command(
        ("cache", "build", "distill.yaml", "--out", "run", "--k", "4", "--share", "2/3"),
        ("run/*.s*",),
    ),
    "merge": Command(
        ("cache", "merge", "run", "../share/run", "../cache/run"), ("run/*",),
        needs=("share", "cache"),
    ),
    "overwrite": Command(
        ("distill", "distill.yaml", "--overwrite"), TRAINED, replaces="seed=7"
    ),
    "overwrite, then resume": Command(
        ("distill", "distill.yaml", "--overwrite"), TRAINED, RESUME, replaces="seed=7"
    ),
    "overwrite data": Command(
        ("generate-data", "data.yaml", "--overwrite"), ("run/responses.jsonl",),
        replaces="responses.max_new_tokens=3",
    ),
    "bench": Command(
        ("bench", "bench.yaml"), ("run/measurements.jsonl", "run/replay.json"), RESUME
    ),
    "export": Command(
        ("export", "../train-drafter/run/drafter", "--format", "vllm", "--out", "run"),
        ("run/*",), needs=("train-drafter",),
    ),
    "import": Command(
        ("import", "../export/run", "--target", "../shared/teacher", "--out", "run"), ("run/*",),
        needs=("export",),
    ),
    "generate": Command(
        ("generate", "../shared/teacher", "--file", "../shared/rows.jsonl", "--batch-size", "3",
         "--max-new-tokens", "4", "--out", "answers.jsonl"), ("answers.jsonl",),
    ),
    "report": Command(
        ("report", "../distill/run", "--out", "page.html"), ("page.html",), needs=("distill",)
    ),
    "init": Command(("init", "new.yaml"), ("new.yaml", "prompts.jsonl", "heldout.jsonl")),
    "init --data": Command(("init", "new.yaml", "--data", "../shared/rows.jsonl"), ("new.yaml",)),
    "schema": Command(("schema", "--out", "schema.json"), ("schema.json",)),
    "plugins new": Command(
        ("plugins", "new", "my-gate", "--kind", "gate", "--out", "run"), ("run/**/*",)
    ),
    "compare": Command(
        ("compare", "compare.yaml"),
        (
            "run/cells/*/*/model/*.safetensors", "run/cells/*/*/results.json",
            "run/cells/*/*/heldout_rows.json", "run/comparison.json",
        ),
        RESUME,
    ),
    "check": Command(("check", "distill.yaml")),
    "doctor": Command(
        ("doctor", "../train-drafter/run/drafter", "../shared/teacher", "--max-new-tokens", "4"),
        needs=("train-drafter",),
    ),
    "evaluate": Command(("evaluate", "../distill/run", "--set", "chunk=7"), needs=("distill",)),
    "evaluate runs": Command(
        ("evaluate", *(f"../compare/run/cells/{arm}/seed-0" for arm in "ab")), needs=("compare",)
    ),
}  # fmt: skip
MANY = KILLS > 1
KINDS = (("write", False), ("write", True), ("moment", False), ("moment", True))
"""At a write or a moment, and whether it reaches the whole process group."""
KILLED = [
    (name, kind, group) for name in COMMANDS for kind, group in KINDS if name == "compare" or group
]
STOPPED = [
    (name, by, kind, group)
    for name in COMMANDS
    if name not in ("schema", "init", "init --data", "plugins new", "overwrite data")
    for by in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for kind, group in KINDS
    if name == "compare" or group
]
FILLED = [name for name, command in COMMANDS.items() if command.results]
if not MANY:  # the suite takes a few
    FILLED = ["distill", "generate-data", "export", "init"]
    KILLED = [
        (name, "write", True)
        for name, command in COMMANDS.items()
        if command.results and name not in ("share", "overwrite")
    ]
    KILLED += [("distill", "moment", True)]
    STOPPED = [
        ("distill", signal.SIGTERM, "moment", True), ("train-drafter", signal.SIGINT, "write", True)
    ]  # fmt: skip


def specs(shared: Path) -> dict[str, Any]:
    model = {"model": str(shared / "teacher")}
    rows = {"name": "chat", "path": str(shared / "rows.jsonl")}
    heldout = rows | {"path": str(shared / "heldout.jsonl")}
    training = {"batch_size": 4, "learning_rate": 1e-2, "steps": 5, "schedule": "constant"}
    evaluation = {"samples": 1, "sample_tokens": 3}
    distill = {
        "job": "distill", "run": "run", "teacher": model,
        "student": {"layers": [0, 2], "lora": {"r": 2, "dropout": 0.3}},
        "data": {"train": rows, "heldout": heldout},
        "method": {"gates": [{"name": "random", "rate": 0.6}]},
        "training": training | {"save_every": 2}, "evaluation": evaluation,
    }  # fmt: skip
    answers = {"by": "target", "max_new_tokens": 4, "batch_size": 3}
    drafter = {
        "job": "train-drafter", "run": "run", "target": model,
        "drafter": {"name": "eagle3", "depth": 2, "features": [1, 2, 3]},
        "data": {"train": rows, "heldout": heldout, "responses": answers, "hidden_states": {}},
        "training": training | {"save_every": 2, "eval_every": 2},
    }  # fmt: skip
    data = {
        "job": "generate-data", "run": "run", "teacher": model, "source": rows,
        "responses": {"max_new_tokens": 6, "batch_size": 2, "temperature": 1.0},
    }  # fmt: skip
    base = {name: each for name, each in distill.items() if name not in ("job", "run")}
    compare = {
        "job": "compare", "run": "run", "seeds": [0], "draws": 10, "base": base,
        "arms": {"a": {}, "b": {"method": {"tau": 2}}},
    }  # fmt: skip
    bench = {
        "job": "bench", "run": "run", "target": model, "methods": {"ngram": {"drafter": "ngram"}},
        "baselines": ["generate"], "sets": {"mine": rows}, "limit": 4, "max_new_tokens": 4,
        "temperatures": [0, 1],
    }  # fmt: skip
    return {
        "distill": distill, "drafter": drafter, "data": data, "compare": compare, "bench": bench
    }  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("kills")
    shared = home / "shared"
    shared.mkdir()
    saved(tiny_model(), shared / "teacher")
    for name, numbers in (("rows", range(9)), ("heldout", range(20, 22))):
        rows = [chat(n) for n in numbers]
        write_lines(shared / f"{name}.jsonl", rows)
    return home


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[str, tuple[Ended, dict[str, str]]]:
    """The commands that nobody disturbs, as they are asked for."""
    return {}


MINE = ("run.part/kept", "answers.jsonl.part", "new.yaml.part", "page.html.part", "my-gate/kept")
"""Somebody's own files, of names that a program might take for its own."""


def begun(home: Path, name: str, command: Command) -> Path:
    """A folder with the specs, some other files and, if the command replaces one, another run."""
    folder = home / name
    folder.mkdir()
    for file, spec in specs(home / "shared").items():
        (folder / f"{file}.yaml").write_text(plain_yaml.dump(spec))
    for own in MINE:
        (folder / own).parent.mkdir(exist_ok=True)
        (folder / own).write_text("mine")
    if command.replaces:
        other = home / f"{command.words[0]}-other"
        if not other.exists():
            begun(home, other.name, replace(command, replaces=None))
            ended = run_to_its_end(other, *command.plain, "--set", command.replaces)
            assert ended.code == 0, ended.said
        shutil.copytree(other / "run", folder / "run")
    return folder


def bits(folder: Path, patterns: tuple[str, ...]) -> dict[str, str]:
    assert {own: (folder / own).read_text() for own in MINE} == dict.fromkeys(MINE, "mine")
    files = [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]
    return {
        str(file.relative_to(folder)): hashlib.sha256(_content(file)).hexdigest()
        for file in files
        if file.name not in ("lock", "run.lock")
    }


def _content(file: Path) -> bytes:
    """The bytes of a file, without the times that were measured."""
    if file.name == "comparison.json":
        comparison = json.loads(file.read_text())
        return repr(
            [{**arm, "cost": None} for arm in comparison.pop("arms")] + [comparison]
        ).encode()
    if file.name != "measurements.jsonl":
        return file.read_bytes()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    times = ("seconds", "cpu", "draft", "verify")
    return repr([[(k, v) for k, v in row.items() if k not in times] for row in rows]).encode()


def undisturbed(name: str, home: Path, whole: dict[str, Any]) -> tuple[Ended, dict[str, str]]:
    if COMMANDS[name].replaces:  # what it replaces leaves no trace
        words = COMMANDS[name].plain
        name = next(n for n, each in COMMANDS.items() if each.words == words)
    if name not in whole:
        command = COMMANDS[name]
        for needed in command.needs:
            undisturbed(needed, home, whole)
        folder = begun(home, name, command)
        ended = run_to_its_end(folder, *command.words)
        assert ended.code == 0 and not ended.left, ended.said
        whole[name] = ended, bits(folder, command.results)
        assert bool(whole[name][1]) == bool(command.results)
    found: tuple[Ended, dict[str, str]] = whole[name]
    return found


def repeated(command: Command, folder: Path) -> dict[str, str]:
    """The bits after the command is resumed or, where that is refused, repeated."""
    words = (*command.plain, *command.again) if command.again else command.words
    ended = run_to_its_end(folder, *words)
    if "was interrupted" in ended.said:  # the file of answers so far, which the user deletes
        (folder / "answers.jsonl.kdcore-part").unlink()
        ended = run_to_its_end(folder, *words)
    if "different spec" in ended.said:  # the emptied run was still the other one
        ended = run_to_its_end(folder, *command.words)
    if "already exists" in ended.said and not command.again:  # the kill came after its last write
        return bits(folder, command.results)
    assert ended.code == 0, ended.said
    return bits(folder, command.results)


def disturb(
    name: str, number: int, home: Path, whole: dict[str, Any], **how: Any
) -> tuple[Ended, Path]:
    _, expected = undisturbed(name, home, whole)
    command = COMMANDS[name]
    label = "-".join(f"{key}-{value}" for key, value in how.items())
    folder = begun(home, f"{name}-{label}-{number}", command)
    ended = run_to_its_end(folder, *command.words, **how)
    assert repeated(command, folder) == expected, f"{how}: {ended}"
    return ended, folder


def drawn(
    home: Path, whole: dict[str, Any], name: str, kind: str, group: bool, by: int = signal.SIGKILL
) -> Iterator[dict[str, Any]]:
    """When and how a signal comes, for each of the `KILLS`."""
    reference, _ = undisturbed(name, home, whole)
    draw = random.Random(f"{name} {by} {kind} {group} {SEED}")
    for _ in range(KILLS if kind == "moment" or reference.writes else 0):
        if kind == "write":
            when: dict[str, Any] = {"write": draw.randint(1, reference.writes)}
        else:
            when = {"after": draw.uniform(0, reference.seconds)}
        yield when | {"by": by, "group": group}


@pytest.mark.parametrize(("name", "kind", "group"), KILLED)
def test_a_killed_command_ends_with_the_same_bits(
    home: Path, whole: dict[str, Any], name: str, kind: str, group: bool
) -> None:
    for number, how in enumerate(drawn(home, whole, name, kind, group)):
        ended, folder = disturb(name, number, home, whole, **how)
        assert kind == "moment" or ended.code == -signal.SIGKILL, ended.said
        assert not ended.left
        shutil.rmtree(folder)


@pytest.mark.parametrize(("name", "by", "kind", "group"), STOPPED)
def test_an_interrupted_command_says_so_at_every_moment(
    home: Path, whole: dict[str, Any], name: str, by: int, kind: str, group: bool
) -> None:
    """Exit code 130 and the status interrupted, unless it had already done its work."""
    _, expected = undisturbed(name, home, whole)
    for number, how in enumerate(drawn(home, whole, name, kind, group, by)):
        label = "-".join(map(str, how.values()))
        folder = begun(home, f"{name}-stopped-{label}-{number}", COMMANDS[name])
        ended = run_to_its_end(folder, *COMMANDS[name].words, **how)
        record = folder / "run" / "run.json"
        status = json.loads(record.read_text())["status"] if record.exists() else "not begun"
        done = "done" if record.exists() else "not begun"
        assert (ended.code, status) in {
            (130, "interrupted"), (130, "not begun"), (0, done), (130, done),
        }, ended  # fmt: skip
        assert "Traceback" not in ended.said
        assert ended.said.count("interrupted: ") == (ended.code == 130), ended.said
        assert not ended.left
        assert repeated(COMMANDS[name], folder) == expected, ended
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", FILLED)
def test_a_full_disk_is_told_and_the_command_goes_on_after_it(
    home: Path, whole: dict[str, Any], name: str
) -> None:
    """One line of cause and one of cure; what is written is whole, and space is all that lacked."""
    reference, expected = undisturbed(name, home, whole)
    draw = random.Random(f"{name} full {SEED}")
    for number in range(KILLS):
        folder = begun(home, f"{name}-full-{number}", COMMANDS[name])
        words = COMMANDS[name].words
        ended = run_to_its_end(folder, *words, write=draw.randint(1, reference.writes), full=True)
        assert ended.code == 2 or bits(folder, COMMANDS[name].results) == expected, ended
        assert ended.said.count("error: ") == ended.said.count("  fix: ") == (ended.code == 2)
        assert "No space left on device" in ended.said or ended.code == 0, ended
        assert repeated(COMMANDS[name], folder) == expected, ended
        shutil.rmtree(folder)


def test_a_run_without_save_every_keeps_its_steps_when_interrupted(
    home: Path, whole: dict[str, Any]
) -> None:
    """Stopped when it writes the figures of its first step."""
    words = ("distill", "distill.yaml", "--set", "training.save_every=null")
    _, expected = undisturbed("distill", home, whole)
    folder = begun(home, "unsaved", COMMANDS["distill"])
    ended = run_to_its_end(folder, *words, write="metrics.jsonl", by=signal.SIGTERM)
    assert ended.code == 130, ended.said
    assert "stopping: finishing this step and writing a checkpoint" in ended.said
    (kept,) = (folder / "run").glob("checkpoint-*")
    assert kept.name in ("checkpoint-1", "checkpoint-2")
    resumed = run_to_its_end(folder, *words, "--resume")
    assert resumed.code == 0, resumed.said
    assert bits(folder, TRAINED) == expected
