"""The plugins' hooks during a run; a hook that raises does not stop the run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdcore.components.registry import Registry, describe
from kdcore.runs.folder import Run
from kdcore.runs.progress import Progress


@dataclass
class RunHooks:
    """The hooks ``kdcore_run_*`` and ``kdcore_step_done`` of every plugin, for one run.

    Attributes:
        registry: The plugins.
        run: The run.
        progress: The display, which notes faults.
        faults: Plugin and hook -> the first exception that the hook raised, as one line.
    """

    registry: Registry
    run: Run
    progress: Progress
    faults: dict[str, str] = field(default_factory=dict)

    def tell(self, hook: str, **what: Any) -> None:
        """Call a hook of each plugin, in the process that writes the run.

        The first exception of a hook is noted and recorded in ``run.json``; with
        ``KDCORE_STRICT=1`` it is raised.

        Args:
            hook: The hook's name.
            **what: The hook's arguments beside the run.
        """
        if not self.run.writes:
            return
        manager = self.registry.hooks
        plugins = manager.get_plugins()
        for plugin in plugins:
            alone = manager.subset_hook_caller(hook, plugins - {plugin})
            try:
                alone(run=self.run, **what)
            except Exception as fault:
                if os.environ.get("KDCORE_STRICT") == "1":
                    raise
                self._record(f"{manager.get_name(plugin)}: {hook}", describe(fault))

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of an optimizer step in the run folder, and call ``kdcore_step_done``."""
        self.run.log(step, metrics)
        self.tell("kdcore_step_done", step=step, metrics=metrics)

    def _record(self, place: str, fault: str) -> None:
        if place not in self.faults:
            self.faults[place] = fault
            self.run.update(plugin_faults=self.faults)
            self.progress.note(f"{place} failed, and the run continues: {fault}")
