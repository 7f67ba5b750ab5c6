"""Diagnosis of a drafter whose proposals are rejected: training and serving are compared.

A drafter that trains well but whose proposals are rejected often gets other inputs in serving than
in training: other layers, another norm, tokens shifted by one, another template or target. So the
target's answers are read twice, in one pass as in training and in pieces as in serving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from kdcore.components.choice import Choice
from kdcore.components.registry import Registry
from kdcore.decoding.build import bound_engine, greedy_decoder
from kdcore.decoding.drafters.files import differences, load_drafter, read_config, template_digest
from kdcore.decoding.engines.protocols import Engine
from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.session import Session
from kdcore.decoding.tree import DraftTree
from kdcore.evaluation.drafts import feature_rms
from kdcore.method.records import Batch
from kdcore.models.assembly import Assembly
from kdcore.models.facts import end_ids
from kdcore.models.loading.loaded import LoadedModel
from kdcore.training.views import DrafterView

EQUAL = 1e-3
"""Maximum difference between features read in one pass and in pieces, relative to their size."""
ROUNDED = 8
"""The same for a target in a lower precision, in units of its machine epsilon."""

Verdict = Literal["fine", "weak", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        check: The name of the check.
        found: The measured value.
        verdict: ``fine``, ``weak`` or ``wrong``.
        words: The conclusion, in a sentence.
    """

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
    choice: Choice | None = None,
    note: Callable[[str], None] | None = None,
) -> list[Finding]:
    """Run all checks, in the order in which each explains the next.

    Args:
        folder: The drafter's folder.
        target: The target model.
        prompts: The prompts' token ids, at least two tokens each.
        registry: The components.
        max_new_tokens: Maximum number of tokens per answer.
        choice: The engine that serves, or None for the machine's default.
        note: A function that shows a line, such as the reason why the default engine is not used.

    Returns:
        The findings; only those on the target if it is the wrong one.

    Raises:
        UserError: The folder is not a drafter's, or the chosen engine cannot run the target.
    """
    config = read_config(folder)
    findings = list(_identity(config, target))
    if any(each.verdict == "wrong" for each in findings):
        return findings
    drafter: Any = load_drafter(folder, target, registry)
    view = DrafterView(target.model, drafter)
    # all of serving runs the target by one engine, so that answers can be compared
    engine = bound_engine(target, drafter.layers, choice, registry, note)
    nothing = Choice("drafter", "nothing", registry.component("drafter", "nothing").params())
    plain = greedy_decoder(target, Assembly(registry).build(nothing), registry, engine)
    stop = Stop(max_new_tokens, tuple(end_ids(target)))
    answers = [_answer(plain, prompt, stop) for prompt in prompts]
    read = [_Read.of(prompt, answer, view) for prompt, answer in zip(prompts, answers, strict=True)]
    findings.append(_features(read, target, drafter, engine))
    if config["trained"]["feature_rms"]:  # unknown for an imported drafter
        findings.append(_size(read, config))
    findings.append(_proposals(read, target, drafter))
    findings.append(_shift(read))
    if drafter.vocabulary is not None:
        findings.append(_vocabulary(read, drafter.vocabulary))
    drafting = greedy_decoder(target, drafter, registry, engine)
    findings += _acceptance(read, config, prompts, answers, drafting, stop)
    return findings


