"""``kdcore generate`` with a tiny model, against what transformers generates."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcore.components.registry import installed
from kdcore.data.conversation import Conversation, Message
from kdcore.data.responses.decoder import DecoderAnswers
from kdcore.data.templates.mask import prompt_ids
from kdcore.decoding.drafters.files import save_drafter
from kdcore.models.assembly import Assembly
from kdcore.models.loading.load import load_model
from kdcore.models.loading.loaded import LoadedModel
from kdcore.specs.parts.decoding import DraftingSpec
from kdcore.specs.parts.fields import ModelSpec
from kdcore_cli import main
from tests.cli.commands.generate.conftest import Generate
from tests.cli.commands.generate.reference_answers import LENGTH, reference
from tests.fixtures.json_lines import write_lines
from tests.fixtures.processes.forked import python
from tests.tiny.tiny_chat_models import saved, tiny_model

ROWS: list[dict[str, Any]] = [
    {"id": "two turns", "turns": ["the mat", "and then?"]},
    {"prompt": "the teacher sat", "response": "not this"},
    {"id": "long", "prompt": "the student " * 9},
]


@pytest.mark.parametrize("drafter", ["nothing", "ngram", "{name: ngram, length: 2}"])
def test_a_prompt_is_answered_as_transformers_does(
    generate: Generate, target: tuple[LoadedModel, Path], drafter: str
) -> None:
    said = generate("the mat", "--drafter", drafter, "--max-new-tokens", str(LENGTH))
    assert said.code == 0
    assert said.out == reference(target[0], "the mat")[0] + "\n"
    device, line = said.err.splitlines()
    assert device == "device: cpu"
    count, _, speed, unit, _, tau, *rest = line.split()
    assert int(count) == LENGTH and unit == "tokens/s" and float(speed) > 0
    assert float(tau) >= 1.0 if drafter != "nothing" else float(tau) == 1.0
    assert drafter != "nothing" or not rest


def test_rounds_without_a_draft_are_shown(generate: Generate) -> None:
    """After four tokens nothing has been measured yet: two plain passes come first."""
    said = generate("the mat", "--drafter", "ngram", "--pauses", "--max-new-tokens", "2")
    assert said.code == 0
    assert said.err.splitlines()[-1].endswith("tau 1.00  no draft in 2 of 2 rounds")


@pytest.mark.parametrize("drafter", ["nothing", "ngram"])
def test_options_of_sampling_reach_the_decoding(
    generate: Generate, target: tuple[LoadedModel, Path], drafter: str
) -> None:
    loaded = target[0]
    said = Conversation("x", (Message("user", "the mat"),))
    ids = torch.tensor([prompt_ids(said, loaded.tokenizer)])
    words = [loaded.tokenizer(each, add_special_tokens=False).input_ids for each in ("the", " the")]
    model: Any = loaded.model
    plain = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LENGTH,
        do_sample=False,
        bad_words_ids=words,
        no_repeat_ngram_size=2,
        eos_token_id=[2, loaded.tokenizer.eos_token_id],
    )
    text = loaded.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    options = ["--bad-words", "the", "--no-repeat-ngram-size", "2", "--max-new-tokens", str(LENGTH)]
    found = generate("the mat", "--drafter", drafter, *options)
    assert found.out == text + "\n" != reference(loaded, "the mat")[0] + "\n", found.err


@pytest.fixture
def fasteagle(tmp_path: Path, target: tuple[LoadedModel, Path]) -> Path:
    """The folder of an untrained one, whose own tree branches."""
    found = installed()
    loaded = load_model(ModelSpec(model=str(target[1])))
    choice: Any = DraftingSpec.model_validate({"drafter": "fasteagle"}).drafter
    drafter = Assembly(found).build(choice)
    drafter.bind(loaded.model, loaded.tokenizer)
    save_drafter(tmp_path / "drafter", drafter, choice, loaded, found)
    return tmp_path / "drafter"


def test_a_trained_drafter_drafts_from_its_folder(
    generate: Generate, target: tuple[LoadedModel, Path], fasteagle: Path
) -> None:
    options = ["--drafter", str(fasteagle), "--max-new-tokens", str(LENGTH)]
    for tree in ([], ["--tree", "chain"], ["--tree", "{name: backbone, k: 2}"]):
        said = generate("the mat", *options, *tree)
        assert said.out == reference(target[0], "the mat")[0] + "\n", said.err
    (fasteagle / "drafter.safetensors").unlink()
    broken = generate("the mat", *options)
    assert broken.code == 2 and "does not contain this drafter's weights" in broken.err


@pytest.mark.parametrize("engine", ["torch", "{name: openvino, weights: float16}"])
def test_an_engine_is_chosen_by_name(
    generate: Generate, target: tuple[LoadedModel, Path], engine: str
) -> None:
    said = generate("the mat", "--engine", engine, "--max-new-tokens", str(LENGTH))
    assert said.code == 0 and said.out == reference(target[0], "the mat")[0] + "\n", said.err
    unknown = generate("the mat", "--engine", "torhc")
    assert unknown.code == 2 and "did you mean 'torch'?" in unknown.err


def test_a_model_of_nan_weights_is_an_error(
    target: tuple[LoadedModel, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(target[1], tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    weights = {name: each * torch.nan for name, each in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    for temperature in ("0", "1"):
        words = ["generate", str(file.parent), "the mat", "--temperature", temperature]
        assert main.run(words) == 2
        said = capsys.readouterr()
        assert said.out == "" and "contain NaN or infinite values" in said.err


@pytest.mark.parametrize("tree", [(), ("--tree", "{name: backbone, k: 2}"), ("--tree", "dynamic")])
def test_a_verifier_of_chains_is_refused_with_a_tree_before_the_target_is_loaded(
    generate: Generate, fasteagle: Path, monkeypatch: pytest.MonkeyPatch, tree: tuple[str, ...]
) -> None:
    options = ["--drafter", str(fasteagle), "--verifier", "chain_sampling", "--temperature", "1"]
    short = ["--max-new-tokens", "2"]
    assert generate("the mat", *options, *short, "--tree", "{name: backbone, k: 1}").code == 0
    monkeypatch.setattr("kdcore.models.loading.load.load_model", lambda spec: pytest.fail("loaded"))
    said = generate("the mat", *options, *tree)
    assert said.code == 2
    error, fix = said.err.splitlines()
    assert error.startswith("error: ChainSampling follows a single chain, but the tree ")
    assert fix.startswith("  fix: choose a tree that is a chain")


def test_raw_text_from_a_pipe_is_gone_on_from(
    generate: Generate, target: tuple[LoadedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat sat"))
    said = generate("--raw", "--max-new-tokens", str(LENGTH), "--quiet")
    assert said.out == reference(target[0], "the cat sat", plain=True)[0] + "\n"
    assert said.err == ""


@pytest.mark.parametrize("size", ["1", "2", "3"])
def test_a_file_is_answered_turn_by_turn_whatever_the_batch(
    generate: Generate, target: tuple[LoadedModel, Path], size: str
) -> None:
    write_lines(Path("prompts.jsonl"), ROWS)
    options = ["--file", "prompts.jsonl", "--out", "answers.jsonl", "--batch-size", size]
    said = generate(*options, "--max-new-tokens", str(LENGTH), "--drafter", "ngram")
    assert said.code == 0, said.err
    lines = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["two turns", "prompts.jsonl:2", "long"]
    for row, line in zip(ROWS, lines, strict=True):
        turns = row.get("turns") or [row["prompt"]]
        answers = [m["content"] for m in line["messages"] if m["role"] == "assistant"]
        assert answers == reference(target[0], *turns, marks=True)
    assert f"{4 * LENGTH} tokens" in said.err
    again = generate(*options)
    assert again.code == 2 and "answers.jsonl already exists" in again.err
    assert len(Path("answers.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("answered", [0, 2])
def test_a_file_of_answers_that_is_interrupted_is_told_or_not_left(
    generate: Generate, monkeypatch: pytest.MonkeyPatch, answered: int
) -> None:
    write_lines(Path("prompts.jsonl"), ROWS)
    options = ["--file", "prompts.jsonl", "--out", "answers.jsonl", "--max-new-tokens", "2"]
    plain_answer, answers = DecoderAnswers.answer, iter(range(answered))

    def answer(self: DecoderAnswers, *asked: Any) -> list[Conversation]:
        if next(answers, None) is None:
            raise KeyboardInterrupt
        return plain_answer(self, *asked)

    with monkeypatch.context() as patched:
        patched.setattr(DecoderAnswers, "answer", answer)
        said = generate(*options)
    assert said.code == 130
    last = said.err.splitlines()[-1]
    if answered:
        assert last == (
            "interrupted: answers.jsonl.kdcore-part holds 2 of 3 answers; to generate all of them, "
            "delete that file or name another with --out, then rerun the command"
        )
        assert len(Path("answers.jsonl.kdcore-part").read_text().splitlines()) == answered
        assert not Path("answers.jsonl").exists()
    else:
        assert last == "interrupted: run the command again"
        assert generate(*options).code == 0


KILLED = """
import os, signal, sys
from kdcore.data.responses.decoder import DecoderAnswers
from kdcore_cli.main import run
answer, calls = DecoderAnswers.answer, []
def killed(self, *asked):
    calls.append(asked)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(self, *asked)
