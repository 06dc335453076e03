"""Captions of a draw: which one is shown, and what the network reads of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from latentgen.core.rand import Draw
from latentgen.data.sources.base import Source


class Words(Protocol):
    """What a network reads of the captions of a draw."""

    def __call__(self, draw: Draw) -> dict[str, Tensor]:
        """By name, `[b, ...]` each."""
        ...


def first_captions(source: Source, index: int, limit: int | None) -> tuple[str, ...]:
    """The captions that training may show for one example."""
    return source.captions(index)[:limit]


@dataclass(frozen=True)
class TagDraws:
    """Captions that are lists of tags, in which order and tags are drawn anew each time.

    Args:
        separator: what stands between two tags; a space follows it unless it has spaces of its own.
        shuffle: tags stand in another order.
        keep: so many tags at the beginning stay where they are, and stay.
        dropout: share of the other tags that are left out; one tag always stays. (That there is no caption at all is
            another draw.)
        examples: only of so many examples, the first; captions of those after them are left as they are (None: all).
    """

    separator: str = ","
    shuffle: bool = False
    keep: int = 0
    dropout: float = 0.0
    examples: int | None = None

    def __bool__(self) -> bool:
        """Whether anything is drawn."""
        return self.shuffle or self.dropout > 0

    def __call__(self, draw: Draw, captions: Sequence[Sequence[str]]) -> list[list[str]]:
        """Captions of each example of a draw; those of one example are treated alike."""
        seeds = draw.integers("tags", 2**62).tolist()
        return [
            [
                self._drawn(caption, seed) if self.examples is None or index < self.examples else caption
                for caption in own
            ]
            for index, own, seed in zip(draw.indices, captions, seeds, strict=True)
        ]

    def _drawn(self, caption: str, seed: int) -> str:
        tags = [tag for tag in (part.strip() for part in caption.split(self.separator)) if tag]
        kept, others = tags[: self.keep], tags[self.keep :]
        if not others:
            return caption
        own = torch.Generator().manual_seed(seed)  # so that no example depends on how many tags another has
        stay = torch.rand(len(others), generator=own)
        places = torch.rand(len(others), generator=own)
        stays = stay >= self.dropout
        if not kept and not stays.any():
            stays[stay.argmax()] = True
        order = places.argsort().tolist() if self.shuffle else range(len(others))
        chosen = [others[place] for place in order if stays[place]]
        joiner = self.separator if self.separator != self.separator.strip() else f"{self.separator} "
        return joiner.join([*kept, *chosen])


@dataclass(frozen=True)
class CachedWords:
    """Captions whose states are at hand: no text encoder runs here.

    Args:
        texts: by name what there is of m texts, [m, ...] each; row 0 is of the empty caption.
        rows: for each example, the rows of `texts` that describe it.
        dropout: share of captions replaced by the empty one.
    """

    texts: Mapping[str, NDArray]
    rows: Sequence[tuple[int, ...]]
    dropout: float

    def __call__(self, draw: Draw) -> dict[str, Tensor]:
        choice, drop = draw.uniform("caption").tolist(), (draw.uniform("dropout") < self.dropout).tolist()
        options = (self.rows[index] for index in draw.indices)
        rows = [0 if d else o[int(c * len(o))] for o, c, d in zip(options, choice, drop, strict=True)]
        return {name: as_tensor(table[rows]) for name, table in self.texts.items()}


@dataclass(frozen=True)
class LiveWords:
    """Captions that are made anew for each draw, for a text encoder that runs in the step.

    What is drawn beside the tags is what `CachedWords` draws.

    Args:
        source: the examples.
        read: b captions to what the text encoder reads of them, by name, `[b, ...]` each; picklable.
        dropout: share of captions replaced by the empty one.
        captions: at most so many captions of an example take part (None: all).
        tags: what is drawn of a caption's tags; None takes captions as they are.
    """

    source: Source
    read: Callable[[Sequence[str]], Mapping[str, Tensor]]
    dropout: float
    captions: int | None = None
    tags: TagDraws | None = None

    def __call__(self, draw: Draw) -> dict[str, Tensor]:
        drop = (draw.uniform("dropout") < self.dropout).tolist()
        shown = drawn_captions(draw, self.source, self.captions)
        if self.tags is not None:
            shown = [caption for (caption,) in self.tags(draw, [[caption] for caption in shown])]
        return dict(self.read(["" if d else caption for caption, d in zip(shown, drop, strict=True)]))


def drawn_captions(draw: Draw, source: Source, limit: int | None) -> list[str]:
    """One caption of each example of a draw, as the source has it."""
    choice = draw.uniform("caption").tolist()
    options = [first_captions(source, index, limit) for index in draw.indices]
    return [own[int(c * len(own))] for own, c in zip(options, choice, strict=True)]


def as_tensor(values: NDArray) -> Tensor:
    """Floating numbers as float32; whole ones and truth values as they are, in the same memory."""
    made = torch.from_numpy(values)
    return made.to(torch.float32) if made.is_floating_point() else made
