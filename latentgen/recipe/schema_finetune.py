"""The section `finetune` of a recipe: what is trained of a model that is there, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from latentgen.recipe.schema_section import Section


class Token(Section):
    """A word to be learned (textual inversion, arXiv 2208.01618)."""

    start: str = Field(default="", description="known word to start from, such as `dog` (empty: the mean of all words)")
    vectors: int = Field(default=1, ge=1, le=32, description="embeddings it stands for, as so many words")


class Prior(Section):
    """Pictures of the class that a subject belongs to, trained beside it so that the class is kept (arXiv 2208.12242,
    section 3.2): made once with the model as it is, and kept in `data.cache`, or a folder of them."""

    prompt: str | tuple[str, ...] = Field(
        default="",
        description="what they show, such as `a dog`; several take turns, and of them an empty one stands for what the "
        "model draws unasked, which guidance leads away from",
    )
    pictures: int = Field(default=100, ge=1, description="how many are made")
    path: str | None = Field(default=None, description="folder of such pictures (null: they are made)")
    weight: float = Field(default=1.0, gt=0, description="of their loss; of the subject's it is 1")
    target: Literal["prediction", "picture"] = Field(
        default="prediction",
        description="what is learned of them: what the model as it is predicts, noised picture by noised picture "
        "(`full` holds a copy of the U-Net for that), or the pictures themselves",
    )

    def prompts(self) -> tuple[str, ...]:
        """What picture i shows, i counted on past the last one from the beginning."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt


class Finetune(Section):
    """What is trained of the model in `unet.from`, and how. Results: runs/NAME/adapter, for `full` model, for
    `control` control."""

    preset: Literal["subject", "style"] | None = Field(
        default=None,
        description="fill in what is not set here, for one thing or for a way of drawing, by the number of pictures",
    )
    method: Literal["full", "lora", "dora", "lokr", "loha", "none"] = Field(
        default="lora",
        description="the U-Net's weights (full), small matrices beside them, or none (with `tokens` or `control`)",
    )
    text_encoders: bool = Field(default=False, description="train the text encoders too, in the same way")
    text_learning_rate: float | None = Field(default=None, gt=0, description="theirs (null: train.learning_rate)")
    rank: int = Field(default=16, ge=1, description="of the small matrices")
    alpha: float | None = Field(default=None, gt=0, description="their scale is alpha / rank (null: as rank)")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of their input")
    targets: tuple[str, ...] = Field(
        default=("attention",),
        min_length=1,
        description="layers that get them: attention, feed_forward, convolution, all, or regular expressions of names",
    )
    rank_pattern: dict[str, int] = Field(default={}, description="regular expression of names -> another rank")
    alpha_pattern: dict[str, float] = Field(default={}, description="regular expression of names -> another alpha")
    tokens: dict[str, Token] = Field(default={}, description="words to be learned, such as `<my-dog>`: {start: dog}")
    token_learning_rate: float = Field(default=5e-3, gt=0)
    prior: Prior | None = None
    inpainting: bool = Field(default=False, description="learn to fill masked parts; a plain U-Net gets the channels")
    control: Literal["edge", "picture"] | None = Field(
        default=None,
        description="train a ControlNet beside the U-Net: to follow edges found in the pictures, or a second picture "
        "of each example (arXiv 2302.05543)",
    )
    layouts: tuple[Literal["diffusers", "kohya", "comfyui"], ...] | None = Field(
        default=None,
        min_length=1,
        description="files of matrices, by who reads them (null: diffusers and kohya; of lokr and loha kohya)",
    )

    def written(self) -> tuple[str, ...]:
        """The layouts of the files."""
        return self.layouts or (("diffusers", "kohya") if self.method in ("lora", "dora") else ("kohya",))
