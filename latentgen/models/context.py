"""What a U-Net reads beside the noisy latents: text states, and in SDXL's family the whole text and the sizes too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""What SDXL's refiner is told of the quality of a picture that is wanted, and of one that is not (arXiv 2307.01952)."""


class Context(NamedTuple):
    """One row a picture.

    Attributes:
        states: `[b, t, d]`, attended to by every block.
        pooled: `[b, p]`, the whole text as one vector; None where the U-Net reads none.
        sizes: `[b, 6]`, SDXL's micro-conditioning in pixels (arXiv 2307.01952, section 2.2): height and width of the
            original picture, top and left of the cut, height and width aimed at. The refiner reads `[b, 5]`: the
            original size, the cut, an aesthetic score from 1 to 10. None where the U-Net reads none.
    """

    states: Tensor
    pooled: Tensor | None = None
    sizes: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Context:
        """`change` of every part that is there."""
        return Context(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]

    def inputs(self) -> dict[str, Any]:
        """What to call a UNet2DConditionModel with."""
        added = None if self.pooled is None else {"text_embeds": self.pooled, "time_ids": self.sizes}
        return {"encoder_hidden_states": self.states, "added_cond_kwargs": added}


def zero(context: Context, empty: Tensor) -> Context:
    """Zeros in the rows of `empty` `[b]`, which are of no text."""
    return context.each(lambda part: part.masked_fill(empty.view(-1, *[1] * (part.ndim - 1)), 0))


def join(contexts: Sequence[Context]) -> Context:
    """One batch after the other."""
    parts = zip(*contexts, strict=True)
    return Context(*(None if part[0] is None else torch.cat(part) for part in parts))  # type: ignore[arg-type]


def context_of(batch: Mapping[str, Tensor], device: torch.device) -> Context:
    """The context that a training batch brings: its `context`, `pooled` and `sizes`, on the network's device."""
    return Context(batch["context"], batch.get("pooled"), batch.get("sizes")).each(lambda part: part.to(device))


def size_count(unet: UNet2DConditionModel, pooled_width: int) -> int:
    """How many numbers of micro-conditioning a U-Net reads: 6 in SDXL, 5 in its refiner, 0 elsewhere.

    Args:
        pooled_width: of the whole text's vector; the network's configuration has only the sum of it and the sizes.
    """
    config = unet.config
    if config["addition_embed_type"] != "text_time":
        return 0
    return (config["projection_class_embeddings_input_dim"] - pooled_width) // config["addition_time_embed_dim"]


def sizes_of(
    count: int, original: tuple[int, int], corner: tuple[int, int], target: tuple[int, int], score: float
) -> list[float]:
    """One row of micro-conditioning: `count` 6 or 5; sizes as (height, width), the cut's corner as (top, left)."""
    return [*original, *corner, *((score,) if count == 5 else target)]
