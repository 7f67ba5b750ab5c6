"""A check that a model gives the same logits for a draft tree as for plain text.

A session stores tokens in slots that differ from their positions, and passes positions and a mask.
A model that relies on the slots instead, for a distance bias or its own window, gives wrong logits
without an error. So a small tree is scored after a gap of unused slots, and compared with plain
passes over each path.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcore.decoding.engines.protocols import Engine
from kdcore.decoding.engines.torch_engine import TorchEngine
from kdcore.decoding.layers.attention import GROUPED
from kdcore.decoding.session import Session
from kdcore.decoding.tree import DraftTree, shape_of
from kdcore.errors import UserError, first_line
from kdcore.models.facts import not_finite

GAP = 1024
"""Number of unused slots, which is larger than usual attention windows."""
PROMPTS = ((5, 3), (11, 2, 7, 13))
"""Rows of different lengths, so that slots and positions differ by more than the gap."""
PARENTS = (-1, -1, 0, 0, 2)
PATHS = ((1,), (0, 3), (0, 2, 4))
"""All paths of the tree, from the root down."""
KEPT = (2, 0)
"""The path that each row keeps before a further pass."""
LONGEST = 9
"""Number of tokens of the longest row: prompt, root, path, and one more root."""

_faithful: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""Models that passed, with their attention implementation and arithmetic at that time."""


def refuse_unfaithful(model: PreTrainedModel) -> None:
    """Check once that a model scores a draft tree like plain text.

    Args:
        model: The model in eval mode. A model whose context is too short for the check passes.

    Raises:
        UserError: The model cannot score a draft tree, gives different logits, or gives NaN or
            infinite ones.
    """
    attention = str(model.config.get_text_config()._attn_implementation).replace(GROUPED, "sdpa")
    arithmetic = _arithmetic(model)
    if _faithful.get(model) == (checked := f"{attention} in {arithmetic}"):
        return
    engine = TorchEngine()
    engine.bind(model, ())
    session = Session(model, engine=engine)
    if session.limit is not None and session.limit < LONGEST:
        return
    name = type(model).__name__
    cure = (
        "decode with transformers' generate, or choose a model whose attention uses the given mask "
        "and positions, such as Llama, Qwen, Mistral, Gemma or GPT-2"
    )
    try:
        off = _difference(session, engine)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as fault:  # models that expect another mask fail in many ways
        reason = f"{type(fault).__name__}: {first_line(fault)}"
        raise UserError(f"{name} cannot run a draft tree: {reason}", cure) from fault
    if getattr(model, "is_loaded_in_8bit", False):  # chooses columns by all tokens of a pass
        cure = "add llm_int8_threshold: 0.0 to the quantization of the model"
    if not off <= 2 * torch.finfo(arithmetic).eps ** 0.5:
        raise UserError(
            f"{name} gives different logits for a draft tree than for plain text: "
            f"they differ by {off:.1%} of their spread, so the output would "
            "differ from plain decoding",
            cure,
        )
    _faithful[model] = checked


def _arithmetic(model: PreTrainedModel) -> torch.dtype:
    """The dtype that rounds the logits: the model's own, or that of autocast."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def engine_difference(model: PreTrainedModel, engine: Engine) -> float:
    """Compare the logits of an engine, for a draft tree, with the model's own for plain text.

    Args:
        model: The model in eval mode.
        engine: An engine that is bound to it.

    Returns:
        The largest difference, relative to the spread of the logits.
    """
    return _difference(Session(model, engine=engine))


@torch.no_grad()
def _difference(session: Session, gapped: TorchEngine | None = None) -> float:
    """The largest difference between session logits and plain ones, relative to their spread.

    gapped: The session's engine, in whose cache a gap of unused slots is left.
    """
    device, classes = session.model.device, session.model.config.get_text_config().vocab_size
    counts = torch.tensor([len(prompt) for prompt in PROMPTS], device=device)
    prompts = [[*prompt, *[0] * (int(counts.max()) - len(prompt))] for prompt in PROMPTS]
    nodes = torch.arange(17, 17 + len(PARENTS), device=device).expand(len(PROMPTS), -1) % classes
    parents = torch.tensor(PARENTS, device=device)[None]
    root, next_root = (counts + 23) % classes, (counts + 29) % classes
    longest = max(map(len, PATHS))
    kept = [[*PATHS[which], *[-1] * (longest - len(PATHS[which]))] for which in KEPT]

    session.start(len(PROMPTS))
    session.extend(torch.tensor(prompts, device=device) % classes, counts)
    if gapped is not None:
        gap = GAP if session.limit is None else min(GAP, session.limit)
        gapped.cache.leave(gap)
        session.hide(gap)
    tree = DraftTree(nodes, shape_of(parents), torch.ones_like(nodes, dtype=torch.bool))
    scored = session.score(root, tree)
    session.keep(
        torch.tensor(kept, device=device),
        torch.tensor([1 + len(PATHS[which]) for which in KEPT], device=device),
    )
    nothing = DraftTree(nodes[:, :0], shape_of(parents[:, :0]), nodes[:, :0].bool())
    then = session.score(next_root, nothing)

    worst = 0.0
    for row, prompt in enumerate(PROMPTS):
        for which, path in enumerate(PATHS):
            slots = torch.tensor([0, *(1 + node for node in path)], device=device)
            tokens = [*prompt, root[row], *nodes[row, list(path)]]
            found = scored[row, slots]
            if which == KEPT[row]:
                tokens.append(next_root[row])
                found = torch.cat([found, then[row]])
            plain = session.model(torch.tensor([tokens], device=device) % classes, use_cache=False)
            expected = plain.logits[0, len(prompt) :]
            if not expected.amax(-1).isfinite().all():
                raise not_finite(type(session.model).__name__)
            worst = max(worst, _share(found, expected))
    return worst


def _share(found: Tensor, plain: Tensor) -> float:
    """The largest distance between rows of logits [R, V], relative to the plain ones' spread."""
    spread = (plain - plain.mean(-1, keepdim=True)).float().norm(dim=-1)
    distance = (found - plain).float().norm(dim=-1)
    return float((distance / spread.clamp(min=torch.finfo(torch.float32).tiny)).max())
