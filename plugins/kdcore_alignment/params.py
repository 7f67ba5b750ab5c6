"""Parameters of the methods."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kdcore import Params
from kdcore.specs.parts.fields import MOST_WIDE

StateNumber = Annotated[int, Field(ge=-MOST_WIDE, le=MOST_WIDE)]


class ULD(Params):
    """Parameters of the uld splitter."""

    merge: Literal["none", "product", "rest"] = Field(
        default="none",
        description="how the other tokens of a span count (method.alignment: spans or "
        "spans_last). none: nothing; product: the probabilities are multiplied by that of the "
        "other tokens, as GOLD does, so that their sum is below 1 (for total_variation); rest: "
        "likewise, and the missing probability is one more class (for any divergence)",
    )


class Gold(Params):
    """Parameters of the gold splitter."""

    merge: Literal["none", "product"] = Field(
        default="product",
        description="how the other tokens of a span count (method.alignment: spans or "
        "spans_last). product: the probabilities are multiplied by that of the other tokens; none: "
        "nothing",
    )
    adaptive: bool = Field(
        default=True,
        description="whether the part shared is weighed by the share of the teacher's classes that "
        "both models have, and the part own by the rest; false: by 1 each",
    )


class Hidden(Params):
    """Parameters of the hidden matcher."""

    pairs: list[tuple[StateNumber, StateNumber]] | None = Field(
        default=None,
        min_length=1,
        description="pairs of a student's and a teacher's hidden state: 0 is the embedding, i the "
        "output of layer i, and -1 the last one, after the final norm. null compares each state of "
        "the student with the teacher's at the same relative depth",
    )
    distance: Literal["mse", "smooth_l1", "cosine"] = Field(
        default="mse",
        description="distance of two hidden states: mse and smooth_l1 are means over the width, "
        "cosine is 1 - cos",
    )
    projection: Literal["always", "where_needed", "never"] = Field(
        default="where_needed",
        description="whether a linear map is learned from the student's hidden states to the "
        "teacher's width; where_needed: if the widths differ",
    )
    shared: bool = Field(
        default=True,
        description="whether all pairs have one projection, as in TinyBERT, or one each",
    )


class Attention(Params):
    """Parameters of the attention matcher."""

    pairs: list[tuple[StateNumber, StateNumber]] | None = Field(
        default=[(-1, -1)],
        min_length=1,
        description="pairs of a student's and a teacher's layer, counted from 1; -1 is the last. "
        "null compares each layer of the student with the teacher's at the same relative depth",
    )
    distance: Literal["kl", "mse", "mse_of_scores"] = Field(
        default="kl",
        description="distance of two maps, the mean over heads of: kl, KL(teacher || student) over "
        "the keys; mse, the mean square of the differences of the weights over the visible keys; "
        "mse_of_scores, the same of the scores before the softmax",
    )
    maps: Literal["attention", "values"] = Field(
        default="attention",
        description="maps that are compared: attention (of queries and keys), or values (MiniLM's "
        "relations of the values with one another)",
    )
    heads: Literal["each", "groups", "mean"] = Field(
        default="each",
        description="heads that are compared. each: head i with head i, for equal numbers; groups: "
        "the model with k times as many heads has the mean over each k successive ones; mean: the "
        "mean over all heads",
    )
