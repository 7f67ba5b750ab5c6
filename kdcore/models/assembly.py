"""Construction of the components that a spec names."""

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
    """The `kdcore.method.protocols.BuildContext` of a run.

    Attributes:
        registry: The registry in which components are found.
    """

    registry: Registry

    def build(self, choice: Choice) -> Any:
        """Import, construct and check one component.

        Args:
            choice: The kind, name and validated parameters of the component.

        Returns:
            The component, which satisfies the Protocol of its kind.

        Raises:
            UserError: The component cannot be imported or built, or lacks a member of its
                Protocol; the message names the distribution. A UserError that the component
                raises itself is passed on.
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
        """Load a frozen language model; see `kdcore.method.protocols.BuildContext`.

        Args:
            model: Hub id, folder or GGUF file, as in a spec.

        Returns:
            The `kdcore.models.loaded.LoadedModel`.

        Raises:
            UserError: See `kdcore.models.loading.load_model`.
        """
        from kdcore.models.loading import load_model  # slow, and most components do not need it
        from kdcore.specs.fields import ModelSpec

        return load_model(ModelSpec.model_validate({"model": model}))


def protocols_of(kind: str) -> tuple[type, ...]:
    """The Protocols of which a component of a kind must satisfy one."""
    protocol = getattr(protocols, PROTOCOL_OF[kind])
    return (protocol, protocols.RankedGate) if kind == "gate" else (protocol,)
