"""FastEagle for vLLM's speculative decoding, by its experimental method ``custom_class``.

Never run inside vLLM. What it relies on was read in vLLM's sources of 2026 (0.25 to 0.29; the
method came with vllm-project/vllm#39487):

- ``create_custom_proposer`` imports the class that ``speculative_config.model`` names, builds it
  with the VllmConfig alone, and wants a ``propose``.
- Once the target is loaded, ``GPUModelRunner`` (V1) calls ``load_model(target)``, if there is one.
- After each step it calls ``propose(sampled_token_ids, num_tokens_no_spec, token_ids_cpu,
  slot_mappings=...)``: token ids by request, in the order of the batch; no hidden states and no
  names of requests.
- A decoder layer of a Llama is called with (positions [T], hidden_states [T, H], residual [T, H] or
  None), and hidden state i, as EAGLE-3 drafters are given it, is the sum of the latter two at
  layer i.
- ``get_forward_context().attn_metadata`` is a dict by layer in a step, and None in a dummy run;
  FlashAttention's metadata has ``query_start_loc`` [R + 1], where each request's tokens begin.

So hooks on the target's layers hear the hidden states, and a request is known by its tokens.
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
"""Where ``additional_config`` of vLLM names the drafter's folder."""
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
    """What is read of vLLM's config."""

    model_config: _ModelConfig
    speculative_config: _SpeculativeConfig
    scheduler_config: _SchedulerConfig
    parallel_config: _ParallelConfig
    additional_config: Mapping[str, Any]


class FastEagleProposer:
    """The class to name in vLLM's ``speculative_config.model``."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Raises UserError for a setting under which the hidden states cannot be heard."""
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
                "vLLM was not told where the drafter is",
                f"""add --additional-config '{{"{FOLDER}": "RUN/drafter"}}'""",
            )
        if not eager:
            raise UserError(
                "vLLM compiles the target, and compiled layers call no hooks, by which the drafter "
                "hears their hidden states",
                "add --enforce-eager",
            )
        if workers != 1:
            raise UserError(
                f"vLLM splits the target over {workers} workers, and the drafter reads a whole one",
                "serve on one device",
            )
        self.folder = Path(folder)

    def load_model(self, target: nn.Module) -> None:
        """Load the drafter beside the target, and listen to the target from now on.

        Raises UserError as `load_for_serving` does, and where vLLM is missing or another.
        """
        device = next(target.parameters()).device
        drafter = load_for_serving(self.folder, self.target, installed(), device)
        self.attach(drafter, target, _forward_context())

    def attach(self, drafter: FastEagle, target: nn.Module, context: Callable[[], Any]) -> None:
        """Propose with ``drafter``; context: gives the forward context of the pass under way."""
        layers = getattr(getattr(target, "model", None), "layers", None)
        if not isinstance(layers, nn.ModuleList) or max(drafter.layers) >= len(layers):
            raise UserError(
                f"the drafter reads the inputs of layers {list(drafter.layers)}, which were not "
                f"found in {type(target).__name__} of vLLM",
                "serve a target that keeps its layers in model.layers, as Llama does, and a "
                "drafter with features below their number",
            )
        self.drafter, self.proposer = drafter, Proposer(drafter)
        self._heard: dict[int, Tensor] = {}
        self._seen: dict[int, Tensor] = {}  # by our number of a request: its tokens so far
        self._count = 0
        self._starts: Tensor | None = None  # of the pass last heard, as are the positions
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
        """Drafts for the R requests of the pass just heard.

        sampled_token_ids: by request what this pass added, nothing while a prompt is being read.
        num_tokens_no_spec: [>= R], how many tokens each has now. token_ids_cpu: [>= R, L], which.
        A request part of whose rows was never heard, e.g. for a cached prefix, gets no draft.
        """
        if self._starts is None or len(self._starts) <= len(sampled_token_ids):
            raise _other_interface("the pass does not say where each request begins")
        features = torch.cat([self._heard[layer] for layer in self.drafter.layers], dim=-1)
        starts = self._starts[: len(sampled_token_ids) + 1].tolist()
        firsts = self._positions[starts[:-1]].tolist()
        read_before = dict(self._seen)
        step: list[NewRows] = []
        rows_of: list[int | None] = []
        for row, sampled in enumerate(sampled_token_ids):
            tokens = torch.as_tensor(token_ids_cpu[row][: int(num_tokens_no_spec[row])]).long()
            begin, end, first = starts[row], starts[row + 1], firsts[row]
            # what stands behind the newest token but one belongs to drafts that were refused
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
        """Our number of the request whose rows before ``first`` were read, or of a new one.

        read_before: those of the last passes that no other request of this pass has taken. Two
        of equal tokens have equal rows, so it is no matter which is taken for which.
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
            self._seen.pop(known, None)  # to stand last, as the newest
            self._seen[known] = tokens[: first + kept + 1].clone()
        return known

    def _forget_the_oldest(self) -> None:
        """Keep as many as vLLM runs at once, since it does not say which requests are over."""
        for number in list(self._seen)[: -self.requests]:
            del self._seen[number]
            self.proposer.finish(number)

    def _room(self, tokens: int) -> int:
        """How many drafts may follow so many tokens."""
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
        f"this vLLM is not as the adapter knows it: {how}",
        "use vLLM 0.25 to 0.29 with its V1 model runner and FlashAttention, and a target of text "
        "alone",
    )
