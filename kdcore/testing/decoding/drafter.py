"""The conformance suite of drafters, bound to a tiny Llama."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore.components.construction import BuildContext
from kdcore.data.batching.anchors import at_anchors, known
from kdcore.data.rows import batch_of
from kdcore.decoding.loop import Decoder, Stop
from kdcore.decoding.protocols import CompiledDrafter, TrainedDrafter
from kdcore.decoding.session import Session
from kdcore.decoding.tree import DraftTree, Verdict, walk
from kdcore.method.logits import HiddenLogits, TeacherLogits
from kdcore.testing.decoding import tiny_target
from kdcore.testing.decoding.compiled_passes import EagerEngine
from kdcore.testing.decoding.draft_trees import (
    assert_alike,
    assert_form,
    assert_shape,
    assert_siblings_distinct,
    p_value,
    row_of,
)
from kdcore.testing.decoding.tiny_target import CLASSES, COUNT, LAYERS, PROMPTS
from kdcore.testing.suite import Suite, same, same_global_random
from kdcore.training.views import DrafterView

ROUNDS = ((10, 0, 11), (1, 4, 0), (3, 0, 1), (0, 2, 2))
"""Numbers of tokens that three rows commit in each call of ``propose``."""
DRAWS, ROWS = 8, 512
LEAST = 1e-6
"""Minimum p-value of a fit; the draws are seeded, so the result is deterministic."""


class DrafterSuite(Suite):
    """The checks of a `Drafter`.

    Any model that its params name is a tiny one. A subclass may override ``bound`` to load weights;
    initial weights come from torch's global generator, which is seeded.
    """

    kind = "drafter"

    def context(self) -> BuildContext:
        """Return a build context with tiny models only."""
        return tiny_target.Offline(self._registry)

    def bound(self) -> Any:
        """Build a new drafter, and bind it to a new target."""
        with same_global_random():
            drafter = self.component()
            drafter.bind(tiny_target.target(), tiny_target.tokenizer())
        return drafter

    def test_greedy_decoding_with_it_says_what_the_target_says(self) -> None:
        """Greedy decoding equals the target's, for single rows and for rows of unequal length.

        A bad draft costs only speed. A wrong mask of the tree, or a changed target, makes the
        output wrong.
        """
        for rows, end in (*(([row], ()) for row in (*PROMPTS, [7])), (PROMPTS, tiny_target.ends())):
            expected = [
                tiny_target.up_to_end(tiny_target.following(tuple(row)), end) for row in rows
            ]
            with same_global_random():
                drafter, model = self.component(), tiny_target.target()
                drafter.bind(model, tiny_target.tokenizer())
                decoder = Decoder(model, drafter, _Greedy())
                found = decoder.generate(*tiny_target.padded(rows), Stop(COUNT, end), generator())
            assert found == expected, f"after {rows}: {found}, but the target alone: {expected}"

    def test_the_layers_it_reads_are_the_targets(self) -> None:
        """``layers`` are indices of hidden states: the embeddings, then one for each layer."""
        layers = self.bound().layers
        assert isinstance(layers, tuple), f"layers are {layers!r}, not a tuple"
        assert all(0 <= layer <= LAYERS for layer in layers), f"layers {layers} of {LAYERS}"

    def test_parents_come_before_children(self) -> None:
        """The pass that scores a tree and the walk down it read the nodes in their order."""
        for tree, _ in self.rounds():
            assert_shape(tree)

    def test_siblings_are_distinct(self) -> None:
        """A verifier would count equal siblings as two candidates."""
        for tree, _ in self.rounds():
            assert_siblings_distinct(tree)

    def test_a_draft_has_the_form_of_its_record(self) -> None:
        """Dtypes, sizes and tokens are right, and no node is below padding."""
        for tree, _ in self.rounds():
            assert_form(tree, len(PROMPTS), CLASSES)

    def test_a_row_without_new_tokens_proposes_nothing(self) -> None:
        """Such a row has finished, or its prompt is a single token."""
        for (tree, _), lengths in zip(self.rounds(), ROUNDS, strict=True):
            silent = torch.tensor(lengths) == 0
            assert not tree.mask[silent].any(), f"lengths {lengths}, mask {tree.mask.tolist()}"

    def test_a_draft_depends_on_the_committed_tokens_alone(self) -> None:
        """A row gets the same draft whether its tokens arrive in pieces or at once.

        Earlier drafts, accepted or rejected, must not remain in the drafter's cache.
        """
        for prompt in (PROMPTS[0], PROMPTS[2]):
            row = [*prompt, *tiny_target.following(tuple(prompt))]
            drafter, end = self.bound(), len(prompt)
            self.read(drafter, [row], [1], [end])
            for count in (1, 3, 1, 5):
                tree = self.read(drafter, [row], [end], [end + count], starts=False)
                end += count
                assert_alike(row_of(tree, 0), self.alone(row[:end]), "read in pieces and at once")

    def test_rows_do_not_see_each_other(self) -> None:
        """A row gets the same draft in a padded batch as alone."""
        for tree, so_far in self.rounds():
            for row, tokens in enumerate(so_far):
                if tokens:
                    assert_alike(row_of(tree, row), self.alone(tokens), f"row {row} differs alone")

    def test_start_forgets(self) -> None:
        """After ``start``, a used drafter drafts like a new one."""
        drafter = self.bound()
        for rows in ([*PROMPTS], [PROMPTS[2]], [PROMPTS[0]]):
            tree = self.read(drafter, rows, [1] * len(rows), [len(row) for row in rows])
            for row, tokens in enumerate(rows):
                assert_alike(row_of(tree, row), self.alone(tokens), "a used and a new drafter")

    def test_randomness_comes_from_the_generator_alone(self) -> None:
        """The same seed gives the same draft, whatever the state of the global generators."""
        row = PROMPTS[0]
        drafts = []
        for seed in (1, 2):
            drafter = self.bound()
            with same_global_random(seed):
                drafts.append(self.read(drafter, [row], [1], [len(row)]).tokens)
        same(drafts[0], drafts[1], "the drafter uses another generator")

    def test_without_a_generator_it_draws_from_torchs_own(self) -> None:
        """``generate`` of transformers does not pass a generator."""
        drafter, row = self.bound(), PROMPTS[0]
        features = _features(tuple(row), tuple(drafter.layers))[None, : len(row) - 1]
        with torch.no_grad(), same_global_random():
            drafter.start(torch.tensor(row[:1]))
            told = torch.tensor([row[1:]]), features, torch.tensor([len(row) - 1])
            assert_form(drafter.propose(*told, None), 1, CLASSES)

    def test_tokens_are_drawn_from_what_logp_says(self) -> None:
        """Sampled tokens follow ``logp``, which a verifier relies on; skipped if it is None."""
        drafter, row = self.bound(), PROMPTS[0]
        logp = self.read(drafter, [row], [1], [len(row)]).logp
        if logp is None:
            return
        random, drawn = generator(), torch.zeros(CLASSES)
        for _ in range(DRAWS):
            tree = self.read(drafter, [row] * ROWS, [1] * ROWS, [len(row)] * ROWS, random)
            drawn += torch.bincount(tree.tokens[:, 0], minlength=CLASSES)
        chances = logp[0, 0].double().softmax(-1)
        fit = p_value(dict(enumerate(drawn.tolist())), dict(enumerate(chances.tolist())))
        assert fit > LEAST, f"{DRAWS * ROWS} first tokens do not fit their logp: p = {fit:.2g}"

    def test_an_engine_drafts_what_torch_drafts(self) -> None:
        """A drafter that an engine can run proposes the same there, and in torch afterwards."""
        drafter = self.bound()
        if not isinstance(drafter, CompiledDrafter):
            return
        expected = self.rounds()
        for engine in (EagerEngine(), None):
            drafter.use_engine(engine)
            for (tree, _), (plain, _) in zip(self.rounds(drafter), expected, strict=True):
                assert torch.equal(tree.mask, plain.mask), f"other nodes with {engine}"
                for row in tree.mask.any(1).nonzero().flatten().tolist():
                    otherwise = f"drafts with {engine} and in torch"
                    assert_alike(row_of(tree, row), row_of(plain, row), otherwise)

    def test_training_reaches_all_its_weights_and_leaves_the_target_alone(self) -> None:
        """The loss falls, too; a drafter without weights is not trained."""
        with same_global_random():
            drafter, target = self.component(), tiny_target.target()
            target.requires_grad_(False)
            drafter.bind(target, tiny_target.tokenizer())
            if isinstance(drafter, TrainedDrafter):
                assert_it_learns(drafter, target)

    def read(
        self,
        drafter: Any,
        rows: Sequence[Sequence[int]],
        begin: Sequence[int],
        end: Sequence[int],
        random: torch.Generator | None = None,
        starts: bool = True,
    ) -> DraftTree:
        """Pass tokens of each row to a drafter, and return its proposals.

        Args:
            drafter: The drafter.
            rows: The tokens of each row.
            begin: The index of each row's first new token.
            end: The index after each row's last new token.
            random: The generator (default: a seeded one).
            starts: Whether the rows are new; ``begin`` is then 1.

        Returns:
            The draft tree.
        """
        width = max(1, *(stop - start for start, stop in zip(begin, end, strict=True)))
        tokens = torch.full((len(rows), width), 5)  # padding looks like any token
        features = []
        for index, (row, start, stop) in enumerate(zip(rows, begin, end, strict=True)):
            tokens[index, : stop - start] = torch.tensor(row[start:stop], dtype=torch.int64)
            heard = _features(tuple(row), tuple(drafter.layers))[start - 1 : stop - 1]
            noise = torch.full((width - len(heard), heard.shape[1]), 7.0)
            features.append(torch.cat([heard, noise]))
        with torch.no_grad():
            if starts:
                drafter.start(torch.tensor([row[0] for row in rows]))
            lengths = torch.tensor(end) - torch.tensor(begin)
            given = random or generator()
            tree: DraftTree = drafter.propose(tokens, torch.stack(features), lengths, given)
        return tree

    def rounds(self, drafter: Any = None) -> list[tuple[DraftTree, list[list[int]]]]:
        """Draft for three rows in several rounds.

        Args:
            drafter: The drafter (default: a new one).

        Returns:
            For each round the tree and each row's tokens so far; a row without new tokens is empty.
        """
        drafter, drafts = drafter or self.bound(), []
        rows = [[*prompt, *tiny_target.following(tuple(prompt))] for prompt in PROMPTS]
        begin = [1] * len(rows)
        for number, counts in enumerate(ROUNDS):
            end = [start + count for start, count in zip(begin, counts, strict=True)]
            tree = self.read(drafter, rows, begin, end, starts=number == 0)
            so_far = [
                row[:stop] if stop > start else []
                for row, start, stop in zip(rows, begin, end, strict=True)
            ]
            drafts.append((tree, so_far))
            begin = end
        return drafts

    def alone(self, row: Sequence[int]) -> list[tuple[int, ...]] | Tensor:
        """Return the proposals of a new drafter that gets the whole row at once."""
        return row_of(self.read(self.bound(), [row], [1], [len(row)]), 0)

    def observe(self, component: Any, step: int) -> list[Tensor]:
        """Draft after the step's prompt."""
        with same_global_random():
            component.bind(tiny_target.target(), tiny_target.tokenizer())
            row = PROMPTS[step % len(PROMPTS)]
            tree = self.read(component, [row], [1], [len(row)])
        return [tree.tokens, tree.mask, tree.shape.parents]