DecoderAnswers.answer = killed
sys.exit(run(sys.argv[1:]))
"""


def test_a_kill_leaves_whole_answers_beside_and_the_same_command_does_not_touch_them(
    generate: Generate, target: tuple[LoadedModel, Path]
) -> None:
    write_lines(Path("prompts.jsonl"), ROWS)
    options = ["--file", "prompts.jsonl", "--out", "answers.jsonl", "--max-new-tokens", "2"]
    killed = python("-c", KILLED, "generate", target[1], *options)
    assert killed.returncode == -signal.SIGKILL
    assert not Path("answers.jsonl").exists()
    left = Path("answers.jsonl.kdcore-part").read_text()
    assert left.endswith("\n")
    assert [json.loads(line)["id"] for line in left.splitlines()] == [
        "two turns",
        "prompts.jsonl:2",
    ]
    again = generate(*options)
    assert again.code == 2
    error, fix = again.err.splitlines()
    assert error == (
        "error: answers.jsonl.kdcore-part holds the answers of a command that is running or was "
        "interrupted"
    )
    assert fix == ("  fix: wait for that command, delete the file, or name another file with --out")
    assert Path("answers.jsonl.kdcore-part").read_text() == left
    Path("answers.jsonl.kdcore-part").unlink()
    assert generate(*options).code == 0
    assert Path("answers.jsonl").read_text().startswith(left)
    assert not Path("answers.jsonl.kdcore-part").exists()


def test_a_file_too_long_for_the_context_is_refused_before_anything_is_written(
    generate: Generate,
) -> None:
    rows = [{"prompt": "the mat"}, {"id": "endless", "prompt": "mat " * 600}]
    write_lines(Path("prompts.jsonl"), rows)
    said = generate("--file", "prompts.jsonl", "--out", "answers.jsonl")
    assert said.code == 2
    assert "endless has" in said.err and "the context of the model is 512" in said.err
    assert not Path("answers.jsonl").exists()


def _asked(text: str) -> Conversation:
    return Conversation("x", (Message("user", text),))


def test_an_answer_ends_with_the_context_and_no_neighbour_shortens_it(
    generate: Generate, target: tuple[LoadedModel, Path]
) -> None:
    long = next(
        words
        for n in range(600)
        if len(prompt_ids(_asked(words := "mat" * n), target[0].tokenizer)) == 512 - 3
    )
    rows = [{"prompt": "the mat"}, {"prompt": long}]
    write_lines(Path("prompts.jsonl"), rows)
    said = generate("--file", "prompts.jsonl", "--batch-size", "2", "--max-new-tokens", "12")
    first, second = map(json.loads, said.out.splitlines())
    assert first["messages"][-1]["content"] == reference(target[0], "the mat", marks=True)[0]
    assert f"{LENGTH + 3} tokens" in said.err
    assert second["messages"][-1]["ended"] is False


@pytest.mark.parametrize(
    ("options", "cause", "cure"),
    [
        ([""], "the prompt is empty", "at least one word"),
        ([], "the prompt is empty", "at least one word"),
        (["--file", "none.jsonl"], "none.jsonl cannot be read", ""),
        (["hi", "--file", "x.jsonl"], "PROMPT and --file exclude each other", "remove one"),
        (["hi", "--out", "x.jsonl"], "--out requires --file", "add --file"),
        (["hi", "--drafter", "ngrm"], "unknown drafter 'ngrm'", "did you mean 'ngram'?"),
        (["hi", "--drafter", "{name: ngram, lengt: 2}"], "--drafter lengt", "'length'"),
        (["hi", "--drafter", "runs/none"], "folder runs/none does not exist", "trained drafter"),
        (["hi", "--tree", "chain"], "Nothing does not accept a tree", "remove the tree"),
        (["hi", "--verifier", "greedy", "--temperature", "1"], "does not sample", "sampling"),
        (["hi", "--temperature", "-1"], "--temperature: must be", "0 is greedy decoding"),
        (["hi", "--top-p", "2"], "--top-p: must be", ""),
        (["hi", "--max-new-tokens", "0"], "--max-new-tokens: must be", ""),
        (["hi", "--min-p", "2"], "--min-p: must be", ""),
        (["hi", "--presence-penalty", "nan"], "--presence-penalty: must be", ""),
        (["hi", "--sequence-bias", "mat"], "--sequence-bias mat has no number", "TEXT=NUMBER"),
        (["hi", "--sequence-bias", "mat=x"], "--sequence-bias mat: must be", ""),
        (["hi", "--bad-words", ""], "--bad-words", ""),
        (["hi", "--batch-size", "0"], "'--batch-size': Input should be greater", ""),
        (["hi", "--first", "suffx", "--drafter", "ngram"], "--first: ", "suffix"),
        (
            ["hi", "--first", "medusa", "--drafter", "ngram"],
            "reads hidden states",
            "suffix or ngram",
        ),
        (["hi", "--device", "cuda:7"], "no device 'cuda:7'", "use one of: cpu"),
        (["hi", "--dtype", "float8"], "--dtype: must be", "float32"),
        (["mat " * 600], "the prompt has", "shorten it"),
        (["h\udcff"], "'h\\udcff' contains bytes that are not valid UTF-8", "rename"),
        (["hi", "--stop", ""], "--stop is empty", "ends an answer"),
        (["hi", "--samples", "3"], "temperature 0 would give the same answer 3 times", "above 0"),
        (["hi", "--samples", "0"], "--samples", ""),
        (["hi", "--seed", str(2**70)], "--seed", ""),
        (["hi", "--drafter", "{name: ngram, length: 9999}"], "--drafter length: must be", ""),
    ],
)
def test_a_mistake_is_two_lines(
    generate: Generate, options: list[str], cause: str, cure: str
) -> None:
    said = generate(*options)
    assert said.code == 2
    assert said.out == ""
    error, fix = said.err.removeprefix("device: cpu\n").splitlines()
    assert cause in error and error.startswith("error: ")
    assert cure in fix and fix.startswith("  fix: ")


def test_a_model_without_a_template_asks_for_raw(
    generate: Generate, tmp_path: Path, target: tuple[LoadedModel, Path]
) -> None:
    folder = saved(tiny_model(template=None), tmp_path / "base")
    code = main.run(["generate", str(folder), "hi", "--quiet"])
    assert code == 2
    assert main.run(["generate", str(folder), "hi", "--quiet", "--raw"]) == 0