@dataclass(frozen=True, slots=True)
class _Read:
    """An answer, read in one pass as in training.

    Attributes:
        batch: Inputs, labels and mask [1, T].
        features: The target's features [1, T, F].
        begin: The prompt's length.
        likeliest: Level 1's likeliest token after each anchor [1, T].
    """

    batch: Batch
    features: Tensor
    begin: int
    likeliest: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, prompt: Sequence[int], answer: Sequence[int], view: DrafterView) -> _Read:
        tokens = torch.tensor([[*prompt, *answer]], device=view.target.device)
        inputs = {"input_ids": tokens[:, :-1], "attention_mask": torch.ones_like(tokens[:, :-1])}
        learned = torch.arange(tokens.shape[1] - 1, device=tokens.device) >= len(prompt) - 1
        batch = Batch(inputs, tokens[:, 1:], learned[None], torch.zeros(1, dtype=torch.int64))
        features, drafter = view.read(batch)[0], cast(Any, view.drafter)
        hidden = drafter(tokens[:, :-1], features)[:, :, 0]
        best = drafter.head.finish(drafter.head.linear(hidden)).argmax(-1)
        wanted = best if drafter.vocabulary is None else drafter.vocabulary[best]
        return cls(batch, features, len(prompt), wanted)

    @property
    def tokens(self) -> Tensor:
        return self.batch.inputs["input_ids"]

    def right(self, shift: int = 0) -> Tensor:
        """Whether level 1 is right at each anchor, for labels shifted by ``shift``."""
        labels = self.batch.labels.roll(-shift, 1)
        return (self.likeliest[:, :-1] == labels[:, 1:])[self.batch.mask[:, 1:]]

    def pieces(self) -> list[slice]:
        """The pieces that serving reads: the whole prompt, then one token at a time."""
        ends = range(self.begin, self.tokens.shape[1] + 1)
        return [slice(0, self.begin), *(slice(end - 1, end) for end in ends[1:])]


def _identity(config: dict[str, Any], target: LoadedModel) -> Iterator[Finding]:
    """Compare the target, its tokenizer and its chat template with the drafter's config."""
    differ = differences(config, target)
    trained = config["target"]["name"]
    yield Finding(
        "target",
        ", ".join(differ) or "the same files",
        "wrong" if differ else "fine",
        f"the drafter was trained for {trained}, which is a different model: train a drafter for "
        "this target"
        if differ
        else f"the drafter was trained for this target, {trained}",
    )
    template = config["trained"].get("template")
    if template is None:  # unknown for an imported drafter
        return
    same = template == template_digest(target)
    yield Finding(
        "chat template",
        "the same" if same else "different",
        "fine" if same else "weak",
        "prompts have the same format as in training"
        if same
        else "prompts have another format than in training: serve with the template of training",
    )


@torch.no_grad()
def _features(
    read: Sequence[_Read], target: LoadedModel, drafter: Any, engine: Engine | None
) -> Finding:
    """Compare the features of one pass with those of a session that reads in pieces."""
    worst = 0.0
    for each in read:
        session = Session(target.model, drafter.layers, engine)
        session.start(1)
        pieces = [each.tokens[:, piece] for piece in each.pieces()]
        heard = torch.cat([session.extend(tokens, _length(tokens))[1] for tokens in pieces], 1)
        size = each.features.abs().max().clamp(min=1e-6)
        worst = max(worst, float((heard - each.features).abs().max() / size))
    good = worst < max(EQUAL, ROUNDED * torch.finfo(target.model.dtype).eps)
    return Finding(
        "features",
        f"differ by {worst:.1e} of their size",
        "fine" if good else "wrong",
        "the target returns the same features in training and in serving"
        if good
        else "the session reads other hidden states than training: check layers, norm and dtype",
    )


def _size(read: Sequence[_Read], config: dict[str, Any]) -> Finding:
    """Compare the size of the features with their size in training."""
    whole = torch.cat([each.features[0] for each in read])
    now = feature_rms(whole, len(config["layers"]))
    then = config["trained"]["feature_rms"]
    ratios = [a / b if b else 1.0 for a, b in zip(now, then, strict=True)]
    good = all(0.5 < ratio < 2 for ratio in ratios)
    return Finding(
        "size of the features",
        " ".join(f"{ratio:.2f}" for ratio in ratios) + " times training's",
        "fine" if good else "weak",
        "each layer's features are as large as in training"
        if good
        else "features differ in size: a norm was added or removed, or the text is of another kind",
    )