class _Greedy:
    """A greedy verifier."""

    lossless = greedy = True

    def __call__(
        self, tree: DraftTree, logp: Callable[[Tensor], Tensor], generator: torch.Generator | None
    ) -> Verdict:
        return walk(tree, lambda slot: logp(slot[:, None]).squeeze(1).argmax(-1))


def generator() -> torch.Generator:
    """Return a generator that is seeded equally at each call."""
    return torch.Generator().manual_seed(3)


@functools.cache
def _features(row: tuple[int, ...], layers: tuple[int, ...]) -> Tensor:
    """The target's features [T, F] after each token of a row."""
    session = Session(tiny_target.target(), layers)
    session.start(1)
    with torch.no_grad():
        _, features = session.extend(torch.tensor([row]), torch.tensor([len(row)]))
    return features[0]


TRAINING_STEPS, RATE = 12, 3e-3
"""Optimizer steps and learning rate of a drafter's training."""


def assert_it_learns(drafter: Any, target: Any) -> None:
    """Train a drafter by a few steps of Adam, and assert that it learns and the target does not.

    The loss is the forward KL from the target, at all anchors of a few rows and at all levels.

    Args:
        drafter: The drafter, bound to the target.
        target: The target, whose parameters do not require gradient.
    """
    assert_nothing_is_shared(drafter, target)
    padded, counts = _rows()
    drafter.choose_vocabulary(counts)
    batch = batch_of(known(at_anchors(padded, drafter.depth, drafter.vocabulary)))
    view = DrafterView(target, drafter)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    learned = {name: each for name, each in drafter.named_parameters() if each.requires_grad}
    assert learned, "the drafter has no trainable parameters"
    optimizer = torch.optim.Adam(learned.values(), RATE)
    unreached, losses = set(learned), []
    drafter.train()
    for _ in range(TRAINING_STEPS):
        loss = _divergence(*view(drafter, batch))
        losses.append(float(loss.detach()))
        assert loss.requires_grad, "the loss does not depend on the drafter's weights"
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        unreached -= {
            name for name, each in learned.items() if each.grad is not None and each.grad.any()
        }
        optimizer.step()
    assert not unreached, f"these weights get no gradient: {', '.join(sorted(unreached))}"
    assert losses[-1] < losses[0], f"the loss does not fall in {TRAINING_STEPS} steps: {losses}"
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name]), f"the training changed the target's {name}"


