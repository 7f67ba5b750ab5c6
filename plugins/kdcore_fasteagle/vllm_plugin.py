"""Entry point of vLLM's group ``vllm.general_plugins``: it makes vLLM know FastEagle's cascade.

vLLM calls `register` in each of its processes before it reads a config. Nothing here imports vLLM
before that.
"""

from __future__ import annotations

import importlib

ARCHITECTURE = "Eagle3KdcoreFastEagleForCausalLM"
"""Architecture in the config of an exported drafter; vLLM requires ``Eagle3`` at either end."""


def register() -> None:
    """Register the cascade with vLLM, which imports it when a drafter needs it."""
    models = importlib.import_module("vllm").ModelRegistry
    if ARCHITECTURE not in models.get_supported_archs():
        models.register_model(ARCHITECTURE, "kdcore_fasteagle.vllm_model:FastEagleForCausalLM")
