"""FastEagle's cascade as a model of vLLM's own layers, for vLLM's method ``eagle3``.

vLLM imports this module, and nothing else does. With ``parallel_drafting: true``, vLLM lays out T
slots, request after request, and makes one pass for K drafts:

    [committed rows ..., newest row, K - 1 placeholders, rejected rows]

It takes the first draft from the newest row and the i-th from the placeholder i - 1 places after
it. A level of the cascade predicts each of them from the newest row itself, so a placeholder takes
the newest row's output of its level. The keys of placeholders lie at positions after the committed
rows; causal attention does not read them there, and later rows overwrite them.

vLLM shares the target's embedding, and its head unless the drafter has a vocabulary of its own.
See `kdcore_fasteagle.drafter` for the equations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, get_current_vllm_config, replace
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    get_draft_quant_config,
    maybe_prefix,
    process_eagle_weight,
)

from kdcore.errors import UserError

STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}
"""vLLM's merged weights, by the names in a drafter's file."""


class Level(LlamaDecoderLayer):
    """A level of the cascade: a decoder layer of Llama."""

    def get_quant_config(self, vllm_config: VllmConfig) -> Any:
        """Return the drafter's quantisation, which is not the target's."""
        return get_draft_quant_config(vllm_config)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "hidden_states": 0})
class Cascade(nn.Module):
    """The levels that are used, K of D, with the token's part of the input."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, first_layer: int) -> None:
        super().__init__()
        config = vllm_config.speculative_config.draft_model_config.hf_config
        self.used = vllm_config.speculative_config.num_speculative_tokens
        self.placeholder = config.pard_token
        self.eps = config.rms_norm_eps
        self.normalise = config.kdcore_normalise
        self.features = len(config.eagle_aux_hidden_state_layer_ids)
        linear: dict[str, Any] = {
            "bias": False,
            "return_bias": False,
            "params_dtype": vllm_config.model_config.dtype,
            "quant_config": get_draft_quant_config(vllm_config),
        }
        hidden = config.hidden_size
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, hidden, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        self.fuse_features = ReplicatedLinear(
            self.features * hidden, hidden, prefix=maybe_prefix(prefix, "fuse_features"), **linear
        )
        self.fuse_token = ReplicatedLinear(
            2 * hidden, hidden, prefix=maybe_prefix(prefix, "fuse_token"), **linear
        )
        whole = _without_window(get_current_vllm_config())
        self.levels = nn.ModuleList(
            Level(whole, prefix=maybe_prefix(prefix, f"levels.{first_layer + i}"), config=config)
            for i in range(self.used)
        )
        self.norms = nn.Parameter(torch.ones(self.used, hidden), requires_grad=False)

    def scaled(self, states: Tensor) -> Tensor:
        """Scale states [..., H] to mean square 1 if the drafter was trained so."""
        if not self.normalise:
            return states
        return F.rms_norm(states, states.shape[-1:], eps=self.eps)

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute what the head reads in each slot.

        Args:
            input_ids: [T] the token after each row, or the placeholder.
            positions: [T] positions.
            hidden_states: [T, H] fused features.

        Returns:
            [T, H] twice: vLLM's interface has a second output for later passes.
        """
        # [T]: the rows at first, then the i-th placeholder of each run
        taken = input_ids != self.placeholder
        placeholders = ~taken
        token = self.scaled(self.embed_tokens(input_ids.masked_fill(placeholders, 0)))
        hidden = self.fuse_token(torch.cat([hidden_states, token], dim=-1))
        read = torch.zeros_like(hidden)
        for i, level in enumerate(self.levels):
            update, residual = level(positions, hidden, None)
            hidden = residual + update
            normed = F.rms_norm(hidden, hidden.shape[-1:], eps=self.eps) * self.norms[i]
            read = torch.where(taken[:, None], normed.roll(i, dims=0), read)
            taken = placeholders & taken.roll(1, dims=0)
        return read, read


class FastEagleForCausalLM(Eagle3LlamaForCausalLM):
    """FastEagle drafter; vLLM's proposer requires a subclass of this class.

    Raises:
        UserError: The engine's settings do not fit the drafter.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = self.config = vllm_config.speculative_config.draft_model_config.hf_config
        _refuse_settings(config, vllm_config)
        # vLLM numbers the layers of both models in one sequence
        count = config.target_layer_count = vllm_config.model_config.get_total_num_hidden_layers()
        self.model = Cascade(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"), first_layer=count
        )
        self.lm_head = ParallelLMHead(
            config.draft_vocab_size,
            config.hidden_size,
            quant_config=get_draft_quant_config(vllm_config),
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        self.logits_processor = LogitsProcessor(
            config.draft_vocab_size, scale=config.logit_scale, soft_cap=config.logit_soft_cap
        )
        self.draft_id_to_target_id = None
        if config.draft_vocab_size != config.vocab_size:
            self.draft_id_to_target_id = nn.Parameter(
                torch.zeros(config.draft_vocab_size, dtype=torch.long), requires_grad=False
            )
        width = self.model.features * config.hidden_size
        # what vLLM puts into placeholders; no row reads them
        self.register_buffer("mask_hidden", torch.zeros(1, width), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Cascade.forward`."""
        read: tuple[Tensor, Tensor] = self.model(input_ids, positions, hidden_states)
        return read

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """Fuse the target's hidden states.

        Args:
            hidden_states: [..., F].

        Returns:
            [..., H].
        """
        chunks = hidden_states.chunk(self.model.features, dim=-1)
        scaled = torch.cat([self.model.scaled(each) for each in chunks], dim=-1)
        fused: Tensor = self.model.fuse_features(scaled)
        return fused

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of the levels that are used.

        Args:
            weights: Names, as `kdcore_fasteagle.vllm_layout` writes them, and weights.

        Returns:
            The names of the loaded parameters.
        """
        mapper = WeightsMapper(orig_to_new_stacked=STACKED)
        loaded: set[str] = AutoWeightsLoader(self).load_weights(self._own(weights), mapper=mapper)
        return loaded

    def _own(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            process_eagle_weight(self, name)
            if name.startswith("levels.") and int(name.split(".")[1]) >= self.model.used:
                continue
            if name == "norms":
                yield "model.norms", weight[: self.model.used]
            elif name == "d2t":
                yield "draft_id_to_target_id", weight
            elif name == "lm_head.weight":
                yield name, weight
            else:
                yield f"model.{name}", weight


def _without_window(vllm_config: VllmConfig) -> VllmConfig:
    """Return a config under which layers read all rows, also beside a target that has a window."""
    return replace(vllm_config, cache_config=replace(vllm_config.cache_config, sliding_window=None))


def _refuse_settings(config: Any, vllm_config: VllmConfig) -> None:
    asked = vllm_config.speculative_config.num_speculative_tokens
    if not vllm_config.speculative_config.parallel_drafting:
        raise UserError(
            "fasteagle gives all its drafts in one pass, but parallel_drafting is off",
            'add "parallel_drafting": true to the speculative config',
        )
    if asked > config.num_hidden_layers:
        raise UserError(
            f"num_speculative_tokens is {asked}, but the drafter has {config.num_hidden_layers} "
            "levels",
            f"set num_speculative_tokens to at most {config.num_hidden_layers}",
        )
    if get_pp_group().world_size > 1:
        raise UserError(
            "fasteagle shares the target's embedding and head, which pipeline parallelism puts on "
            "different devices",
            "remove --pipeline-parallel-size; --tensor-parallel-size is possible",
        )
    target = vllm_config.model_config
    for name, value, targets in (
        ("hidden size", config.hidden_size, target.get_hidden_size()),
        ("vocabulary size", config.vocab_size, target.get_vocab_size()),
        ("number of layers", config.kdcore_target_layers, target.get_total_num_hidden_layers()),
    ):
        if value != targets:
            raise UserError(
                f"the drafter was exported for a target whose {name} is {value}, but that of "
                f"{target.model} is {targets}",
                "serve the target that the drafter was trained for",
            )
