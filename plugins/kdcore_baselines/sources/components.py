"""Declarations of the data sources."""

from __future__ import annotations

import codecs
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from kdcore import Component, Params, SourceChoice
from kdcore.specs.parts.fields import Count, InputPath, PathOrId, Positive


def _an_interval(part: tuple[float, float]) -> tuple[float, float]:
    if part[0] >= part[1]:
        raise ValueError("must be two increasing numbers; [0, 0.9] is the first nine tenths")
    return part


def _known(encoding: str) -> str:
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ValueError("must be an encoding that Python knows, e.g. cp1252") from None
    return encoding


Encoding = Annotated[str, AfterValidator(_known)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[tuple[Share, Share], AfterValidator(_an_interval)]
Pixels = Annotated[int, Field(ge=0, le=1024)]
Side = Annotated[int, Field(gt=0, le=4096)]
WHOLE = (0.0, 1.0)
"""The part that is everything."""


class ConversationParams(Params):
    """Names of the fields of a conversation; without them the usual names are found."""

    prompt: str | None = Field(
        None, description="name of the field with the prompt (default: a usual name)"
    )
    response: str | None = Field(
        None, description="name of the field with the response (default: a usual name)"
    )
    messages: str | None = Field(
        None, description="name of the field with the turns (default: a usual name)"
    )
    text: str | None = Field(
        None,
        description="name of the field with a whole text, e.g. of a corpus, of which every token "
        "but the first is learned, without a chat template",
    )
    role: str | None = Field(
        None, description="name of the field with the role of a turn (default: role or from)"
    )
    content: str | None = Field(
        None, description="name of the field with the text of a turn (default: content or value)"
    )
    roles: dict[str, str] = Field(
        {},
        description="role in the data -> role of the chat template, e.g. {customer: user, agent: "
        "assistant}",
    )
    tools: str | None = Field(
        None, description="name of the field with the tools (default: a usual name)"
    )
    keep: list[str] = Field(
        [],
        description="names of further fields that scores of answers read, e.g. [test, entry_point]",
    )
    teacher: str | None = Field(
        None,
        description="name of the field with the teacher of a row, or with weights "
        "{TEACHER: WEIGHT}, where the spec has several teachers (default: teacher)",
    )
    group: str | None = Field(
        None,
        description="name of the field that rows of one conversation share, for data with one "
        "turn per row; its turns are in the order of the rows",
    )
    tidy: bool = Field(
        False,
        description="tidy up exported chats: join successive turns of one role, and leave out "
        "blank turns, responses before the first prompt, user turns after the last response, and "
        "conversations without a prompt and its response",
    )
    part: Part = Field(
        WHOLE,
        description="interval of the conversations to read, in a fixed shuffle; [0, 0.9] for "
        "training and [0.9, 1] for held-out rows do not overlap, and conversations with the "
        "same prompts are in one part",
    )
    limit: Count | None = Field(None, description="number of conversations to read, from the first")
    system: str | None = Field(None, description="system turn for rows without one")
    template: Literal["chat", "none"] = Field(
        "chat",
        description="chat template of the model (the model's field `template` names another "
        "one), or 'none' to join prompt and response, for base models",
    )

    @model_validator(mode="after")
    def _is_a_text_or_a_conversation(self) -> Self:
        parts = ("prompt", "response", "messages", "group", "system")
        asked = [name for name in parts if getattr(self, name) is not None]
        asked += ["tidy"] * self.tidy + ["part"] * (self.part != WHOLE)
        if self.text is not None and asked:
            raise ValueError(
                f"text reads rows without turns, to which {asked[0]} does not apply: remove one of "
                "them"
            )
        return self


class ChatParams(ConversationParams):
    """Parameters of the chat source, which reads one JSON object per line."""

    path: InputPath = Field(
        description=".jsonl file of {prompt[, response]}, {messages}, {conversations}, "
        "{turns[, reference]}, {instruction[, input][, output]} or {question, answer}, with tools "
        "beside them"
    )


class LoadedParams(Params):
    """What Hugging Face datasets loads."""

    path: PathOrId = Field(
        description="hub id, or local data: a .parquet, .arrow, .json, .jsonl, .csv or .tsv file "
        "(also .gz), a folder of them, or a folder from save_to_disk"
    )
    encoding: Encoding | None = Field(
        None, description="encoding of a .csv file, e.g. cp1252 (default: UTF-8)"
    )
    config: str | None = Field(None, description="configuration of the data set, e.g. main")
    split: str = Field("train", description="split, also a part of it, e.g. train[:90%]")
    revision: str | None = Field(None, description="revision on the hub (branch, tag or commit)")
    streaming: bool = Field(
        False,
        description="read the first `limit` rows without downloading the others; without limit, "
        "training reads the rows while it runs (training.steps)",
    )
    shuffle_buffer: Count = Field(
        1000,
        description="streaming without limit only: number of successive rows that are shuffled "
        "together",
    )

    @property
    def endless(self) -> bool:
        """Whether only a training can read the rows, while it runs."""
        return self.streaming and getattr(self, "limit", None) is None

    @model_validator(mode="after")
    def _reads_a_part(self) -> Self:
        for name in ("part", "group", "tidy"):
            if self.streaming and getattr(self, name, None) not in (None, False, WHOLE):
                raise ValueError(
                    f"streaming does not read all rows, as {name} needs: remove one of them"
                )
        return self


class DatasetParams(ConversationParams, LoadedParams):
    """Parameters of the dataset source."""


CLASSES_SPLIT = Field(
    None,
    description="split whose labels are the classes, for a column without class names "
    "(default: split)",
)
LABELLED_PART = Field(
    WHOLE, description="interval of each label's rows to read, in a fixed shuffle"
)


class LabelledTextParams(Params):
    """Parameters of the labelled_text source."""

    path: InputPath = Field(description=".csv file with a header")
    text: str = Field("text", description="name of the column with the text")
    label: str = Field("label", description="name of the column with the label")
    separator: str | None = Field(
        None,
        min_length=1,
        description="separator of the labels in that column, e.g. ;, for a multi-label classifier "
        "(default: one label in a row)",
    )
    classes_from: InputPath | None = Field(
        None,
        description=".csv file whose labels are the classes, e.g. the train split (default: path)",
    )
    part: Part = Field(
        WHOLE,
        description="interval of each label's rows to read, in a fixed shuffle; [0, 0.9] for "
        "training and [0.9, 1] for held-out rows do not overlap",
    )
    limit: Count | None = Field(None, description="number of rows to read, from the first")


class LabelledDatasetParams(LoadedParams):
    """Parameters of the labelled_dataset source."""

    text: str = Field("text", description="name of the column with the text")
    label: str = Field(
        "label",
        description="name of the column with the label, or with lists of labels for a multi-label "
        "classifier",
    )
    classes_split: str | None = CLASSES_SPLIT
    part: Part = LABELLED_PART
    limit: Count | None = Field(None, description="number of rows to read, from the first")


class AugmentParams(Params):
    """How training sees the images: another view of each in each epoch."""

    crop_padding: Pixels = Field(
        0,
        description="width of a black border from which the image is cropped at a random place; "
        "0 means none, 4 is usual for CIFAR",
    )
    flip: bool = Field(False, description="mirror half of the views")


class AugmentedParams(Params):
    """What all sources of images share."""

    augment: AugmentParams | None = Field(
        None,
        description="random views of the training images, e.g. {crop_padding: 4, flip: true}; "
        "held-out images stay as they are (default: none)",
    )


class PixelParams(AugmentedParams):
    """How an image becomes numbers."""

    channels: Literal[1, 3] = Field(3, description="number of channels: 1 (gray) or 3 (colour)")
    size: Side | None = Field(
        None,
        description="height and width: the shorter side is scaled to it, and the longer one is "
        "cropped around its centre (default: the images' own, which must be the same)",
    )
    resample: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="filter that scales the images"
    )
    mean: list[Share] | None = Field(
        None,
        description="mean of each channel, subtracted from values in [0, 1] (default: 0); check "
        "names that of a trained model",
    )
    std: list[Positive] | None = Field(
        None, description="standard deviation of each channel, by which it is divided (default: 1)"
    )

    @model_validator(mode="after")
    def _normalises_each_channel(self) -> Self:
        for name in ("mean", "std"):
            if len(getattr(self, name) or range(self.channels)) != self.channels:
                raise ValueError(f"{name} must have a number for each of {self.channels} channels")
        return self


