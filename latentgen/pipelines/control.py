"""The picture that a ControlNet is shown: read from a request, and when in the process it counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from latentgen.core.errors import UserError
from latentgen.data.edges import edges
from latentgen.data.fetch import to_unit
from latentgen.formats.model import Model
from latentgen.pipelines.editing import Sized, open_picture, pixels


class Controlled(Sized, Protocol):
    """The part of a request that this is about; `pipelines.generate.Request` says what each means."""

    @property
    def control(self) -> str | None: ...
    @property
    def control_scale(self) -> float: ...
    @property
    def control_start(self) -> float: ...
    @property
    def control_end(self) -> float: ...
    @property
    def control_edges(self) -> bool: ...


class Control(NamedTuple):
    """What a batch is to follow.

    Attributes:
        picture: `[b, 3, H, W]` in [0, 1].
        scale: how much of what the ControlNet says is added.
        low, high: it counts at noise levels above `low`, up to `high`.
    """

    picture: Tensor
    scale: float
    low: float
    high: float

    def scales(self, sigma: Tensor) -> Tensor:
        """What counts at each of the levels sigma `[b]`: `scale` or 0."""
        rounding = 1e-4  # levels lie much farther apart
        within = (sigma > self.low * (1 + rounding)) & (sigma <= self.high * (1 + rounding))
        return self.scale * within


def check_control(asked: Controlled, model: Model, own_steps: bool) -> None:
    """Raise `UserError` for settings that do not go together, and for a file that is no picture.

    Args:
        own_steps: the sampler chooses its steps itself.
    """
    share = (asked.control_start, asked.control_end)
    if asked.control is None:
        if model.control is not None:
            raise UserError("--controlnet: it needs a picture to follow; add --control FILE, or leave it out")
        options = ("--control-scale", asked.control_scale != 1), ("--control-start", share[0] != 0)
        for name, given in (*options, ("--control-end", share[1] != 1), ("--control-edges", asked.control_edges)):
            if given:
                raise UserError(f"{name}: says how to follow a picture; add --control FILE, or leave it out")
        return
    if model.control is None:
        raise UserError(f"--control {asked.control}: nothing would look at it; name a ControlNet: --controlnet FOLDER")
    if not 0 <= asked.control_scale < math.inf:
        raise UserError(f"--control-scale {asked.control_scale}: must not be negative, nor infinite; 1 is usual")
    if not 0 <= share[0] < share[1] <= 1:
        raise UserError(
            f"--control-start {share[0]:g}, --control-end {share[1]:g}: shares of the steps, "
            "the first below the second, both from 0 to 1"
        )
    if own_steps and share != (0, 1):
        raise UserError("--control-start, --control-end: the sampler chooses its steps itself; leave them out")
    open_picture("--control", asked.control)


def control_of(model: Model, batch: Sequence[Controlled], sigmas: Tensor) -> Control | None:
    """What the requests of a batch, which differ in nothing but words and seeds, are to follow at the levels `[n + 1]`.

    Step i of n, from 0, counts where start <= i / n and (i + 1) / n <= end, as in diffusers' pipelines.
    """
    first = batch[0]
    if first.control is None:
        return None
    n = len(sigmas) - 1
    counting = [i for i in range(n) if first.control_start <= i / n and (i + 1) / n <= first.control_end]
    low = high = 0.0
    if counting:
        high = math.inf if counting[0] == 0 else float(sigmas[counting[0]])
        low = -1.0 if counting[-1] == n - 1 else float(sigmas[counting[-1] + 1])
    shown = to_unit([shown_to_it(asked) for asked in batch]).to(model.unet.device, model.unet.dtype)
    return Control(shown, first.control_scale, low, high)


def shown_to_it(asked: Controlled) -> np.ndarray:
    """What the ControlNet is shown, uint8 `[h, w, 3]`: the picture, or the edges in it."""
    picture = pixels("--control", asked.control, asked)
    return edges(picture) if asked.control_edges else picture
