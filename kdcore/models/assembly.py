"""Builds the components that a spec chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdcore.errors import UserError
from kdcore.method import protocols
from kdcore.method.choice import Choice
from kdcore.method.hookspecs import PROTOCOL_OF
from kdcore.method.registry import Registry, describe


@dataclass(frozen=True, slots=True)
class Assembly:
    """The `kdcore.method.protocols.BuildContext` of a run."""

    registry: Registry

    def build(self, choice: Choice) -> Any:
        """Import, construct and check one component.

        Raises UserError, naming the distribution, when it cannot be imported or built, or
        lacks a member of its Protocol; a UserError of its own passes through.
        """
        component = self.registry.component(choice.kind, choice.name)
        plugin = self.registry.plugin_of(choice.kind, choice.name)
        try:
            built = self.registry.attribute(component)(choice.params, self)
        except UserError:
            raise
        except (Exception, SystemExit) as fault:
            raise UserError(
                f"{choice.kind} '{choice.name}' of {plugin.distribution} {plugin.version} "
                f"cannot be built: {describe(fault)}",
                "report it to the plugin's author, or choose another component",
            ) from fault
        accepted = protocols_of(choice.kind)
        if not isinstance(built, accepted):
            wanted = " or ".join(protocol.__name__ for protocol in accepted)
            raise UserError(
                f"{choice.kind} '{choice.name}' of {plugin.distribution} {plugin.version} "
                f"does not satisfy the Protocol {wanted}",
                "report it to the plugin's author; kdcore.testing shows what is missing",
            )
        return built

    def load_model(self, model: str) -> Any:
        """See `kdcore.method.protocols.BuildContext`.

        Raises UserError as `kdcore.models.loading.load_model` does.
        """
        from kdcore.models.loading import load_model  # heavy, and most components need no model
        from kdcore.specs.fields import ModelSpec

        return load_model(ModelSpec.model_validate({"model": model}))


def protocols_of(kind: str) -> tuple[type, ...]:
    """The Protocols of which a component of a kind must satisfy one."""
    protocol = getattr(protocols, PROTOCOL_OF[kind])
    return (protocol, protocols.RankedGate) if kind == "gate" else (protocol,)
