"""Builds the components that a spec chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdcore.method.construction import ChoiceBuilder


@dataclass(frozen=True, slots=True)
class Assembly(ChoiceBuilder):
    """The `kdcore.method.protocols.BuildContext` of a run, which loads models too."""

    def load_model(self, model: str) -> Any:
        """See `kdcore.method.protocols.BuildContext`.

        Raises UserError as `kdcore.models.loading.load_model` does.
        """
        from kdcore.models.loading import load_model  # heavy, and most components need no model
        from kdcore.specs.fields import ModelSpec

        return load_model(ModelSpec.model_validate({"model": model}))
