"""Why a drafter's proposals are not accepted: training and serving laid side by side.

A drafter that trains well and accepts nothing has most often been served something else than it
was trained on: other layers, another norm, tokens shifted by one, another template or target. So a
real answer is read twice, whole as in training and piece by piece as in serving, and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kdcore.data.anchors import at_anchors
from kdcore.data.model_answers import end_ids
from kdcore.decoding.assembled import build_decoder
from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.session import Session
from kdcore.decoding_spec import DraftingSpec, SamplingSpec
from kdcore.drafter_files import differences, load_drafter, read_config, template_digest
from kdcore.evaluation.drafting import feature_rms, measure_drafts
from kdcore.models import LoadedModel
from kdcore.protocols import TrainedDrafter
from kdcore.records import Batch, DraftTree
from kdcore.registry import Registry
from kdcore.views import DrafterView

EQUAL = 1e-3
"""Largest difference between features read whole and in pieces, as a share of their own size."""

Verdict = Literal["fine", "weak", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was looked at, what was found, and in plain words what follows from it."""

    check: str
    found: str
    verdict: Verdict
    words: str


def examine(
    folder: Path,
    target: LoadedModel,
    prompts: Sequence[Sequence[int]],
    registry: Registry,
    max_new_tokens: int = 64,
) -> list[Finding]:
    """All checks, in the order in which one explains the next; the later need the earlier.

    prompts: token ids, each of at least two. Raises UserError for a folder that holds no drafter.
    """
    config = read_config(folder)
    findings = list(_identity(config, target))
    if any(each.verdict == "wrong" for each in findings):
        return findings
    drafter: Any = load_drafter(folder, target, registry)
    view = DrafterView(target.model, drafter)
    nothing, greedy = DraftingSpec.model_validate({}), SamplingSpec.model_validate({})
    plain = build_decoder(target, nothing, greedy, registry)
    stop = Stop(max_new_tokens, tuple(end_ids(target)))
    answers = [_answer(plain, prompt, stop) for prompt in prompts]
    read = [_Read.of(prompt, answer, view) for prompt, answer in zip(prompts, answers, strict=True)]
    findings.append(_features(read, target, drafter))
    if config["trained"]["feature_rms"]:  # of a drafter from elsewhere it is not known
        findings.append(_size(read, config))
    findings.append(_proposals(read, target, drafter))
    findings.append(_shift(read, view))
    if drafter.vocabulary is not None:
        findings.append(_vocabulary(read, drafter.vocabulary))
    drafting = Decoder(target.model, drafter, plain.verifier)
    findings += _acceptance(read, view, config, prompts, answers, drafting, stop)
    return findings


@dataclass(frozen=True, slots=True)
class _Read:
    """One answer, read whole: inputs [1, T], labels and mask [1, T], features [1, T, F]."""

    batch: Batch
    features: Tensor

    @classmethod
    def of(cls, prompt: Sequence[int], answer: Sequence[int], view: DrafterView) -> _Read:
        tokens = torch.tensor([[*prompt, *answer]], device=view.target.device)
        inputs = {"input_ids": tokens[:, :-1], "attention_mask": torch.ones_like(tokens[:, :-1])}
        learned = torch.arange(tokens.shape[1] - 1, device=tokens.device) >= len(prompt) - 1
        batch = Batch(inputs, tokens[:, 1:], learned[None], torch.zeros(1, dtype=torch.int64))
        return cls(batch, view.read(batch)[0])

    @property
    def tokens(self) -> Tensor:
        return self.batch.inputs["input_ids"]

    def anchors(self, drafter: TrainedDrafter, shift: int = 0) -> Batch:
        """The anchors' rows, with labels taken ``shift`` places further on."""
        labels = self.batch.labels.roll(-shift, 1)
        padded = {"labels": labels, "mask": self.batch.mask, "index": self.batch.index}
        made = at_anchors(padded, drafter.depth, drafter.vocabulary)
        return Batch(self.batch.inputs, made["labels"], made["mask"], made["index"])


def _identity(config: dict[str, Any], target: LoadedModel) -> Iterator[Finding]:
    """The target, its tokenizer and its template."""
    differ = differences(config, target)
    trained = config["target"]["name"]
    yield Finding(
        "target",
        ", ".join(differ) or "the same files",
        "wrong" if differ else "fine",
        f"trained for {trained}, and this is another model: train a drafter for it"
        if differ
        else f"this is the target it was trained for, {trained}",
    )
    template = config["trained"].get("template")
    if template is None:  # of a drafter from elsewhere
        return
    same = template == template_digest(target)
    yield Finding(
        "chat template",
        "the same" if same else "another",
        "fine" if same else "weak",
        "prompts look as they did in training"
        if same
        else "prompts look otherwise than in training: serve with the template it was trained with",
    )


@torch.no_grad()
def _features(read: Sequence[_Read], target: LoadedModel, drafter: Any) -> Finding:
    """Features of a whole pass against those of a session that runs one token at a time."""
    worst = 0.0
    for each in read:
        session = Session(target.model, drafter.layers)
        session.start(1)
        one = torch.ones(1, dtype=torch.int64, device=each.tokens.device)
        pieces = [session.extend(token[:, None], one)[1] for token in each.tokens.unbind(1)]
        size = each.features.abs().max().clamp(min=1e-6)
        worst = max(worst, float((torch.cat(pieces, 1) - each.features).abs().max() / size))
    good = worst < EQUAL
    return Finding(
        "features",
        f"differ by {worst:.1e} of their size",
        "fine" if good else "wrong",
        "the target gives the same features in training and in serving"
        if good
        else "the session reads other hidden states than training did: layers, norm or dtype",
    )


