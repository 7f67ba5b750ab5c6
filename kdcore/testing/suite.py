"""The base suite: checks that hold for components of every kind.

A suite implements one abstract method, `Suite.observe`: one use of the component in a step.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import safetensors.torch
import torch
from pydantic import BaseModel, TypeAdapter
from torch import Tensor

from kdcore.components.choice import Choice, OfKind
from kdcore.components.component import Kind
from kdcore.components.construction import BuildContext
from kdcore.components.registry import Registry, installed
from kdcore.errors import UserError
from kdcore.method.protocols import MomentumPolicy, Stateful
from kdcore.models.assembly import Assembly

STEPS = 4
"""Number of training steps in the checks."""


class Suite:
    """The checks of components of every kind.

    Attributes:
        kind: The kind of component.
        name: The component's name in a spec.
        params: Parameters, in addition to the defaults and the declared examples (`examples`).
        registry: The registry of the component; None means the installed components.
    """

    kind: ClassVar[Kind]
    name: ClassVar[str]
    params: ClassVar[Mapping[str, Any]] = {}
    registry: ClassVar[Registry | None] = None

    def component(self) -> Any:
        """Build a new component from its form in a spec, as a run does."""
        form: TypeAdapter[Choice] = TypeAdapter(Annotated[Choice, OfKind(self.kind)])
        declared = self._registry.component(self.kind, self.name)
        given = {"name": self.name, **examples(declared.params), **self.params}
        choice = form.validate_python(given, context={"registry": self._registry})
        return self.context().build(choice)

    def context(self) -> BuildContext:
        """Return the build context that the component gets."""
        return Assembly(self._registry)

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Use the component as training step ``step`` does, and return its results."""
        raise NotImplementedError

    def metrics(self, step: int) -> dict[str, float]:
        """Return the metrics that a stateful component gets after a step."""
        loss = 2 * 0.8**step
        terms = {"term/task": loss / 2, "term/kd": loss / 2, "distilled": loss / 2}
        return {"loss": loss, "progress": step / STEPS, **terms, f"acceptance/{self.name}": 0.5}

    @property
    def _registry(self) -> Registry:
        return self.registry or installed()

    def test_it_is_built_by_name_and_satisfies_its_protocol(self) -> None:
        """The params have defaults or are given, and the component has its kind's methods."""
        self.component()

    def test_declaring_it_imports_no_torch(self) -> None:
        """``kdcore --help`` and ``plugins list`` import every declaring module."""
        plugin = self._registry.plugin_of(self.kind, self.name)
        declaring = self._registry.hooks.get_plugin(f"{plugin.distribution}:{plugin.name}")
        module = getattr(declaring, "__name__", None) or type(declaring).__module__
        assert not imports_torch(module), (
            f"{module} imports torch: move code that needs torch to the module that `build` names"
        )

    def test_its_params_are_frozen_and_described(self) -> None:
        """A run cannot change a spec, and the schema describes each field."""
        params = self._registry.component(self.kind, self.name).params
        assert params.model_config.get("frozen"), f"{params.__name__} must be frozen"
        for field, about in params.model_fields.items():
            assert about.description, f"{params.__name__}.{field} has no description"

    def test_a_resumed_run_goes_on_bit_for_bit(self) -> None:
        """A new component with the saved state continues as the original one, at any step.

        The check includes components that declare no state: they must not have one.
        """
        unbroken = self.resumed({})
        for step in range(STEPS):
            resumed = self.resumed(through_a_file(self.saved(unbroken)))
            for left, right in zip(
                self.observe(unbroken, step), self.observe(resumed, step), strict=True
            ):
                same(left, right, f"a run resumed before step {step} differs from the original")
            self.finish(unbroken, step)

    def test_a_saved_state_stays_as_it_was(self) -> None:
        """A component does not change a state that it returned or loaded before."""
        unbroken = self.resumed({})
        for step in range(STEPS):
            state = self.saved(unbroken)
            copies = {name: tensor.clone() for name, tensor in state.items()}
            for component in (unbroken, self.resumed(state)):
                self.observe(component, step)
                self.finish(component, step)
            for name, copy in copies.items():
                same(state[name], copy, f"step {step} changed '{name}' of a saved state")

    def saved(self, component: Any) -> dict[str, Tensor]:
        """Return the component's state; empty if it declares none."""
        stateful = isinstance(component, Stateful | MomentumPolicy)
        return component.state_dict() if stateful else {}

    def resumed(self, state: Mapping[str, Tensor]) -> Any:
        """Build a new component and load the state, unless the state is empty."""
        component = self.component()
        if state:
            component.load_state_dict(state)
        return component

    def finish(self, component: Any, step: int) -> None:
        """Call ``step_done`` of a stateful component."""
        if isinstance(component, Stateful):
            component.step_done(self.metrics(step))


