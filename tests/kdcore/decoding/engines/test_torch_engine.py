"""The reference engine: it reads the weights of the moment, and shares a model with others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.sampling import Sampling
from kdcore.decoding.session import SPARE, Session
from kdcore.decoding.tree import DraftTree, backbone
from kdcore.errors import UserError
from kdcore_baselines.drafters.untrained import Nothing
from kdcore_baselines.verifiers import Greedy
from kdcore_baselines.verifiers import Sampling as SamplingVerifier
from tests.tiny.targets import generated, padded, prompts, tiny
from tests.tiny.trained_drafters import bound

COUNT = 12
GREEDY = Greedy(None, None)  # type: ignore[arg-type]


def decoder_of(model: PreTrainedModel) -> Decoder:
    return Decoder(model, bound("medusa", model, depth=2), GREEDY)


def scaled(model: PreTrainedModel) -> None:
    for weight in model.parameters():
        weight.data = weight.data * 1.3


def merged(model: PreTrainedModel) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).merge_and_unload()


def stepped(model: PreTrainedModel) -> None:
    """A fused optimizer does not count its writes as versions of a tensor."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model(torch.tensor([prompts(1)[0]])).logits.square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [scaled, merged, stepped])
def test_it_decodes_with_the_weights_of_the_moment(
    change: Callable[[PreTrainedModel], None],
) -> None:
    model = copy.deepcopy(tiny("llama"))
    decoder = decoder_of(model)
    rows = prompts(3)
    first = decoder.generate(*padded(rows), Stop(COUNT))
    assert first == generated(model, rows, COUNT)
    change(model)
    then = decoder.generate(*padded(rows), Stop(COUNT))
    assert then == generated(model, rows, COUNT) != first


def test_threads_share_a_model() -> None:
    model, rows = tiny("llama"), prompts(3)
    drafter = bound("fasteagle", model, depth=2)
    expected = [generated(model, [row], COUNT)[0] for row in rows]

    def answer(row: list[int]) -> tuple[list[int], dict[int, int]]:
        own = bound("fasteagle", model, depth=2)
        own.load_state_dict(drafter.state_dict())
        decoder = Decoder(model, own, GREEDY)
        return decoder.generate(*padded([row]), Stop(COUNT))[0], decoder.counter.accepted

    alone = [answer(row) for row in rows]
    assert [tokens for tokens, _ in alone] == expected
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(answer, rows)) == alone
    assert model.config._attn_implementation == "sdpa"


def test_streams_take_turns_on_a_model() -> None:
    model, rows = tiny("llama"), prompts(2)
    streams = [decoder_of(model).stream(*padded([row]), Stop(COUNT)) for row in rows]
    turns = zip(*([next(s) for _ in range(4)] for s in streams), strict=True)
    assert len(list(turns)) == 4
    assert decoder_of(model).generate(*padded(rows), Stop(COUNT)) == generated(model, rows, COUNT)
    for stream in streams:
        stream.close()
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks for m in model.model.layers)


def test_rejected_nodes_do_not_pile_up() -> None:
    model = tiny("llama")
    session = Session(model)
    session.start(2)
    root = torch.tensor([3, 4])
    shape = backbone(3, 4, root.device)
    tree = DraftTree(torch.ones(2, 12).long(), shape, torch.ones(2, 12).bool())
    with torch.no_grad():
        session.extend(torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([3, 2]))
        for _ in range(30):
            session.score(root, tree)
            session.keep(torch.tensor([[0], [-1]]), torch.tensor([2, 1]))
            assert session.engine.slots < 3 + 2 * 30 + 2 * SPARE
    assert session.lengths.tolist() == [63, 32]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value: float, temperature: float) -> None:
    model: Any = copy.deepcopy(tiny("llama"))
    row = prompts(1)[0]
    verifier: Any = SamplingVerifier(None, None) if temperature else GREEDY  # type: ignore[arg-type]
    drafter = Nothing(None, None)  # type: ignore[arg-type]
    decoder = Decoder(model, drafter, verifier, Sampling(temperature))
    model.lm_head.weight.data[7] = value
    with pytest.raises(UserError, match="NaN or infinite"):
        decoder.generate(*padded([row]), Stop(4))
    with pytest.raises(UserError, match="NaN or infinite"):  # the check of draft trees meets them
        decoder_of(copy.deepcopy(model))


def test_a_prompt_alone_may_lead_to_logits_that_are_not_finite() -> None:
    """The check of draft trees does not read this token."""
    model: Any = copy.deepcopy(tiny("llama"))
    model.model.embed_tokens.weight.data[60] = float("nan")
    decoder = decoder_of(model)
    assert decoder.generate(*padded([[1, 2, 3]]), Stop(1))
    with pytest.raises(UserError, match="logits of LlamaForCausalLM contain NaN or infinite"):
        decoder.generate(*padded([[1, 2, 3], [1, 60]]), Stop(4))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_an_excluded_token_is_no_fault(temperature: float) -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0]]).repeat(4, 1)
    logits[1, 0], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    found = Sampling(temperature).logp(logits, lambda: logits.long())
    assert found.isnan().any(1).tolist() == [False, True, True, True]
