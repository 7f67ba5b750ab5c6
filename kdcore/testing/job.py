"""What holds for a job: it is declared cheaply, its starter is a spec, and it is called as it says.

Nothing is carried out: a job may take hours.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

from kdcore.components.job import Job
from kdcore.components.registry import Registry, installed
from kdcore.specs.json_schema import json_schema
from kdcore.specs.parts.fields import SpecModel
from kdcore.specs.parts.training import RowsSpec
from kdcore.specs.reading.file import read_spec
from kdcore.testing.suite import imports_torch


class JobSuite:
    """The checks of a declared job.

    Attributes:
        name: The job's name.
        sets: Assignments laid over its starter, ``FIELD=VALUE``, e.g. for a model that is here.
        registry: Where the name is looked up; None means what is installed.
    """

    kind: ClassVar[str] = Job.kind
    name: ClassVar[str]
    sets: ClassVar[Sequence[str]] = ()
    registry: ClassVar[Registry | None] = None

    @property
    def job(self) -> Job:
        """The job's record."""
        return self._registry.job(self.name)

    @property
    def _registry(self) -> Registry:
        return self.registry or installed()

    def test_declaring_it_imports_no_torch(self) -> None:
        """``kdcore --help`` imports every declaring module, and what the spec's model needs."""
        plugin = self._registry.plugin_of(Job.kind, self.name)
        declaring = self._registry.hooks.get_plugin(plugin.label)
        module = getattr(declaring, "__name__", None) or type(declaring).__module__
        for each in (module, self.job.model.partition(":")[0]):
            assert not imports_torch(each), f"{each} imports torch: let `work` name what needs it"

    def test_its_spec_is_a_spec_model_that_names_it(self) -> None:
        """A spec is frozen, refuses unknown keys, and its ``job`` is this job's name alone."""
        model = self.job.spec
        assert issubclass(model, SpecModel), f"{self.job.model} is not a SpecModel"
        annotation: Any = model.model_fields["job"].annotation
        named = get_args(annotation)
        assert named == (self.name,), f'{self.job.model}.job must be Literal["{self.name}"]'
        if self.job.comparable:
            rows: Any = model.model_fields["data"].annotation
            assert isinstance(rows, type) and issubclass(rows, RowsSpec), (
                f"{self.job.model}.data must be a RowsSpec, as the job is declared comparable"
            )

    def test_its_schema_can_be_made(self) -> None:
        """``kdcore schema`` prints it, with the installed components."""
        json.dumps(json_schema(self.job.spec, self._registry))

    def test_what_carries_it_out_takes_what_it_is_given(self) -> None:
        """The arguments are those that `Job` promises."""
        options = ["registry", "progress"]
        options += ["overwrite", "resume"] if self.job.run_folder else []
        _refuse_other_arguments(self.job.imported("work"), options)

    def test_its_preflight_takes_what_it_is_given(self) -> None:
        """Where it has one."""
        if self.job.preflight is not None:
            _refuse_other_arguments(self.job.imported("preflight"), ["registry"])

    def test_its_starter_is_a_spec_of_it(self) -> None:
        """As ``kdcore init`` writes it, where it has one; and as a run folder keeps it."""
        if self.job.template is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            spec = self.starter(Path(folder))
            assert isinstance(spec, self.job.spec), f"the starter is a {type(spec).__name__}"
            kept = spec.model_dump(mode="json")
            again = self.job.spec.model_validate(kept, context={"registry": self._registry})
            assert again == spec, "a run folder's spec.yaml does not say the same"

    def test_its_preflight_runs_on_the_starter(self) -> None:
        """Where it has both; the report is a dataclass or a mapping."""
        if self.job.template is None or self.job.preflight is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            report = self.job.look_ahead(self.starter(Path(folder)), registry=self._registry)
            assert isinstance(report, Mapping) or is_dataclass(report), (
                f"the preflight returned a {type(report).__name__}, not a dataclass or a mapping"
            )

    def starter(self, folder: Path) -> SpecModel:
        """The starter with ``sets`` laid over it.

        Args:
            folder: An empty folder, where its files are written; the run folder is named in it.

        Returns:
            The spec that it holds.
        """
        for name, text in self.job.starter().items():
            (folder / name).write_text(text, "utf-8")
        run = [f"run={json.dumps(str(folder / 'run'))}"] if self.job.run_folder else []
        return read_spec(folder / f"{self.name}.yaml", [*run, *self.sets], registry=self._registry)


def _refuse_other_arguments(function: Any, options: Sequence[str]) -> None:
    assert callable(function), f"{function!r} cannot be called"
    given = dict.fromkeys(options)
    try:
        inspect.signature(function).bind(object(), **given)
    except TypeError as wrong:
        called = ", ".join(["spec", *(f"{option}=" for option in options)])
        raise AssertionError(f"it cannot be called with ({called}): {wrong}") from None


def job_suite_of(job: Job, **members: Any) -> type[JobSuite]:
    """The test class of a declared job.

    Args:
        job: The record.
        **members: The suite's class attributes, such as ``sets``, and further tests.

    Returns:
        A subclass of `JobSuite`.
    """
    title = "".join(word.capitalize() for word in job.name.split("-"))
    return type(f"TestJob{title}", (JobSuite,), {"name": job.name, **members})
