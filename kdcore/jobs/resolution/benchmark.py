"""The parts of a bench spec, built; a mistake names the field of its part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

from kdcore.components.registry import Registry
from kdcore.data.conversation import Conversation
from kdcore.decoding.build import build_before_target
from kdcore.errors import in_field, inside
from kdcore.evaluation.speed.turns import encoded, read_questions
from kdcore.models.assembly import Assembly
from kdcore.models.loading.loaded import LoadedModel
from kdcore.specs.bench import PLAIN, BenchSpec
from kdcore.specs.parts.decoding import sampling_at


@contextmanager
def of_method(name: str) -> Iterator[None]:
    """Name the field of a method in the mistakes raised inside; of ``plain``, that of its engine.

    Args:
        name: The method's name.
    """
    place = f"methods.{name}"
    with in_field("engine") if name == PLAIN else in_field(place), inside(place):
        yield


def refuse_methods(spec: BenchSpec, registry: Registry) -> None:
    """Check each method at each temperature, without the target.

    Args:
        spec: The bench spec.
        registry: The components that the spec may name.

    Raises:
        UserError: The parts of a method do not fit together.
    """
    for temperature, (name, drafting) in product(spec.temperatures, spec.methods.items()):
        with of_method(name):
            build_before_target(drafting, sampling_at(temperature), registry)


def read_sets(
    spec: BenchSpec, target: LoadedModel, assembly: Assembly
) -> tuple[dict[str, list[Conversation]], dict[str, list[list[int]]]]:
    """Read the task sets.

    Args:
        spec: The bench spec.
        target: The target, whose tokenizer encodes the prompts.
        assembly: Builds components.

    Returns:
        Task set -> its rows without responses, and task set -> the prompts of their first turns.

    Raises:
        UserError: A set cannot be read, or a prompt leaves no room in the target's context.
    """
    questions: dict[str, list[Conversation]] = {}
    for name, choice in spec.sets.items():
        with in_field(f"sets.{name}"):
            questions[name] = read_questions(assembly.build(choice), name, spec)
    prompts: dict[str, list[list[int]]] = {}
    for name, rows in questions.items():
        with in_field(f"sets.{name}"):
            prompts[name] = encoded(rows, name, spec, target)
    return questions, prompts