def examples(params: type[BaseModel]) -> dict[str, Any]:
    """Return the first declared example (``Field(examples=...)``) of each required field.

    With these, a component with required params can be checked without further arguments.
    """
    return {
        name: field.examples[0]
        for name, field in params.model_fields.items()
        if field.is_required() and field.examples
    }


def same(left: Tensor, right: Tensor, otherwise: str) -> None:
    """Assert that two tensors are equal bit for bit; ``otherwise`` begins the message."""
    assert left.shape == right.shape, f"{otherwise}: {tuple(left.shape)}, {tuple(right.shape)}"
    gap = (left.double() - right.double()).abs().max() if left.numel() else 0
    assert torch.equal(left, right), f"{otherwise}: they differ by up to {gap:.3g}"


def alike(left: Tensor, right: Tensor, otherwise: str) -> None:
    """Assert that two tensors with values near 1 are equal up to float32's rounding."""
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, msg=lambda m: f"{otherwise}: {m}")


def finite(tensor: Tensor, where: str) -> None:
    """Assert that a tensor contains neither NaN nor infinity."""
    assert torch.isfinite(tensor).all(), f"NaN or infinity: {where}"


def through_a_file(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write a state with safetensors, which stores tensors only, and read it again."""
    for name, tensor in state.items():
        assert isinstance(name, str), f"the keys of a state must be strings, not {name!r}"
        assert isinstance(tensor, Tensor), f"'{name}' of the state is {type(tensor)}, not a tensor"
    return safetensors.torch.load(safetensors.torch.save(dict(state)))


@contextmanager
def same_global_random(seed: int = 0) -> Iterator[None]:
    """Seed torch's global generator, and restore it afterwards.

    Components must not use it. The check of randomness seeds it differently to detect that; the
    other checks seed it equally, so that each of them fails for its own reason only.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@functools.cache
def imports_torch(module: str) -> bool:
    """Check in a new interpreter whether importing a module imports torch."""
    code = f"import sys, {module}; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{module} does not import by itself: {done.stderr}"
    return done.stdout.split()[-1] == "True"


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one check.

    Attributes:
        kind: The component's kind.
        name: The component's name.
        check: The name of the check.
        passed: Whether the check passed.
        reason: The reason of the failure; empty when the check passed.
    """

    kind: str
    name: str
    check: str
    passed: bool
    reason: str = ""


class Checks(Protocol):
    """A test class of the kit: the component of its checks, and methods that begin with ``test_``.

    Attributes:
        kind: The component's kind.
        name: The component's name.
    """

    kind: ClassVar[Any]
    name: ClassVar[str]


def results(suite: type[Checks], package: str = "") -> Iterator[Result]:
    """Run every check of a suite, in the order of declaration.

    The checks are assertions, which ``python -O`` removes.

    Args:
        suite: The suite of a component.
        package: The package with the code under test; a reason names its line that raised.

    Yields:
        The result of each check.
    """
    for check in checks(suite):
        try:
            getattr(suite(), check)()
        except UserError as wrong:
            reason = f"{wrong.cause} (fix: {wrong.cure})"
            yield Result(suite.kind, suite.name, check, False, reason)
        except (Exception, SystemExit) as fault:
            said = f"{type(fault).__name__}: {fault}".removeprefix("AssertionError: ")
            reason = textwrap.shorten(said, 400, placeholder=" ...") + _place(fault, package)
            yield Result(suite.kind, suite.name, check, False, reason)
        else:
            yield Result(suite.kind, suite.name, check, True)


def _place(fault: BaseException, package: str) -> str:
    """The innermost line of a package that an exception passed, in brackets; "" without one."""
    passed = [
        f" ({frame.f_globals['__name__']}, line {line})"
        for frame, line in traceback.walk_tb(fault.__traceback__)
        if package and str(frame.f_globals.get("__name__")).partition(".")[0] == package
    ]
    return passed[-1] if passed else ""


def checks(suite: type[Checks]) -> list[str]:
    """Return the names of a suite's checks: those of every kind, then its own."""
    names = [name for level in reversed(suite.__mro__) for name in vars(level)]
    return [name for name in dict.fromkeys(names) if name.startswith("test_")]
