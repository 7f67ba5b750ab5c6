"""kdcore beside vLLM: no version changes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distribution, requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent


def test_every_requirement_of_kdcore_admits_the_engines_versions() -> None:
    """So pip, which keeps what satisfies a requirement, changes none of them."""
    texts = [each for each in requires("kdcore") or [] if "extra ==" not in each]
    assert len(texts) > 10
    for requirement in map(Requirement, texts):
        assert distribution(requirement.name).version in requirement.specifier, requirement


def test_an_installation_changes_no_version() -> None:
    """A dry run into the engine's own packages, without those that kdcore brings."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "install", "--dry-run", "--quiet", "--no-build-isolation", "--report", "-"]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=True)
    planned = {each["metadata"]["name"] for each in json.loads(done.stdout)["install"]}
    assert planned == {"kdcore"}
