"""FastEagle inside another engine: takes the target's features, returns draft tokens.

The engine runs the target, verifies and samples. This module holds the drafter and, for each
request, the keys and values of the rows read so far. It loads only the target's embedding and head,
which the drafter shares. It does not depend on any engine.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from kdcore import UserError
from kdcore.components.registry import Registry
from kdcore.decoding.drafters.files import load_drafter
from kdcore.decoding.drafters.row_cache import RowCache
from kdcore.errors import first_line
from kdcore.models.folder.files import model_folder, weights_digest
from kdcore.models.loading.load import load_model
from kdcore.specs.parts.fields import ModelSpec
from kdcore_fasteagle.drafter import FastEagle


@dataclass(frozen=True, slots=True)
class NewRows:
    """The N rows that a request committed since its last step.

    Attributes:
        request: Key of the request.
        tokens: [N] int64, the token after each row; the last one is the newest token.
        features: [N, F] hidden states of the target, in the order of the drafter's ``layers``.
    """

    request: Hashable
    tokens: Tensor
    features: Tensor


class Proposer:
    """Proposer of drafts for concurrent requests: the most likely token of each level.

    Args:
        drafter: Bound drafter in eval mode, as `load_for_serving` returns it.
    """

    def __init__(self, drafter: FastEagle) -> None:
        self.drafter = drafter
        self._caches: dict[Hashable, RowCache] = {}
        self._together: tuple[RowCache, list[RowCache]] | None = None

    def __contains__(self, request: Hashable) -> bool:
        return request in self._caches

    @torch.no_grad()
    def propose(self, step: Sequence[NewRows]) -> list[list[int]]:
        """Propose drafts for the requests of a step.

        An unknown request starts here. A request without new rows gets no draft, and a request that
        is not in the step keeps its state.

        Args:
            step: New rows of each request.

        Returns:
            D tokens of the target's vocabulary for each request, in the order of ``step``.

        Raises:
            ValueError: A request occurs twice.
        """
        if len({rows.request for rows in step}) < len(step):
            raise ValueError("a request occurs twice in one step")
        # A prompt in the same batch would pad all the short rows to its own length.
        most = self.drafter.depth + 1
        groups = [[rows] for rows in step if len(rows.tokens) > most]
        groups.append([rows for rows in step if 0 < len(rows.tokens) <= most])
        drafts: dict[Hashable, list[int]] = {}
        for group in filter(None, groups):
            proposed = self._read(group)
            drafts.update(zip((rows.request for rows in group), proposed, strict=True))
        return [drafts.get(rows.request, []) for rows in step]

    def finish(self, request: Hashable) -> None:
        """Drop the state of a request, if there is any; its key may then be reused.

        Args:
            request: Key of the request.
        """
        self._caches.pop(request, None)
        self._together = None

    def _read(self, group: Sequence[NewRows]) -> list[list[int]]:
        device = self.drafter.norms.device
        tokens = pad_sequence([rows.tokens for rows in group], batch_first=True).to(device)
        features = pad_sequence([rows.features for rows in group], batch_first=True).to(device)
        lengths = torch.tensor([len(rows.tokens) for rows in group], device=device)
        cache = self._joined([rows.request for rows in group])
        newest = self.drafter.read(cache, tokens, features, lengths)
        parts = cache.split()
        self._together = (cache, parts)
        self._caches.update(zip((rows.request for rows in group), parts, strict=True))
        best = self.drafter.logp(newest).topk(1).indices[..., 0]
        proposed: list[list[int]] = self.drafter.target_ids(best).tolist()
        return proposed

    def _joined(self, requests: Sequence[Hashable]) -> RowCache:
        """Join the caches of the requests; if the requests stay the same, nothing is copied."""
        known = [self._caches.get(request) for request in requests]
        if self._together is not None:
            cache, parts = self._together
            if len(known) == len(parts) and all(a is b for a, b in zip(known, parts, strict=True)):
                return cache
        return RowCache.join([self.drafter.empty_cache(1) if c is None else c for c in known])


def load_for_serving(
    folder: Path, target: ModelSpec, registry: Registry, device: torch.device
) -> FastEagle:
    """Load a trained fasteagle, with the embedding and head from its target's files.

    Args:
        folder: Folder of the drafter.
        target: Target model.
        registry: Known components.
        device: Device of the drafter.

    Returns:
        The drafter, bound and in eval mode.

    Raises:
        UserError: The drafter or the target cannot be loaded, the folder contains another drafter,
            or the target's embedding and head are not plain tables in its safetensors.
    """
    files = model_folder(target)
    outline = replace(load_model(target, weights=False), digest=weights_digest(files))
    drafter = load_drafter(folder, outline, registry)
    if not isinstance(drafter, FastEagle):
        raise UserError(
            f"the drafter in {folder} is a {type(drafter).__name__}, but only fasteagle is "
            "served this way",
            "export an eagle3 drafter with kdcore export, which engines read directly",
        )
    _fill(outline.model, files, device)
    return drafter.to(device)


@torch.no_grad()
def _fill(outline: PreTrainedModel, files: Path, device: torch.device) -> None:
    """Give a target on the meta device its embedding and head."""
    embedding: nn.Module = outline.get_input_embeddings()
    head: nn.Module = outline.get_output_embeddings()  # type: ignore[no-untyped-call]
    tied = getattr(head, "weight", None) is getattr(embedding, "weight", None)
    names = {module: name for name, module in outline.named_modules()}
    for module in (embedding, head):
        for own, outlined in list(module.named_parameters(recurse=False)):
            if module is head and tied and own == "weight":
                value = embedding.weight
            else:
                value = _stored(files, f"{names[module]}.{own}", outline.base_model_prefix)
                value = nn.Parameter(value.to(device, outlined.dtype), requires_grad=False)
            setattr(module, own, value)
        if any(buffer.is_meta for buffer in module.buffers()):
            raise UserError(
                f"the {type(module).__name__} of {type(outline).__name__} is not a plain table",
                "decode with kdcore generate, which loads the whole target",
            )


def _stored(files: Path, name: str, prefix: str) -> Tensor:
    """Read a weight from a model folder, which may store it without the model's prefix."""
    for stored in (name, name.removeprefix(f"{prefix}.")):
        for place in sorted(files.glob("model*.safetensors")):
            try:
                with safe_open(place, framework="pt") as opened:
                    if stored in opened.keys():  # noqa: SIM118  (no mapping: it cannot be asked)
                        weight: Tensor = opened.get_tensor(stored)
                        return weight
            except SafetensorError as fault:
                raise UserError(
                    f"{place} cannot be read: {first_line(fault)}", "download it again"
                ) from fault
    raise UserError(
        f"{files} does not contain the weight {name}, which the drafter shares with its target",
        "name a target in plain safetensors with the names of transformers, not quantised",
    )
