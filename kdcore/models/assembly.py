"""Construction of the components that a spec names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcore.components.choice import Choice
from kdcore.components.construction import ChoiceBuilder
from kdcore.errors import in_field

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Assembly(ChoiceBuilder):
    """The `kdcore.components.construction.BuildContext` of a run, which loads models too.

    Attributes:
        device: The device of the models that it loads (default: the CPU).
    """

    device: torch.device | None = None

    def built(self, choices: Mapping[str, Choice], field: Callable[[str], str]) -> dict[str, Any]:
        """Build the components of a mapping in a spec.

        Args:
            choices: Name -> component.
            field: Name -> the field of the component.

        Returns:
            Name -> the built component.

        Raises:
            UserError: A component refuses; the mistake names its field.
        """
        found: dict[str, Any] = {}
        for name, choice in choices.items():
            with in_field(field(name)):
                found[name] = self.build(choice)
        return found

    def load_model(self, model: str) -> Any:
        """Load a frozen language model; see `kdcore.components.construction.BuildContext`.

        Args:
            model: Hub id, folder or GGUF file, as in a spec.

        Returns:
            The `kdcore.models.loading.loaded.LoadedModel`.

        Raises:
            UserError: See `kdcore.models.loading.load.load_model`.
        """
        from kdcore.models.loading.load import (
            load_model,  # slow, and most components do not need it
        )
        from kdcore.specs.parts.fields import ModelSpec

        return load_model(ModelSpec.model_validate({"model": model}), device=self.device)
