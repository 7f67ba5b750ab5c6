"""What an installed kdcore offers to Python: its packages, its entry points, and nothing else."""

import json
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.fixtures.clean_environment import INSTALL, environment
from tests.tiny.tiny_chat_models import saved, tiny_model

ROOT = Path(__file__).parent.parent.parent
PLUGINS = {
    "jobs": "kdcore.specs.jobs",
    "speckd": "kdcore_speckd.plugin",
    "deepkd": "kdcore_deepkd.plugin",
    "fasteagle": "kdcore_fasteagle.plugin",
    "compiled": "kdcore_compiled.plugin",
    "openvino": "kdcore_openvino.plugin",
    "alignment": "kdcore_alignment.plugin",
    "baselines": "kdcore_baselines.plugin",
}
PACKAGES = [
    "kdcore",
    "kdcore_alignment",
    "kdcore_baselines",
    "kdcore_cli",
    "kdcore_compiled",
    "kdcore_deepkd",
    "kdcore_fasteagle",
    "kdcore_openvino",
    "kdcore_speckd",
]


def imports_elsewhere(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Import `name` with a fresh interpreter whose working folder is not the project's."""
    return subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=folder, capture_output=True, text=True
    )


def test_the_built_in_plugins_are_entry_points_of_kdcore() -> None:
    ours = [point for point in entry_points(group="kdcore.v1") if point.dist.name == "kdcore"]
    assert {point.name: point.value for point in ours} == PLUGINS
    for point in ours:
        assert point.load().__name__ == point.value


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_importable_from_anywhere_and_typed(name: str, tmp_path: Path) -> None:
    done = imports_elsewhere(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert files(name).joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", ["plugins", "cli", "tests", "docs", "examples"])
def test_a_folder_of_the_project_is_no_package(name: str, tmp_path: Path) -> None:
    done = imports_elsewhere(name, tmp_path)
    assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tree, offline."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_packages_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert sorted(top for top in tops if not top.endswith(".dist-info")) == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    # every file of the source tree is in the wheel under its import name, templates too
    folders = [ROOT, ROOT / "plugins", ROOT / "cli"]
    for package in PACKAGES:
        (parent,) = (folder for folder in folders if (folder / package).is_dir())
        paths = (path for path in (parent / package).rglob("*") if path.is_file())
        sources = {str(p.relative_to(parent)) for p in paths if "__pycache__" not in p.parts}
        assert sources == {name for name in names if name.startswith(f"{package}/")}


def test_an_installed_wheel_begins_and_distils(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has the dependencies and does not know where the project is."""
    python = environment(tmp_path / "environment", kdcore=False)
    nothing = python("-c", "import importlib.util as u; print(u.find_spec('kdcore'))")
    assert nothing == "None\n"
    python(*INSTALL, wheel)
    found = Path(python("-c", "import kdcore_speckd; print(kdcore_speckd.__file__)").strip())
    assert found.is_relative_to(tmp_path / "environment")
    command = found.parents[4] / "bin" / "kdcore"
    assert command.is_file()

    project = tmp_path / "project"
    project.mkdir()
    saved(tiny_model(), project / "teacher")
    small = {
        "teacher.model": "teacher",
        "student.layers": [0, 2],
        "data.train.limit": 4,
        "data.heldout.limit": 2,
        "data.responses.max_new_tokens": 6,
        "training.epochs": 1,
        "training.batch_size": 2,
        "evaluation.samples": 1,
        "evaluation.sample_tokens": 4,
    }
    sets = [word for field, value in small.items() for word in ("--set", f"{field}={value}")]
    python(command, "init", "spec.yaml", cwd=project)
    python(command, "distill", "spec.yaml", *sets, "--out", "run", "--quiet", cwd=project)
    facts = json.loads((project / "run" / "run.json").read_text())
    assert facts["status"] == "done" and facts["plugins"]["kdcore:speckd"]
    assert (project / "run" / "model" / "model.safetensors").is_file()


def test_the_lock_pins_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    locked = {canonicalize_name(name): version for name, version in pins.items()}
    extras = project["optional-dependencies"]
    ours = {"datasets", "endpoint", "images", "math", "openvino", "openvino-genai", "quantized"}
    ours |= {"ray"}
    wanted = project["dependencies"] + [each for name in (*ours, "dev") for each in extras[name]]
    for requirement in map(Requirement, wanted):
        if requirement.name == "kdcore":  # its own extras, named one by one above
            assert requirement.extras == ours
            continue
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier


def test_no_source_file_outgrows_one_room() -> None:
    sources = [p for folder in ("kdcore", "plugins", "cli") for p in (ROOT / folder).rglob("*.py")]
    long = {str(p.relative_to(ROOT)) for p in sources if len(p.read_text().splitlines()) > 400}
    assert len(sources) > 50 and not long