@torch.no_grad()
def _proposals(read: Sequence[_Read], target: LoadedModel, drafter: Any) -> Finding:
    """Compare the proposals of serving with the likeliest tokens of a training pass."""
    agreed = compared = 0
    for each in read:
        drafter.start(each.tokens[:, 0])
        for piece in each.pieces():
            tokens = each.tokens[:, max(1, piece.start) : piece.stop]
            before = each.features[:, max(1, piece.start) - 1 : piece.stop - 1]
            tree: DraftTree = drafter.propose(tokens, before, _length(tokens), None)
            first = tree.tokens[0, (tree.shape.parents[0] < 0) & tree.mask[0]]
            compared += 1
            agreed += int(bool((first == each.likeliest[0, piece.stop - 2]).any()))
    share = agreed / max(1, compared)
    return Finding(
        "proposals",
        f"{share:.1%} as in training",
        "fine" if share > 0.98 else "wrong",
        "propose and forward agree on the same features"
        if share > 0.98
        else "propose and forward differ on the same features: compare their cache, positions and "
        "order of inputs",
    )


def _shift(read: Sequence[_Read]) -> Finding:
    """Check whether shifted labels would make level 1 more accurate."""
    rates = {shift: _first_level(read, shift) for shift in (-1, 0, 1)}
    best = max(rates, key=lambda shift: rates[shift])
    good = best == 0 or rates[best] < 1.5 * rates[0] + 0.05
    return Finding(
        "shift",
        ", ".join(f"{shift:+d}: {rate:.0%}" for shift, rate in rates.items()),
        "fine" if good else "wrong",
        "level 1 predicts the right position"
        if good
        else f"level 1 predicts the token at an offset of {best:+d}: its labels were shifted in "
        "training",
    )


def _vocabulary(read: Sequence[_Read], vocabulary: Tensor) -> Finding:
    answers = torch.cat([each.batch.labels[each.batch.mask] for each in read])
    share = float(torch.isin(answers, vocabulary).float().mean())
    return Finding(
        "draft vocabulary",
        f"{share:.1%} of the answers' tokens",
        "fine" if share > 0.9 else "weak",
        "the drafter can propose almost all of the target's tokens"
        if share > 0.9
        else "the drafter cannot propose the other tokens: choose a larger vocabulary, or train on "
        "similar texts",
    )


def _acceptance(
    read: Sequence[_Read],
    config: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    decoder: Decoder,
    stop: Stop,
) -> Iterator[Finding]:
    """Compare the accuracy with the held-out accuracy, then decode with the drafter."""
    here = _first_level(read)
    then = config["trained"]["figures"].get("level_1")
    low = then is not None and here < 0.6 * then
    yield Finding(
        "accuracy of level 1",
        f"{here:.1%}" + ("" if then is None else f", held-out {then:.1%}"),
        "weak" if low or here < 0.2 else "fine",
        "these prompts differ from the training's: add similar prompts to the training"
        if low
        else "the drafter has learned little: train longer, or on more of the target's own answers"
        if here < 0.2
        else "the drafter is as accurate as on its held-out rows",
    )
    same = [_answer(decoder, prompt, stop) for prompt in prompts] == list(answers)
    tau = decoder.counter.tau
    yield Finding(
        "output",
        f"{'identical' if same else 'different'}, tau {tau:.2f}",
        "fine" if same and tau > 1.3 else "weak" if same else "wrong",
        f"{tau:.2f} tokens per verification, identical to the target's own"
        if same
        else "the answers differ from plain decoding: try float32, which removes near ties; "
        "otherwise the tree or the verifier is faulty",
    )


def _first_level(read: Sequence[_Read], shift: int = 0) -> float:
    """The accuracy of level 1, with labels shifted by ``shift``."""
    return float(torch.cat([each.right(shift) for each in read]).float().mean())


def _length(tokens: Tensor) -> Tensor:
    """The number of tokens of a single row, as a tensor [1]."""
    return torch.tensor([tokens.shape[1]], device=tokens.device)


def _answer(decoder: Decoder, prompt: Sequence[int], stop: Stop) -> list[int]:
    ids = torch.tensor([prompt], device=decoder.session.model.device)
    return decoder.generate(ids, torch.ones_like(ids), stop)[0]
