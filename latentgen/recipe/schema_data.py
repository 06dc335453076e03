"""The section `data` of a recipe: where pictures and captions come from, how they are cut, and what is kept of them."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from latentgen.recipe.schema_section import Section

Kind = Literal["shapes", "folder", "table", "shards", "datasets"]


class Tags(Section):
    """Captions that are lists of tags: what is drawn anew each time one is shown."""

    separator: str = Field(default=",", min_length=1, description="what stands between two tags")
    shuffle: bool = Field(default=False, description="tags stand in another order each time")
    keep: int = Field(default=0, ge=0, description="so many tags at the beginning stay where they are, and stay")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the other tags that are left out")


class Part(Section):
    """One source of a mixture. What is not given is as in the section `data`."""

    source: Kind = "folder"
    path: str | None = Field(default=None, description="as data.path")
    split: str | None = Field(default=None, description="as data.split")
    caption: str | None = Field(default=None, description="as data.caption (null: that one)")
    size: int | None = Field(default=None, ge=1, description="as data.size")
    share: float = Field(default=1.0, gt=0, description="how much of an epoch it is; only ratios count")
    weight: float = Field(default=1.0, gt=0, description="what its examples count in the loss")


class Data(Section):
    """Where pictures and captions come from, and how they are cut."""

    source: Literal["shapes", "folder", "table", "shards", "datasets", "mixture"] = Field(
        default="shapes",
        description="the procedural world; a folder of pictures; a csv, jsonl or parquet table; WebDataset tar shards; "
        "Hugging Face datasets; several of these",
    )
    path: str | None = Field(
        default=None,
        description="folder; table; shards, as train-{00000..00009}.tar, here or at http(s)://, s3://, gs://; name or "
        "folder of a data set",
    )
    split: str | None = Field(
        default=None, description="subfolder (train, validation), split of a data set, or part of the shapes world"
    )
    subset: str | None = Field(default=None, description="configuration of a data set that has several")
    streaming: bool = Field(default=False, description="read a data set piece by piece; it need not fit on the disk")
    mixture: tuple[Part, ...] = Field(default=(), description="sources and their shares (source: mixture)")
    image_column: str | None = Field(
        default=None, description="column of a table or data set with pictures or their files (null: the usual names)"
    )
    caption_columns: tuple[str, ...] = Field(
        default=("text", "caption", "captions", "prompt"),
        min_length=1,
        description="columns, or keys of JSON, that hold captions; all that are there are used",
    )
    resolution: int = Field(
        default=64, ge=16, description="side of the training picture, in pixels; with `buckets`, of as large a square"
    )
    crop: Literal["center", "random", "stretch"] = Field(
        default="center",
        description="what is kept of a picture of another shape; random: another part each time, no latents are kept",
    )
    buckets: int | None = Field(
        default=None,
        ge=1,
        description="train on at most so many shapes, chosen so that least of the pictures is cut off (null: squares)",
    )
    bucket_step: int = Field(default=64, ge=8, description="sides of these shapes are multiples of it")
    max_upscale: float = Field(default=1.5, ge=1, description="warn of pictures that are enlarged by more than this")
    background: str = Field(
        default="white", description="colour behind transparent pixels: white, black, gray, or #rrggbb"
    )
    max_pixels: int = Field(default=120_000_000, ge=1, description="pictures with more pixels are left out")
    broken_share: float = Field(
        default=0.5, ge=0, le=1, description="stop when a larger share of the pictures cannot be used"
    )
    mask: Literal["alpha", "beside"] | None = Field(
        default=None,
        description="weigh pixels in the loss by a picture's opacity, or by NAME.mask.png beside NAME.png",
    )
    mask_floor: float = Field(default=0.0, ge=0, le=1, description="what a pixel counts where the mask is black")
    live: bool = Field(
        default=False, description="encode pictures anew in every step; no latents are kept (mirrored ones neither)"
    )
    flip: bool = Field(
        default=False,
        description="show each picture mirrored half of the time (captions that say left or right become untrue)",
    )
    size: int = Field(default=20_000, ge=1, description="examples in the procedural world")
    captions: int | None = Field(default=None, ge=1, description="use at most so many captions an example (null: all)")
    caption: str | None = Field(
        default=None,
        description="caption of pictures for which none is written, such as `a photo of sks dog`; `{caption}` in it "
        "takes those that are",
    )
    prefix: str = Field(default="", description="put before every caption")
    suffix: str = Field(default="", description="put after every caption")
    trigger: str | None = Field(default=None, description="word put before captions that do not have it")
    tags: Tags | None = Field(default=None, description="treat captions as lists of tags (null: as sentences)")
    holdout: int = Field(
        default=64,
        ge=1,
        description="examples to measure on that are not trained on; of pictures at most a tenth, chosen by content, "
        "and none where that is fewer than 8",
    )
    validation: str | None = Field(
        default=None,
        description="pictures to measure on, of the same kind of source (null: `validation` in the folder, else a part "
        "of them)",
    )
    window: int = Field(default=4, ge=1, description="shards (or row groups) that are at hand and shuffled together")
    local: str = Field(default="runs/.shards", description="folder for shards that lie elsewhere")
    local_gib: float = Field(default=20.0, gt=0, description="how large it may become")
    workers: int = Field(default=0, ge=0, description="processes that read pictures (0: the training process itself)")
    cache: str = Field(
        default="runs/.cache", description="folder of cached latents and text states, shared by all runs"
    )

    @field_validator("background")
    @classmethod
    def _a_colour(cls, value: str) -> str:
        if value not in COLOURS and not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
            raise ValueError(f"choose one of {', '.join(COLOURS)}, or #rrggbb")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if self.source not in ("shapes", "mixture") and not self.path:
            raise ValueError("path: say where the pictures are (data.path=my_pictures)")
        if self.buckets is not None and self.bucket_step > self.resolution:
            raise ValueError(
                f"bucket_step: {self.bucket_step} is larger than data.resolution, {self.resolution}: no shape fits; "
                "lower it"
            )
        if (self.source == "mixture") != bool(self.mixture):
            raise ValueError("mixture: list its sources, and say data.source: mixture")
        for number, part in enumerate(self.mixture):
            if part.source != "shapes" and not part.path:
                raise ValueError(f"mixture.{number}.path: say where its pictures are")
        return self

    def keeps_latents(self) -> bool:
        """Whether latents are made once; else pictures are encoded anew in each step."""
        return not self.live and self.crop != "random"

    def colour(self) -> tuple[int, int, int]:
        """The background, red, green and blue from 0 to 255."""
        text = COLOURS.get(self.background, self.background)
        return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)

    def parts(self) -> tuple[Data, ...]:
        """The sources of a mixture, each as a section of its own; of another source itself."""
        if self.source != "mixture":
            return (self,)
        own = ({k: v for k, v in part.model_dump().items() if k not in ("share", "weight")} for part in self.mixture)
        given = ({k: v for k, v in values.items() if v is not None} for values in own)
        blank = {"path": None, "split": None, "mixture": (), "validation": None}
        return tuple(self.model_copy(update={**blank, **values}) for values in given)


COLOURS = {"white": "#ffffff", "black": "#000000", "gray": "#808080"}
