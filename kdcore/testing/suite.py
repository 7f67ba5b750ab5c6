"""What holds for a component of any kind: it is declared cheaply, built by name, and resumes.

A suite is abstract in one method: `Suite.observe`, one use of the component in a training step.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import safetensors.torch
import torch
from pydantic import BaseModel, TypeAdapter
from torch import Tensor

from kdcore.method.choice import Choice, OfKind
from kdcore.method.hookspecs import Kind
from kdcore.method.protocols import BuildContext, MomentumPolicy, Stateful
from kdcore.method.registry import Registry, installed
from kdcore.models.assembly import Assembly

STEPS = 4
"""How many training steps a run of these checks has."""


class Suite:
    """The checks of every kind.

    name: the component's name in a spec. params: its parameters, where neither the defaults nor
    the declared examples (`examples`) do. registry: where the name is looked up; None means what
    is installed.
    """

    kind: ClassVar[Kind]
    name: ClassVar[str]
    params: ClassVar[Mapping[str, Any]] = {}
    registry: ClassVar[Registry | None] = None

    def component(self) -> Any:
        """A new component, from the spec's form to the object, as a run builds it."""
        form: TypeAdapter[Choice] = TypeAdapter(Annotated[Choice, OfKind(self.kind)])
        declared = self._registry.component(self.kind, self.name)
        given = {"name": self.name, **examples(declared.params), **self.params}
        choice = form.validate_python(given, context={"registry": self._registry})
        return self.context().build(choice)

    def context(self) -> BuildContext:
        """What the component may ask for while it is built."""
        return Assembly(self._registry)

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Use the component as training step ``step`` would; what comes out."""
        raise NotImplementedError

    def metrics(self, step: int) -> dict[str, float]:
        """What a component with a state hears when the step is done."""
        loss = 2 * 0.8**step
        terms = {"term/task": loss / 2, "term/kd": loss / 2}
        return {"loss": loss, "progress": step / STEPS, **terms, f"acceptance/{self.name}": 0.5}

    @property
    def _registry(self) -> Registry:
        return self.registry or installed()

    def test_it_is_built_by_name_and_satisfies_its_protocol(self) -> None:
        """The params have defaults or were given, and what is built has the methods asked of it."""
        self.component()

    def test_declaring_it_imports_no_torch(self) -> None:
        """``kdcore --help`` and ``plugins list`` import every declaring module."""
        plugin = self._registry.plugin_of(self.kind, self.name)
        declaring = self._registry.hooks.get_plugin(f"{plugin.distribution}:{plugin.name}")
        module = getattr(declaring, "__name__", None) or type(declaring).__module__
        assert not imports_torch(module), f"{module} imports torch: let `build` name what needs it"

    def test_its_params_are_frozen_and_described(self) -> None:
        """A spec is data that no run changes, and the schema says what each field means."""
        params = self._registry.component(self.kind, self.name).params
        assert params.model_config.get("frozen"), f"{params.__name__} must be frozen"
        for field, about in params.model_fields.items():
            assert about.description, f"{params.__name__}.{field} has no description"

    def test_a_resumed_run_goes_on_bit_for_bit(self) -> None:
        """At any step a new component that takes the saved state does as the unbroken one does.

        A component that declares no state is held to it as well: it must then have none.
        """
        unbroken = self.resumed({})
        for step in range(STEPS):
            resumed = self.resumed(through_a_file(self.saved(unbroken)))
            for left, right in zip(
                self.observe(unbroken, step), self.observe(resumed, step), strict=True
            ):
                same(left, right, f"resumed before step {step}, the run goes another way")
            self.finish(unbroken, step)

    def test_a_saved_state_stays_as_it_was(self) -> None:
        """The state given out and the state taken in are nobody's to change afterwards."""
        unbroken = self.resumed({})
        for step in range(STEPS):
            state = self.saved(unbroken)
            copies = {name: tensor.clone() for name, tensor in state.items()}
            for component in (unbroken, self.resumed(state)):
                self.observe(component, step)
                self.finish(component, step)
            for name, copy in copies.items():
                same(state[name], copy, f"step {step} wrote into '{name}' of a saved state")

    def saved(self, component: Any) -> dict[str, Tensor]:
        """The component's state; empty if it declares none."""
        stateful = isinstance(component, Stateful | MomentumPolicy)
        return component.state_dict() if stateful else {}

    def resumed(self, state: Mapping[str, Tensor]) -> Any:
        """A new component that has taken the state, unless that is empty, as at a run's start."""
        component = self.component()
        if state:
            component.load_state_dict(state)
        return component

    def finish(self, component: Any, step: int) -> None:
        """Tell a component with a state that the step is done."""
        if isinstance(component, Stateful):
            component.step_done(self.metrics(step))


