"""Whether a model computes a draft tree as it computes plain text, found out by trying.

A session keeps tokens in slots that are not their positions, and tells by positions and a mask who
sees whom. A model that goes by the slots instead, with a bias for the distance between two or a
window of its own, gives other numbers and no error. So a small tree is scored behind many slots
that are nobody's, and compared with the model's own passes over each path.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcore.decoding.session import Session
from kdcore.decoding.tree import shape_of
from kdcore.errors import UserError
from kdcore.method.records import DraftTree

GAP = 1024
"""Slots that are nobody's; a window that is reckoned in slots is shorter than that."""
PROMPTS = ((5, 3), (11, 2, 7, 13))
"""Rows of different lengths, so that slots and positions differ in more than the gap."""
PARENTS = (-1, -1, 0, 0, 2)
PATHS = ((1,), (0, 3), (0, 2, 4))
"""All of the tree, from the root down."""
KEPT = (2, 0)
"""Of these, which each row keeps, before a pass that reads it."""
LONGEST = 9
"""Tokens of the longest row: prompt, root, path, and one more root."""

_faithful: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""Models that were found faithful, and their attention at that time."""


def refuse_unfaithful(model: PreTrainedModel) -> None:
    """Raises UserError when the model cannot score a tree, or scores it otherwise than plain text.

    model: in eval mode. It is tried once; a model whose context has no room for a trial is not.
    """
    attention = str(model.config.get_text_config()._attn_implementation)
    if _faithful.get(model) == attention:
        return
    session = Session(model)
    if session.limit is not None and session.limit < LONGEST:
        return
    name = type(model).__name__
    cure = (
        "decode with transformers' generate, or choose a model whose attention goes by the mask "
        "and the positions it is given, as that of Llama, Qwen, Mistral, Gemma and GPT-2 does"
    )
    try:
        off = _difference(session)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as fault:  # a model that expects another mask breaks in its own way
        reason = (str(fault).splitlines() or [""])[0]
        raise UserError(
            f"{name} cannot run a draft tree: {type(fault).__name__}: {reason}", cure
        ) from fault
    if not off <= 2 * torch.finfo(model.dtype).eps ** 0.5:
        raise UserError(
            f"{name} gives different logits for a draft tree than for plain text: "
            f"they differ by {off:.1%} of their spread, so the output would not "
            "be that of plain decoding",
            cure,
        )
    _faithful[model] = attention


@torch.no_grad()
def _difference(session: Session) -> float:
    """The largest between the session's logits and the plain ones, as a share of their spread."""
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
    session.cache.leave(GAP if session.limit is None else min(GAP, session.limit))
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
            worst = max(worst, _share(found, plain.logits[0, len(prompt) :]))
    return worst


def _share(found: Tensor, plain: Tensor) -> float:
    """Of logits [R, V]: the largest distance of a row, by how far the plain ones spread."""
    spread = (plain - plain.mean(-1, keepdim=True)).float().norm(dim=-1)
    distance = (found - plain).float().norm(dim=-1)
    return float((distance / spread.clamp(min=torch.finfo(torch.float32).tiny)).max())