def assert_nothing_is_shared(drafter: Any, target: Any) -> None:
    """Assert that the drafter neither stores nor trains weights of the target."""
    theirs = {each.data_ptr(): name for name, each in target.named_parameters()}
    for name, each in drafter.state_dict().items():
        other = theirs.get(each.data_ptr())
        assert other is None, f"the drafter stores the target's {other} as {name}"
    trainable = [name for name, each in target.named_parameters() if each.requires_grad]
    assert not trainable, f"the drafter makes the target's {', '.join(trainable)} trainable"


def _rows() -> tuple[dict[str, Tensor], Tensor]:
    """Prompts with the target's continuations, right-padded, and the count of each label [V]."""
    rows = [torch.tensor([*prompt, *tiny_target.following(tuple(prompt))]) for prompt in PROMPTS]
    whole = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=5)
    lengths = torch.tensor([[len(row)] for row in rows])
    real = torch.arange(whole.shape[1]) < lengths
    padded = {
        "input_ids": whole[:, :-1],
        "attention_mask": real[:, :-1].long(),
        "labels": whole[:, 1:],
        "mask": real[:, 1:],
        "index": torch.arange(len(rows)),
    }
    return padded, torch.bincount(whole[:, 1:][real[:, 1:]], minlength=CLASSES)


def _divergence(drafted: HiddenLogits, target: TeacherLogits) -> Tensor:
    """The mean forward KL in nats."""
    every = slice(None)
    student = drafted.from_linear(drafted.head.linear(drafted.hidden)).log_softmax(-1)
    teacher = target.logits(every).log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")