def examples(params: type[BaseModel]) -> dict[str, Any]:
    """The first of the examples that a field without a default declares: ``Field(examples=...)``.

    So a component that must be told something can be tried without being told.
    """
    return {
        name: field.examples[0]
        for name, field in params.model_fields.items()
        if field.is_required() and field.examples
    }


def same(left: Tensor, right: Tensor, otherwise: str) -> None:
    """Assert that two tensors are equal bit for bit."""
    assert left.shape == right.shape, f"{otherwise}: {tuple(left.shape)}, {tuple(right.shape)}"
    gap = (left.double() - right.double()).abs().max() if left.numel() else 0
    assert torch.equal(left, right), f"{otherwise}: they differ by up to {gap:.3g}"


def alike(left: Tensor, right: Tensor, otherwise: str) -> None:
    """Assert that two tensors of numbers of the order of 1 are equal up to float32's rounding."""
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, msg=lambda m: f"{otherwise}: {m}")


def finite(tensor: Tensor, where: str) -> None:
    """Assert that there is neither NaN nor infinity."""
    assert torch.isfinite(tensor).all(), f"NaN or infinity: {where}"


def through_a_file(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state after a checkpoint, which is written with safetensors and so takes tensors only."""
    for name, tensor in state.items():
        assert isinstance(name, str), f"a state is named by strings, not {name!r}"
        assert isinstance(tensor, Tensor), f"'{name}' of the state is {type(tensor)}, no tensor"
    return safetensors.torch.load(safetensors.torch.save(dict(state)))


@contextmanager
def same_global_random(seed: int = 0) -> Iterator[None]:
    """Seed torch's global generator, and leave it as it was.

    Components must not use it. One that does is caught by the check of determinism, which sets it
    differently; the other checks set it alike, so that each speaks of its own matter.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@functools.cache
def imports_torch(module: str) -> bool:
    """Whether a new interpreter that imports the module has then imported torch."""
    code = f"import sys, {module}; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{module} does not import by itself: {done.stderr}"
    return done.stdout.split()[-1] == "True"


@dataclass(frozen=True, slots=True)
class Result:
    """What one check said. ``reason``: why it failed; empty when it passed."""

    kind: str
    name: str
    check: str
    passed: bool
    reason: str = ""


class Checks(Protocol):
    """A test class of the kit: what its checks are of, and methods that begin with ``test_``."""

    kind: ClassVar[Any]
    name: ClassVar[str]


def results(suite: type[Checks]) -> Iterator[Result]:
    """Run every check of a suite, in the order in which they are declared.

    A check is an assertion, so this is of no use under ``python -O``.
    """
    for check in checks(suite):
        try:
            getattr(suite(), check)()
        except (Exception, SystemExit) as fault:
            said = f"{type(fault).__name__}: {fault}".removeprefix("AssertionError: ")
            reason = textwrap.shorten(said, 400, placeholder=" ...")
            yield Result(suite.kind, suite.name, check, False, reason)
        else:
            yield Result(suite.kind, suite.name, check, True)


def checks(suite: type[Checks]) -> list[str]:
    """The names of a suite's checks: what every kind must hold, then what this one must."""
    names = [name for level in reversed(suite.__mro__) for name in vars(level)]
    return [name for name in dict.fromkeys(names) if name.startswith("test_")]
