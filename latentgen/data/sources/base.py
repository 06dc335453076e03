"""What every source of examples offers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Source(Protocol):
    """A fixed, ordered set of pictures with captions; reading one is a pure function of its number."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def key(self) -> str:
        """Changes whenever a picture, a caption or their order does: caches are named by it."""
        ...

    def name(self, index: int) -> str:
        """What to call the example when it is at fault."""
        ...

    def image(self, index: int) -> NDArray[np.uint8]:
        """The picture `[resolution, resolution, 3]`, RGB."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Its captions, at least one."""
        ...

    def control(self, index: int) -> NDArray[np.uint8] | None:
        """A second picture of the example for a ControlNet to follow, of the same size; None where there is none."""
        ...

    def contrasts(self, index: int, caption: str) -> tuple[tuple[str, ...], ...]:
        """Captions that are false of the example and differ from its `caption` in one respect, a tuple each respect.

        A source knows some for all its captions or, as with most pictures of the world outside, for none.
        """
        ...
