"""Pictures in files, wherever these lie: a `Store` gives bytes and captions, `Pictures` makes a source of it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from latentgen.core.errors import UserError
from latentgen.core.files import content_key
from latentgen.data.buckets import choose_shapes
from latentgen.data.checking import Checked, check_pictures
from latentgen.data.frame import CENTRE, Frame, Place, Shape
from latentgen.data.images import BadPicture, decode, decode_pixels, transparency
from latentgen.data.order import Order, ReadAhead, Windowed, WindowedByShape
from latentgen.data.reading import Reading, scale
from latentgen.data.sources.base import shapes_of, usual_order
from latentgen.data.sources.folder_manifest import natural

log = logging.getLogger(__name__)

_SHOWN = 10


class Store(Protocol):
    """Files of pictures with captions, numbered in a fixed order; nothing of them is decoded here."""

    @property
    def where(self) -> str:
        """What to call all of them, such as the folder's path."""
        ...

    @property
    def skipped(self) -> Sequence[tuple[str, str]]:
        """(name, reason) of what was left out already, because it has no caption or is not there."""
        ...

    @property
    def groups(self) -> tuple[int, ...] | None:
        """Numbers of examples that are cheap to read together (shards), in order; None where all are at hand."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A name that a person finds the picture by."""
        ...

    def content(self, index: int) -> bytes:
        """The picture's file. Raises `BadPicture` where it cannot be read."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """At least one, all different."""
        ...

    def second(self, index: int, kind: str) -> bytes | None:
        """The file of a second picture, `kind` "control" (a ControlNet follows it) or "mask"; None: there is none."""
        ...

    def soon(self, groups: Sequence[int]) -> None:
        """A hint, once a batch, at the groups that will be read next. Returns at once, whatever is done about it."""
        ...

    def known(self, index: int) -> Checked | None:
        """What an index that was made earlier says of the picture, which is then not decoded beforehand."""
        ...


class Pictures:
    """The usable pictures of a store, as examples.

    Every picture of which no index tells is decoded once at construction. One that is broken is left out and stands in
    `skipped` as (name, reason), with what the store left out.

    Args:
        store: where they lie.
        reading: how they are cut. Its `shapes` are chosen here where `buckets` asks for some.
        buckets: at most so many shapes, chosen from the pictures' own; None: `reading.shapes` as they are.
        step: the sides of shapes are multiples of it.
        controls: every picture has a second one for a ControlNet to follow, and those belong to the content.
        broken: the largest share of broken pictures that is put up with.
        window: groups of the store that are shuffled together.

    Raises:
        UserError: too many pictures are broken; a second picture that is asked for is missing or broken.
    """

    def __init__(
        self,
        store: Store,
        reading: Reading,
        *,
        buckets: int | None = None,
        step: int = 8,
        controls: bool = False,
        broken: float = 1.0,
        window: int = 4,
    ) -> None:
        self.store, self.window = store, window
        checked = _checked(store, reading.max_pixels)
        bad = [(store.name(i), found.reason) for i, found in enumerate(checked) if found.reason]
        self.skipped: list[tuple[str, str]] = sorted([*store.skipped, *bad], key=lambda item: natural(item[0]))
        _require_enough(store, bad, len(checked), broken)
        self._numbers = np.array([i for i, found in enumerate(checked) if not found.reason], dtype=np.int64)
        self._checked = [found for found in checked if not found.reason]
        if buckets is not None:
            sizes = [found.size for found in self._checked]
            reading = reading.with_shapes(choose_shapes(sizes, reading.resolution, buckets, step))
        self.reading = reading
        self._seconds = {kind: self._check_seconds(kind) for kind in _kinds(reading, controls)}
        self._report()

    def __len__(self) -> int:
        return len(self._checked)

    @property
    def resolution(self) -> int:
        return self.reading.resolution

    @cached_property
    def _key(self) -> str:
        digest = hashlib.sha256()
        for index, found in enumerate(self._checked):
            seconds = [digests[index] for digests in self._seconds.values()]
            shape = self.reading.shape_of(found.size)
            digest.update(content_key(found.digest, shape, self.captions(index), seconds).encode())
        return content_key("pictures", self.reading.key(), list(self._seconds), digest.hexdigest())

    def key(self) -> str:
        """Equal keys mean the same pictures and captions in the same order, wherever they lie."""
        return self._key

    def digest(self, index: int) -> str:
        """SHA-256 of the picture's file."""
        return self._of(index).digest

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(found.digest for found in self._checked)

    @property
    def sizes(self) -> tuple[Shape, ...]:
        """Height and width of every picture as it lies there, upright."""
        return tuple(found.size for found in self._checked)

    def picture_key(self, index: int) -> str:
        """Of the file's content and of how it is cut."""
        return content_key(self._of(index).digest, self.reading.key(), self.shape(index))

    def shape(self, index: int) -> Shape:
        return self.reading.shape_of(self._of(index).size)

    def frame(self, index: int, at: Place = CENTRE) -> Frame:
        return self.reading.cut(self._of(index).size, at).frame

    def image(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8]:
        """Picture `index`, uint8 `[h, w, 3]`, sRGB, upright, on the background."""
        found = self._of(index)
        try:
            return self._cut(self.store.content(self._number(index)), found, at)
        except BadPicture as error:
            raise UserError(f"{self._called(index)}: was fine when training began, now {error}; restore it") from error

    def _cut(self, content: bytes, found: Checked, at: Place) -> NDArray[np.uint8]:
        reading = self.reading
        cut = reading.cut(found.size, at)
        longest = max(cut.shape) if reading.shapes else reading.resolution
        pixels = decode_pixels(
            content, max_pixels=reading.max_pixels, short_side=longest, background=reading.background
        )
        return scale(pixels, cut)

    def control(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8] | None:
        """The second picture of picture `index`, read and cut like the first; None unless asked for with `controls`."""
        if "control" not in self._seconds:
            return None
        try:
            content = self.store.second(self._number(index), "control")
            assert content is not None, "it was there when the source was made"
            pixels = decode_pixels(content, max_pixels=self.reading.max_pixels, background=self.reading.background)
        except BadPicture as error:
            raise UserError(f"{self._called(index)}: its second picture was fine, now {error}; restore it") from error
        return scale(pixels, self.reading.cut(pixels.shape[:2], at)._replace(shape=self.shape(index)))

    def mask(self, index: int, at: Place = CENTRE) -> NDArray[np.uint8] | None:
        """By the reading's `mask`: the picture's opacity, or the second picture's brightness; cut like the picture."""
        kind, size = self.reading.mask, self._of(index).size
        if kind is None:
            return None
        number = self._number(index)
        try:
            if kind == "alpha":
                layer = transparency(self.store.content(number), max_pixels=self.reading.max_pixels)
            else:
                content = self.store.second(number, "mask")
                layer = None if content is None else decode(content, max_pixels=self.reading.max_pixels).convert("L")
        except BadPicture as error:
            raise UserError(f"{self._called(index)}: its mask was fine, now {error}; restore it") from error
        if layer is None:
            return None
        return scale(np.array(layer.resize((size[1], size[0]))), self.reading.cut(size, at))

    def captions(self, index: int) -> tuple[str, ...]:
        """Captions of picture `index`, at least one, all different."""
        return self.store.captions(self._number(index))

    def contrasts(self, index: int, caption: str) -> tuple[tuple[str, ...], ...]:
        """None: what else is true of a photograph nobody has written down."""
        del index, caption
        return ()

    def name(self, index: int) -> str:
        return self.store.name(self._number(index))

    def order(self, batch: int) -> Order:
        """Shards are shuffled in windows where the store has some; else all examples are."""
        groups = self.store.groups
        if groups is None:
            return usual_order(self, batch)
        ends = np.searchsorted(self._numbers, np.cumsum(groups))
        kept = tuple(np.diff(np.concatenate([[0], ends])).tolist())
        shapes, of = shapes_of(self)
        single = len(shapes) == 1
        order = Windowed(kept, self.window) if single else WindowedByShape(kept, self.window, of, batch)
        return ReadAhead(order, self.store.soon)

    def _of(self, index: int) -> Checked:
        self._number(index)
        return self._checked[index]

    def _number(self, index: int) -> int:
        if not 0 <= index < len(self._checked):
            raise UserError(f"{self.store.where}: example {index} does not exist; there are {len(self)}, from 0")
        return int(self._numbers[index])

    def _called(self, index: int) -> str:
        return f"{self.store.where}: {self.name(index)}"

    def _check_seconds(self, kind: str) -> list[str]:
        """SHA-256 of every picture's second one of this kind; "" where there may be none."""
        names = [self.name(i) for i in range(len(self))]
        contents = [partial(self._second, i, kind) for i in range(len(self))]
        checked = check_pictures(contents, self.reading.max_pixels)
        missing = [n for n, found in zip(names, checked, strict=True) if found.reason == _MISSING]
        broken = [(n, c.reason) for n, c in zip(names, checked, strict=True) if c.reason not in ("", _MISSING)]
        if broken:
            name, reason = broken[0]
            raise UserError(f"{self.store.where}: the {kind} of {name}: {reason}; replace that picture")
        if missing and kind == "control":
            raise UserError(
                f"{self.store.where}: {len(missing)} of {len(names)} pictures have none to follow, the first is "
                f"{missing[0]}; put {Path(missing[0]).stem}.control.png beside it, or name its file in the "
                "metadata's column conditioning_image"
            )
        if len(missing) == len(names):
            raise UserError(f"data.mask: {self.store.where} has no masks; put NAME.mask.png beside NAME.png")
        return [found.digest for found in checked]

    def _second(self, index: int, kind: str) -> bytes:
        content = self.store.second(self._number(index), kind)
        if content is None:
            raise BadPicture(_MISSING)
        return content

    def _report(self) -> None:
        where = self.store.where
        for name, reason in self.skipped[:_SHOWN]:
            log.warning("%s: skipped %s: %s", where, name, reason)
        if len(self.skipped) > _SHOWN:
            log.warning("%s: skipped %d files in all", where, len(self.skipped))
        captions = sum(len(self.captions(i)) for i in range(len(self)))
        log.info("%s: %d pictures with %d captions, %d skipped", where, len(self), captions, len(self.skipped))


_MISSING = "there is none"


def _kinds(reading: Reading, controls: bool) -> list[str]:
    return [*(["control"] if controls else []), *(["mask"] if reading.mask == "beside" else [])]


def _checked(store: Store, max_pixels: int) -> list[Checked]:
    known = [store.known(i) for i in range(len(store))]
    unknown = [i for i, found in enumerate(known) if found is None]
    made = check_pictures([partial(store.content, i) for i in unknown], max_pixels)
    fresh = dict(zip(unknown, made, strict=True))
    return [fresh[i] if found is None else found for i, found in enumerate(known)]


def _require_enough(store: Store, bad: Sequence[tuple[str, str]], count: int, share: float) -> None:
    """Raise `UserError` where none is left, or more are broken than is put up with."""
    if not bad:
        return
    first = f"{bad[0][0]}: {bad[0][1]}"
    if len(bad) == count:
        raise UserError(f"{store.where}: none of its {count} pictures can be used ({first}); replace the broken files")
    if len(bad) > share * count:
        raise UserError(
            f"{store.where}: {len(bad)} of {count} pictures are broken, more than data.broken_share, {share:g}; "
            f"the first is {first}"
        )
