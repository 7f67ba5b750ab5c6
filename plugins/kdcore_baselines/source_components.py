"""The data sources, declared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from kdcore import Component, Params, SourceChoice
from kdcore.specs.fields import InputPath


class ChatParams(Params):
    """Conversations, one JSON object a line."""

    path: InputPath = Field(
        description="a .jsonl file of {prompt[, response]}, {messages}, {turns[, reference]}, "
        "{instruction[, input][, output]} or {question, answer}"
    )
    prompt: str | None = Field(None, description="the field that holds the prompt, if another")
    response: str | None = Field(None, description="the field that holds the response, if another")
    limit: PositiveInt | None = Field(None, description="read so many rows, from the first")
    system: str | None = Field(None, description="a system turn for rows that have none")
    template: Literal["chat", "none"] = Field(
        "chat", description="'none' joins prompt and response as they are, for base models"
    )


def _an_interval(part: tuple[float, float]) -> tuple[float, float]:
    if part[0] >= part[1]:
        raise ValueError("needs two rising numbers: [0, 0.9] is the first nine tenths")
    return part


Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[tuple[Share, Share], AfterValidator(_an_interval)]


class LabelledTextParams(Params):
    """Texts with one label each."""

    path: InputPath = Field(description="a .csv file with a header")
    text: str = Field("text", description="the column that holds the text")
    label: str = Field("label", description="the column that holds the label")
    classes_from: InputPath | None = Field(
        None, description="the .csv file whose labels are the classes, if another (the train split)"
    )
    part: Part = Field(
        (0.0, 1.0),
        description="read this interval of each label's rows, in a fixed shuffle: [0, 0.9] to "
        "train on and [0.9, 1] to hold out share no row",
    )
    limit: PositiveInt | None = Field(None, description="read so many rows, from the first")


class DigitsParams(Params):
    """The 1,797 images of digits that scikit-learn ships."""

    split: Literal["train", "validation", "test"] = Field(
        "train", description="50 %, 20 % or 30 % of each digit's images, in a fixed shuffle"
    )
    limit: PositiveInt | None = Field(None, description="read so many rows, from the first")


class SeveralParams(Params):
    """Sources one after the other."""

    sources: list[SourceChoice] = Field(min_length=1, description="of one kind of rows")


SOURCES = [
    Component(
        kind="source",
        name="chat",
        build="kdcore_baselines.sources:ChatSource",
        summary="prompts and conversations of a .jsonl file, in the shapes that are common",
        source="file format of this project",
        params=ChatParams,
    ),
    Component(
        kind="source",
        name="labelled_text",
        build="kdcore_baselines.sources:LabelledTextSource",
        summary="texts of a .csv file with a label each, for classifiers",
        source="file format of this project",
        params=LabelledTextParams,
    ),
    Component(
        kind="source",
        name="several",
        build="kdcore_baselines.sources:SeveralSources",
        summary="the rows of several sources, one after the other",
        source="ours",
        params=SeveralParams,
    ),
    Component(
        kind="source",
        name="digits",
        build="kdcore_baselines.digits:DigitsSource",
        summary="8x8 images of handwritten digits, for small image classifiers",
        source="scikit-learn's load_digits (UCI Optical Recognition of Handwritten Digits)",
        params=DigitsParams,
    ),
]
