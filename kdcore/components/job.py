"""Declaration of a job, the value of ``job:`` in a spec."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, ClassVar, Literal

from pydantic import BaseModel

from kdcore.components.optional_packages import broken_package
from kdcore.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One declared kind of run.

    This record defines the command ``kdcore NAME``, the reading of specs, ``kdcore check``,
    ``kdcore schema``, ``kdcore init`` and ``kdcore plugins show``. Places are strings, which are
    imported on demand, so that the declaration of a job does not import torch.

    Attributes:
        name: Name in a spec and name of the command: a-z, 0-9 and -.
        summary: One line for the lists of jobs and commands.
        model: ``module:Class`` of the spec, a `kdcore.specs.parts.fields.SpecModel` with the field
            ``job``, and ``run`` if the job has a run folder.
        work: ``module:function`` that runs the job, called as
            ``function(spec, registry=, progress=)`` and, for a run folder, also with
            ``overwrite=`` and ``resume=``. It returns a `kdcore.runs.folder.Run` for a run folder,
            else a dataclass or a mapping.
        preflight: ``module:function`` that checks the spec, called as
            ``function(spec, registry=)``; it returns a dataclass or a mapping. None for a job
            without a check.
        template: ``package:path`` of the starter spec in a package, which ``kdcore init`` writes
            together with the .jsonl files beside it; None for a job without one.
        about: Further paragraphs of the command's help: contents of the run folder, examples.
        result: JSON file of the run folder with the results.
        run_folder: Whether the job has a run folder, and so can be resumed.
        comparable: Whether ``compare`` accepts it as the job of its cells. Such a job trains; its
            spec has the fields ``seed`` and ``data``, a `kdcore.specs.parts.training.RowsSpec`; its
            run folder contains `kdcore.runs.results.TRAINING_RESULTS` and, for the held-out rows,
            `kdcore.runs.results.HELDOUT_ROWS`.
        spreads: Whether its work also takes ``on=``, the cluster to spread over.
        shares: Whether its work also takes ``share=``, the part that one of several machines does.
    """

    kind: ClassVar[Literal["job"]] = "job"

    name: str
    summary: str
    model: str
    work: str
    preflight: str | None = None
    template: str | None = None
    about: str = ""
    result: str | None = None
    run_folder: bool = True
    comparable: bool = False
    spreads: bool = False
    shares: bool = False

    @property
    def spec(self) -> type[Any]:
        """The model of its spec.

        Raises:
            UserError: it cannot be imported, or it is not the model of a spec.
        """
        model = self._imported(self.model)
        needed = {"job"} | ({"run"} if self.run_folder else set())
        needed |= {"seed", "data"} if self.comparable else set()
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise self._broken(f"{self.model} is not a pydantic model")
        if lacking := sorted(needed - model.model_fields.keys()):
            raise self._broken(f"{self.model} lacks the field '{lacking[0]}'")
        return model

    def carry_out(self, spec: Any, **options: Any) -> Any:
        """Do what a spec says.

        Args:
            spec: of this job's model.
            **options: registry, progress and, where there is a run folder, overwrite and resume.

        Returns:
            Its `kdcore.runs.folder.Run` or, without a run folder, what came out.

        Raises:
            UserError: what carries it out cannot be imported, or a mistake of the user's.
        """
        return self._imported(self.work)(spec, **options)

    def look_ahead(self, spec: Any, **options: Any) -> Any:
        """Find out what it would do, without doing it.

        Args:
            spec: of this job's model.
            **options: registry.

        Returns:
            The report of its preflight.

        Raises:
            ValueError: the job has no preflight.
            UserError: the preflight cannot be imported, or what would stop the run.
        """
        if self.preflight is None:
            raise ValueError(f"job '{self.name}' has no preflight check")
        return self._imported(self.preflight)(spec, **options)

    def starter(self) -> dict[str, str]:
        """What a first run needs: the text of each file, by its name, the spec's as ``NAME.yaml``.

        Raises:
            UserError: there is no template, or it cannot be read.
        """
        if self.template is None:
            raise UserError(
                f"job '{self.name}' has no spec to begin from",
                f"`kdcore schema {self.name}` lists its fields",
            )
        package, _, path = self.template.partition(":")
        folder, _, name = path.rpartition("/")
        try:
            beside = files(package).joinpath(folder)
            found = {f"{self.name}.yaml": beside.joinpath(name).read_text("utf-8")}
            data = [item for item in beside.iterdir() if item.name.endswith(".jsonl")]
            return found | {i.name: i.read_text("utf-8") for i in sorted(data, key=_name)}
        except (ImportError, OSError, UnicodeDecodeError) as fault:
            raise self._broken(f"{self.template} cannot be read: {fault}") from fault

    def places(self) -> Iterator[tuple[str, str]]:
        """Each declared place that code is imported from, with the name of its field."""
        yield "model", self.model
        yield "work", self.work
        if self.preflight is not None:
            yield "preflight", self.preflight

    def imported(self, place: Literal["work", "preflight"]) -> Any:
        """The function at a declared place; None where no preflight is declared.

        Args:
            place: The name of the field.

        Returns:
            What carries the job out, or what looks ahead.

        Raises:
            UserError: It cannot be imported.
        """
        named = self.work if place == "work" else self.preflight
        return None if named is None else self._imported(named)

    def _imported(self, place: str) -> Any:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (Exception, SystemExit) as fault:
            if (broken := broken_package(fault)) is not None:
                raise broken from fault
            reason = f"{place} cannot be imported: {type(fault).__name__}: {fault}"
            raise self._broken(reason) from fault

    def _broken(self, reason: str) -> UserError:
        cure = f"`kdcore plugins show {self.name}` says which distribution to repair or reinstall"
        return UserError(f"job '{self.name}' is broken: {reason}", cure)


def _name(item: Any) -> str:
    return str(item.name)
