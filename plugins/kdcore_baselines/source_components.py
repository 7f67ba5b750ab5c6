"""The data sources, declared."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from kdcore.choice import Source
from kdcore.hookspecs import Component
from kdcore.specs import InputPath, SpecModel


class ChatParams(SpecModel):
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


class LabelledTextParams(SpecModel):
    """Texts with one label each."""

    path: InputPath = Field(description="a .csv file with a header")
    text: str = Field("text", description="the column that holds the text")
    label: str = Field("label", description="the column that holds the label")
    classes_from: InputPath | None = Field(
        None, description="the .csv file whose labels are the classes, if another (the train split)"
    )
    limit: PositiveInt | None = Field(None, description="read so many rows, from the first")


class SeveralParams(SpecModel):
    """Sources one after the other."""

    sources: list[Source] = Field(min_length=1, description="of one kind of rows")


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
]
