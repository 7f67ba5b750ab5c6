"""FastEagle for vLLM's speculative decoding, through its experimental method ``custom_class``.

This module has never run inside vLLM. It relies on vLLM's source code of 2026 (versions 0.25 to
0.29; vllm-project/vllm#39487 added the method):

- ``create_custom_proposer`` imports the class that ``speculative_config.model`` names, builds it
  with the VllmConfig alone, and requires a method ``propose``.
- After loading the target, ``GPUModelRunner`` (V1) calls ``load_model(target)`` if it exists.
- After each step it calls ``propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu,
  slot_mappings=...)`` with token ids by request, in the order of the batch, without hidden states
  and without request ids.
- vLLM calls a decoder layer of a Llama with (positions [T], hidden_states [T, H], residual [T, H]
  or None); the hidden state i that EAGLE-3 drafters read is the sum of the latter two at layer i.
- ``get_forward_context().attn_metadata`` is a dict by layer in a step, and None in a dummy run;
  FlashAttention's metadata has ``query_start_loc`` [R + 1], the start of each request's tokens.

So hooks on the target's layers capture the hidden states, and the tokens identify a request.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdcore import UserError
from kdcore.method.registry import installed
from kdcore.specs.fields import ModelSpec
from kdcore_fasteagle.drafter import FastEagle
from kdcore_fasteagle.serving import NewRows, Proposer, load_for_serving

FOLDER = "kdcore_drafter"
"""Key of the drafter's folder in vLLM's ``additional_config``."""
_CALLED_WITH = ("positions", "hidden_states", "residual")


class _ModelConfig(Protocol):
    model: str
    max_model_len: int
    enforce_eager: bool


class _SpeculativeConfig(Protocol):
    num_speculative_tokens: int


class _SchedulerConfig(Protocol):
    max_num_seqs: int


class _ParallelConfig(Protocol):
    world_size: int


class VllmConfig(Protocol):
    """The parts of vLLM's config that this module reads."""

    model_config: _ModelConfig
    speculative_config: _SpeculativeConfig
    scheduler_config: _SchedulerConfig
    parallel_config: _ParallelConfig
    additional_config: Mapping[str, Any]


