"""The page on your own data: its program reads an export, and `init --data` what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdcore_cli import main
from kdcore_cli.terminal import console
from tests.fixtures.pages import BLOCKS

SIGNATURE = "<br>\n--\nJane Doe<br>Support"


def comment(role: str, html_body: str) -> dict[str, Any]:
    return {"author": {"role": role, "email": "x@y"}, "html_body": html_body, "attachments": []}


def test_an_export_becomes_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    console.out.cache_clear()  # pytest's capture has replaced the streams
    asked = [comment("end-user", f"<div>Wo ist Nr. {n} &amp; {n + 1}?</div>") for n in range(30)]
    said = [
        *(comment("agent", f"<p>Hier.</p><p>Danke</p>{SIGNATURE}"), comment("agent", "")),
        *(comment("bot", "Und <b>bald</b>."), comment("end-user", "Danke!")),
    ]
    tickets = [{"id": n, "comments": [each, *said]} for n, each in enumerate([*asked, *asked])]
    tickets.append({"id": 99, "comments": [comment("end-user", "Wo?"), said[0]]})
    Path("tickets.json").write_text(json.dumps({"tickets": tickets, "next_page": None}))
    (program,) = (block for block in BLOCKS if block.title == "export.py")
    exec(program.text, {})  # noqa: S102
    rows = [json.loads(line) for line in Path("chats.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 31
    assert [(turn["role"], turn["content"]) for turn in rows[0]["messages"]] == [
        ("user", "Wo ist Nr. 0 & 1?"),
        ("assistant", "Hier.\nDanke"),
        ("assistant", ""),
        ("assistant", "Und bald."),
        ("user", "Danke!"),
    ]
    assert main.run(["init", "tickets.yaml", "--data", "chats.jsonl"]) == 0
    told = capsys.readouterr().out
    assert "chats.jsonl: 31 conversations, read by the source chat" in told
    assert "tidy: successive turns of one role are joined" in told and "HTML" not in told
