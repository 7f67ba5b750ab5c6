"""The extension point of data: a source of examples, and what it may carry.

As those of `kdcore.method.protocols`, it is structural: a plugin need not import this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from torch import Generator

    from kdcore.method.records import Row

Augmentation: TypeAlias = "Callable[[Row, Generator], Row]"
"""Draws a view of a row; all randomness is the generator's."""


class Compact(Protocol):
    """A smaller form of rows, in which they lie on disk; ``restore(shrink(row))`` is the row."""

    def shrink(self, row: Row) -> Row:
        """The row with smaller inputs, under the same names."""

    def restore(self, row: Row) -> Row:
        """The row of its smaller form, to the bit."""


class ExampleStream(Protocol):
    """The examples of a source that are never all there; the names are those of datasets.

    Attributes:
        window: Number of successive examples that training shuffles together.
    """

    window: int

    def __iter__(self) -> Iterator[Any]:
        """Read one pass over the data, from the state of the stream to its end."""

    def state_dict(self) -> dict[str, Any]:
        """The place of the next example, as plain data."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin at a place."""


@runtime_checkable
class DataSource(Protocol):
    """Examples, and how one becomes a `Row`.

    A source may carry ``model_class`` (str): the transformers class its rows are for, if not
    AutoModelForCausalLM; ``classes`` (list of str): a classifier's labels in their order; and a
    static method ``recognise(path)`` for `kdcore init --data`: the params that read a file, without
    its path, {} if the defaults do, or None if the source does not read such files. With
    ``multi_label = True`` a row has a position for each label, whose value is 0 or 1.

    A source may carry ``augmentation`` (`Augmentation` or None): training then sees a view of each
    row that it draws anew in each epoch; labels, mask and id stay. Teacher and student see the same
    view. Held-out rows stay as they are, and a run that would read views from a cache is refused.

    A source of images may carry ``image_processor`` (mapping or None): how it makes them, in the
    fields of transformers' CLIPImageProcessor. It is saved with the student, and compared with what
    the models' own files say.

    A source may have a method ``fingerprint() -> str | None``, which tells all that its examples
    and its ``encode`` depend on beside the tokenizer (digests of files, params, a version of its
    code) without reading the examples. Rows are then encoded once, and later runs find them.
    Without it, or if it returns None, each process encodes the rows again and keeps them in memory.
    It may carry ``compact`` (`Compact` or None): the form in which these rows lie on disk.

    A source may have a method ``stream() -> ExampleStream | None``: training then reads the
    examples while it runs. It costs nothing before the stream is read. ``read`` of such a source
    raises UserError, so that nothing else takes a part of the data for all of it.
    """

    def read(self) -> Sequence[Any]:
        """All examples, in a fixed order; those of language models are conversations.

        See `kdcore.data.conversation.Conversation`. The sequence may read an example when it is
        asked for, as `kdcore.data.encoded.examples` does.
        """

    def encode(self, example: Any, tokenizer: Any, max_length: int) -> Row:
        """Tokenise, shift and mask one example. The processor is an image model's tokenizer."""