class ImageDatasetParams(PixelParams, LoadedParams):
    """Parameters of the image_dataset source."""

    path: PathOrId = Field(
        description="hub id, or local data: a folder with a folder of images for each label, a "
        ".parquet or .arrow file, a folder of them, or a folder from save_to_disk"
    )
    image: str = Field("image", description="name of the column with the images")
    label: str = Field(
        "label",
        description="name of the column with the label, or with lists of labels for a multi-label "
        "classifier",
    )
    classes_split: str | None = CLASSES_SPLIT
    part: Part = LABELLED_PART
    limit: Count | None = Field(None, description="number of rows to read, from the first")


class DigitsParams(AugmentedParams):
    """Parameters of the digits source: the 1,797 images that scikit-learn ships."""

    split: Literal["train", "validation", "test"] = Field(
        "train", description="split: 50 %, 20 % or 30 % of each digit's images, in a fixed shuffle"
    )
    limit: Count | None = Field(None, description="number of rows to read, from the first")


class SeveralParams(Params):
    """Parameters of the several source."""

    sources: list[SourceChoice] = Field(
        min_length=1, description="sources to join, all with the same kind of rows"
    )


SOURCES = [
    Component(
        kind="source",
        name="chat",
        build="kdcore_baselines.sources.files:ChatSource",
        summary="prompts and conversations from a .jsonl file, in the common formats",
        source="file format of this project",
        params=ChatParams,
    ),
    Component(
        kind="source",
        name="dataset",
        build="kdcore_baselines.sources.hub.sources:DatasetSource",
        summary="prompts and conversations from the hub or from local tables, in the formats of "
        "chat",
        source="Hugging Face datasets (needs kdcore[datasets])",
        params=DatasetParams,
    ),
    Component(
        kind="source",
        name="labelled_dataset",
        build="kdcore_baselines.sources.hub.sources:LabelledDatasetSource",
        summary="labelled texts from the hub or from local tables, for classifiers",
        source="Hugging Face datasets (needs kdcore[datasets])",
        params=LabelledDatasetParams,
    ),
    Component(
        kind="source",
        name="image_dataset",
        build="kdcore_baselines.sources.images.dataset:ImageDatasetSource",
        summary="labelled images from the hub or from local data, with augmentation, for image "
        "classifiers",
        source="Hugging Face datasets (needs kdcore[datasets])",
        params=ImageDatasetParams,
    ),
    Component(
        kind="source",
        name="labelled_text",
        build="kdcore_baselines.sources.labelled:LabelledTextSource",
        summary="labelled texts from a .csv file, for classifiers",
        source="file format of this project",
        params=LabelledTextParams,
    ),
    Component(
        kind="source",
        name="several",
        build="kdcore_baselines.sources.files:SeveralSources",
        summary="rows of several sources, concatenated",
        source="ours",
        params=SeveralParams,
    ),
    Component(
        kind="source",
        name="digits",
        build="kdcore_baselines.sources.images.digits:DigitsSource",
        summary="8x8 images of handwritten digits, for small image classifiers",
        source="scikit-learn's load_digits (UCI Optical Recognition of Handwritten Digits)",
        params=DigitsParams,
    ),
]