def _size(read: Sequence[_Read], config: dict[str, Any]) -> Finding:
    """How large the features are, against what they were in training."""
    whole = torch.cat([each.features[0] for each in read])
    now = feature_rms(whole, len(config["layers"]))
    then = config["trained"]["feature_rms"]
    ratios = [a / b if b else 1.0 for a, b in zip(now, then, strict=True)]
    good = all(0.5 < ratio < 2 for ratio in ratios)
    return Finding(
        "size of the features",
        " ".join(f"{ratio:.2f}" for ratio in ratios) + " of training's",
        "fine" if good else "weak",
        "each layer's features are as large as in training"
        if good
        else "features of another size: a norm is missing or new, or the text is of another kind",
    )


@torch.no_grad()
def _proposals(read: Sequence[_Read], target: LoadedModel, drafter: Any) -> Finding:
    """What it proposes token by token, against what its training pass finds likeliest."""
    agreed = compared = 0
    for each in read:
        hidden = drafter(each.tokens, each.features)[0, :, 0]
        best = drafter.head.finish(drafter.head.linear(hidden)).argmax(-1)
        wanted = best if drafter.vocabulary is None else drafter.vocabulary[best]
        drafter.start(each.tokens[:, 0])
        one = torch.ones(1, dtype=torch.int64, device=each.tokens.device)
        for place in range(each.tokens.shape[1] - 1):
            tree: DraftTree = drafter.propose(
                each.tokens[:, place + 1, None], each.features[:, place, None], one, None
            )
            first = tree.tokens[0, (tree.shape.parents[0] < 0) & tree.mask[0]]
            compared += 1
            agreed += int(bool((first == wanted[place]).any()))
    share = agreed / max(1, compared)
    return Finding(
        "proposals",
        f"{share:.1%} as in training",
        "fine" if share > 0.98 else "wrong",
        "serving computes what training computed"
        if share > 0.98
        else "serving computes something else from the same features: the drafter's own cache, "
        "positions or order of inputs differ between forward and propose",
    )


def _shift(read: Sequence[_Read], view: DrafterView) -> Finding:
    """Whether the first level would be right more often if its labels stood elsewhere."""
    drafter: Any = view.drafter
    rates = {}
    for shift in (-1, 0, 1):
        rates[shift] = _first_level(view, [each.anchors(drafter, shift) for each in read])
    best = max(rates, key=lambda shift: rates[shift])
    good = best == 0 or rates[best] < 1.5 * rates[0] + 0.05
    return Finding(
        "shift",
        ", ".join(f"{shift:+d}: {rate:.0%}" for shift, rate in rates.items()),
        "fine" if good else "wrong",
        "level 1 predicts the token it should"
        if good
        else f"level 1 predicts the token {best:+d} places from the one it should: its labels were "
        "shifted in training",
    )


def _vocabulary(read: Sequence[_Read], vocabulary: Tensor) -> Finding:
    answers = torch.cat([each.batch.labels[each.batch.mask] for each in read])
    share = float(torch.isin(answers, vocabulary).float().mean())
    return Finding(
        "draft vocabulary",
        f"{share:.1%} of the answers' tokens",
        "fine" if share > 0.9 else "weak",
        "it can propose nearly everything that the target says"
        if share > 0.9
        else "it cannot propose the rest: choose a larger vocabulary, or train on such texts",
    )


def _acceptance(
    read: Sequence[_Read],
    view: DrafterView,
    config: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    decoder: Decoder,
    stop: Stop,
) -> Iterator[Finding]:
    """Accuracy here against held-out accuracy; then decoding for real."""
    drafter: Any = view.drafter
    here = _first_level(view, [each.anchors(drafter) for each in read])
    then = config["trained"]["figures"].get("level_1")
    low = then is not None and here < 0.6 * then
    yield Finding(
        "accuracy of level 1",
        f"{here:.1%}" + ("" if then is None else f", held-out {then:.1%}"),
        "weak" if low or here < 0.2 else "fine",
        "these prompts are of another kind than it was trained on: add such prompts to the training"
        if low
        else "it has learned little: train longer, or on more of the target's own answers"
        if here < 0.2
        else "it predicts here as well as on its held-out rows",
    )
    same = [_answer(decoder, prompt, stop) for prompt in prompts] == list(answers)
    tau = decoder.counter.tau
    yield Finding(
        "output",
        f"{'identical' if same else 'different'}, tau {tau:.2f}",
        "fine" if same and tau > 1.3 else "weak" if same else "wrong",
        f"{tau:.2f} tokens a verification, and exactly the target's own"
        if same
        else "the answers differ from plain decoding: near ties in a low precision, or a fault "
        "of the tree or the verifier; try float32",
    )


def _first_level(view: DrafterView, anchors: Sequence[Batch]) -> float:
    """How often the likeliest token of level 1 was the one that followed."""
    drafter: Any = view.drafter
    drafted = measure_drafts(lambda batch: view(drafter, batch)[0], anchors, 1, 512)
    return drafted.means()["level_1"]


def _answer(decoder: Decoder, prompt: Sequence[int], stop: Stop) -> list[int]:
    ids = torch.tensor([prompt], device=decoder.session.model.device)
    return decoder.generate(ids, torch.ones_like(ids), stop)[0]