class FastEagleProposer:
    """Proposer to name in vLLM's ``speculative_config.model``.

    Args:
        vllm_config: Config of vLLM.

    Raises:
        UserError: A setting prevents the capture of hidden states.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        try:
            model = vllm_config.model_config
            self.most = vllm_config.speculative_config.num_speculative_tokens
            self.requests = vllm_config.scheduler_config.max_num_seqs
            self.positions = model.max_model_len
            workers, eager = vllm_config.parallel_config.world_size, model.enforce_eager
            folder = dict(vllm_config.additional_config).get(FOLDER)
            self.target = ModelSpec.model_validate({"model": model.model})
        except (AttributeError, TypeError) as differs:
            raise _other_interface(str(differs)) from differs
        if folder is None:
            raise UserError(
                "vLLM's additional_config does not name the drafter's folder",
                f"""add --additional-config '{{"{FOLDER}": "RUN/drafter"}}'""",
            )
        if not eager:
            raise UserError(
                "vLLM compiles the target, and compiled layers do not call the hooks that capture "
                "hidden states",
                "add --enforce-eager",
            )
        if workers != 1:
            raise UserError(
                f"vLLM splits the target over {workers} workers, but the drafter requires one",
                "serve on one device",
            )
        self.folder = Path(folder)

    def load_model(self, target: nn.Module) -> None:
        """Load the drafter and start capturing the target's hidden states.

        Args:
            target: vLLM's target model.

        Raises:
            UserError: The drafter cannot be loaded (see `load_for_serving`), or vLLM is missing or
                has an unsupported version.
        """
        device = next(target.parameters()).device
        drafter = load_for_serving(self.folder, self.target, installed(), device)
        self.attach(drafter, target, _forward_context())

    def attach(self, drafter: FastEagle, target: nn.Module, context: Callable[[], Any]) -> None:
        """Attach a drafter to a target.

        Args:
            drafter: Bound drafter.
            target: vLLM's target model.
            context: Function that returns the forward context of the current pass.

        Raises:
            UserError: The target does not have the layers that the drafter reads.
        """
        layers = getattr(getattr(target, "model", None), "layers", None)
        if not isinstance(layers, nn.ModuleList) or max(drafter.layers) >= len(layers):
            raise UserError(
                f"{type(target).__name__} of vLLM does not have the layers "
                f"{list(drafter.layers)}, whose inputs the drafter reads",
                "serve a target with its layers in model.layers, as in Llama, and a drafter whose "
                "features are below their number",
            )
        self.drafter, self.proposer = drafter, Proposer(drafter)
        self._heard: dict[int, Tensor] = {}
        self._seen: dict[int, Tensor] = {}  # tokens so far, by our number of the request
        self._count = 0
        self._starts: Tensor | None = None  # of the last captured pass, as are the positions
        self._positions = torch.empty(0)
        for layer in drafter.layers:
            layers[layer].register_forward_pre_hook(self._hearing(layer, context), with_kwargs=True)

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Sequence[int],
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Propose drafts for the R requests of the last captured pass.

        A request with rows that were not captured, e.g. a cached prefix, gets no draft.

        Args:
            sampled_token_ids: New tokens of each request; empty while its prompt is read.
            num_tokens_no_spec: [>= R] number of tokens of each request.
            token_ids_cpu: [>= R, L] tokens of each request.
            slot_mappings: Not used.

        Returns:
            The drafted tokens of each request.

        Raises:
            UserError: vLLM has an unsupported version.
        """
        if self._starts is None or len(self._starts) <= len(sampled_token_ids):
            raise _other_interface("the pass does not give the start of each request")
        features = torch.cat([self._heard[layer] for layer in self.drafter.layers], dim=-1)
        starts = self._starts[: len(sampled_token_ids) + 1].tolist()
        firsts = self._positions[starts[:-1]].tolist()
        read_before = dict(self._seen)
        step: list[NewRows] = []
        rows_of: list[int | None] = []
        for row, sampled in enumerate(sampled_token_ids):
            tokens = torch.as_tensor(token_ids_cpu[row][: int(num_tokens_no_spec[row])]).long()
            begin, end, first = starts[row], starts[row + 1], firsts[row]
            # rows after the second newest token belong to rejected drafts
            kept = min(end - begin, len(tokens) - 1 - first)
            request = self._request(read_before, tokens, first, kept) if kept > 0 else None
            rows_of.append(request if sampled else None)
            if request is not None:
                new = tokens[first + 1 : first + kept + 1]
                step.append(NewRows(request, new, features[begin : begin + kept]))
        named = (rows.request for rows in step)
        drafts = dict(zip(named, self.proposer.propose(step), strict=True))
        self._forget_the_oldest()
        return [
            [] if request is None else drafts[request][: self._room(int(count))]
            for request, count in zip(rows_of, num_tokens_no_spec, strict=False)
        ]

    def _request(
        self, read_before: dict[int, Tensor], tokens: Tensor, first: int, kept: int
    ) -> int | None:
        """Return our number of the request whose rows before ``first`` were read, or a new one.

        ``read_before`` has the requests of the last passes that no other request of this pass
        matched. Requests with equal tokens have equal rows, so they are interchangeable.
        """
        if first == 0:
            known: int | None = self._count
            self._count += 1
        else:
            read = tokens[: first + 1]
            same = (number for number, seen in read_before.items() if torch.equal(seen, read))
            known = next(same, None)
        if known is not None:
            read_before.pop(known, None)
            self._seen.pop(known, None)  # reinserted last, as the newest
            self._seen[known] = tokens[: first + kept + 1].clone()
        return known

    def _forget_the_oldest(self) -> None:
        """Keep as many requests as vLLM runs at once, since it does not report finished ones."""
        for number in list(self._seen)[: -self.requests]:
            del self._seen[number]
            self.proposer.finish(number)

    def _room(self, tokens: int) -> int:
        """Return the maximum number of drafted tokens after the given number of tokens."""
        return max(0, min(self.most, self.positions - tokens - 1))

    def _hearing(self, layer: int, context: Callable[[], Any]) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(_CALLED_WITH, args, strict=False)) | kwargs
            try:
                hidden, residual = given["hidden_states"], given.get("residual")
                self._positions = given["positions"]
            except KeyError as absent:
                raise _other_interface(f"a layer is called without {absent}") from absent
            if self._positions.dim() != 1:
                raise _other_interface("a token has more than one position")
            # a copy either way: vLLM adds to both in place
            self._heard[layer] = hidden.clone() if residual is None else hidden + residual
            metadata = context().attn_metadata
            by_layer = metadata.values() if isinstance(metadata, dict) else ()
            found = (getattr(each, "query_start_loc", None) for each in by_layer)
            self._starts = next((each for each in found if each is not None), None)

        return hook


def _forward_context() -> Callable[[], Any]:
    try:
        context: Callable[[], Any] = importlib.import_module(
            "vllm.forward_context"
        ).get_forward_context
    except ImportError as missing:
        raise UserError(
            f"vLLM cannot be imported: {missing}", "install vllm into this environment"
        ) from missing
    except AttributeError as differs:
        raise _other_interface(str(differs)) from differs
    return context


def _other_interface(how: str) -> UserError:
    return UserError(
        f"the adapter does not support this version of vLLM: {how}",
        "use vLLM 0.25 to 0.29 with its V1 model runner and FlashAttention, and a text-only target",
    )
