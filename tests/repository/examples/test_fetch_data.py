"""The script that fetches the public data: its conversions, and that nothing changed is taken."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.pages import ROOT

SCRIPT = ROOT / "examples" / "fetch_data.py"


@pytest.fixture(scope="module")
def script() -> Any:
    found = importlib.util.spec_from_file_location("fetch_data", SCRIPT)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    sys.modules["fetch_data"] = module  # where its dataclass looks itself up
    found.loader.exec_module(module)
    return module


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_questions_keep_what_the_chat_source_reads(script: Any) -> None:
    asked = [
        {"question_id": n, "category": "math", "turns": [f"é{n}"], "reference": ["a\u2028"]}
        for n in range(7)
    ]
    del asked[0]["reference"]
    kept = script.questions("gsm8k")(jsonl(*asked)).split("\n")[:-1]
    assert kept[0] == '{"id": "gsm8k-0", "turns": ["é0"]}'
    assert [json.loads(row)["id"][6:] for row in kept] == list("012456")
    assert json.loads(kept[1]) == {"id": "gsm8k-1", "turns": ["é1"], "reference": ["a\u2028"]}


def test_no_validation_problem_is_one_of_the_questions(script: Any) -> None:
    problems = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(900)]
    text = script.problems_to_validate_on(jsonl(*problems), jsonl({"turns": ["1?"]}))
    assert [json.loads(row) for row in text.splitlines()] == [problems[0], *problems[2:800]]


def test_an_instruction_has_its_instance_beside_it(script: Any) -> None:
    task = {"id": "t", "motivation_app": "x", "instruction": "do"}
    row = script.instructions(jsonl({**task, "instances": [{"input": "it", "output": "done"}]}))
    expected = {"id": "t", "instruction": "do", "input": "it", "output": "done"}
    assert row == jsonl(expected)


def test_intents_are_texts_with_labels(script: Any) -> None:
    rows = [[f"t, {n}", "l"] for n in range(4)]
    published = json.dumps({"val": rows, "test": rows, "oos_test": [["t", "oos"]]})
    whole = 'text,label\r\n"t, 0",l\r\n"t, 1",l\r\n"t, 2",l\r\n"t, 3",l\r\n'
    assert script.intents("val")(published) == whole
    assert script.intents("test")(published) == whole.replace('"t, 2",l\r\n', "")
    banking = script.banking_intents('text,category\r\n"a, ""b""\nc",card\r\n')
    assert banking == 'text,label\n"a, ""b""\nc",card\n'


def test_a_file_that_changed_is_not_written(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(b"right").hexdigest()
    files = [script.File(f"a/{n}", digest, script.as_published, (n,)) for n in ("right", "wrong")]
    monkeypatch.setattr(script, "FILES", files)
    with pytest.raises(ValueError, match=r"^wrong changed: a/wrong has the digest "):
        script.fetch(tmp_path, str)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["right"]
    (tmp_path / "a" / "right").write_text("one's own")
    files.pop()
    script.fetch(tmp_path, str)  # what is there stays
    assert (tmp_path / "a" / "right").read_text() == "one's own"


def test_without_a_network_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "data"],
        env=os.environ | {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "data").exists()


@pytest.mark.needs("public data")
def test_the_tests_read_what_it_writes(script: Any) -> None:
    folder = Path(os.environ["KDCORE_DATA"])
    for file in script.FILES:
        content = (folder / file.name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file.sha256, file.name


def test_each_file_is_in_the_examples_table_and_each_that_a_spec_names_is_fetched(
    script: Any,
) -> None:
    page = (ROOT / "examples" / "README.md").read_text()
    names = {file.name for file in script.FILES}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
    for spec in (ROOT / "examples").rglob("*.yaml"):
        for rest in spec.read_text().split("$KDCORE_DATA/")[1:]:
            assert rest.split()[0].rstrip(",}") in names, spec
