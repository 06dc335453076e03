"""Finding the objects in a picture of shapes, by image analysis alone.

Written for pictures that come from a generative model: colours a little off, soft outlines, specks, objects that
touch. The picture is cut into what differs from the background; each piece is divided by the palette colours that its
inner pixels vote for; each part becomes a soft mask (its share of the way from the background to its own colour), and
the mask is compared with drawn templates of every shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from latentgen.core.errors import UserError
from latentgen.data.sources.shapes_render import DISTANCES, Distance, coverage
from latentgen.data.sources.shapes_scene import BACKGROUNDS, COLOURS, RADII, SIDE

Array = np.ndarray

FOREGROUND = 45.0
"""RGB distance from the background at which a pixel belongs to something."""

BACKGROUND_TOLERANCE = 45.0
"""RGB distance within which the frame's colour is called white or gray."""

COLOUR_TOLERANCE = 75.0
"""RGB distance within which an object's colour is called by the name of its nearest palette colour."""

MIN_AREA = 14.0
"""Pixels, of 64 x 64; a smaller part is a speck. The smallest true object has about 55."""

VOTE_SHARE = 0.15
"""A palette colour counts as present in a piece with this share of the inner pixels' votes."""

MIN_OVERLAP = 0.7
"""Least overlap with a template for a part to have a shape at all."""

MIN_MARGIN = 0.01
"""Least lead of the best shape's overlap over the second best."""

RIM = 3
"""Pixels round a part that still belong to its soft outline."""

SOFTNESS = 1.0
"""Standard deviation, in pixels, of the blur of the second set of templates."""

CERTAIN_MARGIN = 0.15
"""Lead at which the sharp templates have settled the matter and the soft ones are not tried."""

SIZE_LIMIT = (RADII["small"][1] * RADII["large"][0]) ** 0.5
"""Radius between small and large."""


@dataclass(frozen=True)
class Found:
    """One detected object; lengths in 1/64 of the picture's side.

    Attributes:
        shape: its name, None where no template fits well or two fit alike.
        colour: its name, None where no palette colour is near.
        size: "small" or "large".
        x, y, radius: centre and half the larger side of the fitted template's bounding box.
        box: left, top, right, bottom of the mask, in pixels of the 64 x 64 picture; right and bottom excluded.
        overlap: soft intersection over union of mask and best template, in [0, 1].
        margin: how far the overlap of the best shape leads that of the second best; the confidence in the shape.
    """

    shape: str | None
    colour: str | None
    size: str
    x: float
    y: float
    radius: float
    box: tuple[int, int, int, int]
    overlap: float
    margin: float


@dataclass(frozen=True)
class Detection:
    """What a picture shows: the background's name (None if neither white nor gray) and the objects, largest first."""

    background: str | None
    found: tuple[Found, ...]


def as_pixels(image: Image.Image | Array) -> Array:
    """The picture as float32 [64, 64, 3] in 0..255, averaged down (or interpolated up) where it has another size.

    Raises:
        UserError: an array that is not uint8 [h, w, 3], or a picture that is not square.
    """
    if not isinstance(image, Image.Image):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"shapes judge: got an array {image.dtype} {list(image.shape)}; give uint8 [h, w, 3], RGB")
        image = Image.fromarray(image)
    if image.width != image.height:
        raise UserError(f"shapes judge: the picture is {image.width} x {image.height}; give a square one")
    image = image.convert("RGB")
    if image.width != SIDE:
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX if image.width > SIDE else Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32)


def detect(image: Image.Image | Array, shapes: Mapping[str, Distance] = DISTANCES) -> Detection:
    """Everything in the picture that is not background.

    Args:
        image: a square picture, or uint8 [h, w, 3], RGB.
        shapes: what there may be, by name; the world's, unless shapes are to be found that it lacks.

    Raises:
        UserError: a picture that cannot be judged.
    """
    pixels = as_pixels(image)
    frame = np.ones((SIDE, SIDE), dtype=bool)
    frame[2:-2, 2:-2] = False
    ground = np.median(pixels[frame], axis=0)
    name, distance = _nearest(ground, BACKGROUNDS)
    away = np.sqrt(((pixels - ground) ** 2).sum(-1))
    pieces, _ = _pieces(away > FOREGROUND)
    found: list[Found] = []
    for number, window in enumerate(ndimage.find_objects(pieces), start=1):
        inside = pieces[window] == number
        if inside.sum() >= MIN_AREA:
            found += _objects_of(pixels, ground, inside, window, shapes)
    found.sort(key=lambda one: -one.radius)
    return Detection(name if distance <= BACKGROUND_TOLERANCE else None, tuple(found))


def _pieces(mask: Array) -> tuple[Array, int]:
    """Number the connected pieces of a mask from 1; corners connect."""
    labels = np.empty(mask.shape, dtype=np.int32)
    count = ndimage.label(mask, structure=np.ones((3, 3)), output=labels)
    return labels, int(count)  # type: ignore[arg-type]  # a number whenever `output` is an array


def _nearest(colour: Array, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    distances = np.sqrt(((np.array(list(palette.values()), dtype=np.float32) - colour) ** 2).sum(-1))
    best = int(distances.argmin())
    return list(palette)[best], float(distances[best])


def _inner_colours(pixels: Array, inside: Array) -> list[Array]:
    """Median colours of the palette classes that the piece's inner pixels vote for; mixed edge pixels have no vote."""
    depth = np.asarray(ndimage.distance_transform_edt(np.pad(inside, 1)))[1:-1, 1:-1]
    inner = pixels[depth >= min(3.0, 0.6 * depth.max())]
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    votes = ((inner[:, None] - palette) ** 2).sum(-1).argmin(-1)
    counts = np.bincount(votes, minlength=len(palette))
    present = np.flatnonzero(counts >= max(VOTE_SHARE * len(votes), 1))
    return [np.median(inner[votes == index], axis=0) for index in present]


def _objects_of(
    pixels: Array, ground: Array, inside: Array, window: tuple[slice, slice], shapes: Mapping[str, Distance]
) -> list[Found]:
    """Divide one piece by colour, then by connection, and name each part."""
    # A rim on every side, so that a soft outline is not cut off.
    top, left = max(window[0].start - RIM, 0), max(window[1].start - RIM, 0)
    grown = slice(top, min(window[0].stop + RIM, SIDE)), slice(left, min(window[1].stop + RIM, SIDE))
    colours = _inner_colours(pixels[window], inside)
    around = np.zeros((grown[0].stop - top, grown[1].stop - left), dtype=bool)
    at = window[0].start - top, window[1].start - left
    around[at[0] : at[0] + inside.shape[0], at[1] : at[1] + inside.shape[1]] = inside
    around = ndimage.binary_dilation(around, iterations=RIM)
    crop = pixels[grown] - ground
    shares, errors = [], []
    for colour in colours:
        way = colour - ground
        share = np.clip(crop @ way / (way @ way), 0.0, 1.0)
        shares.append(share)
        errors.append(((crop - share[..., None] * way) ** 2).sum(-1))
    owner = np.argmin(errors, axis=0)
    found: list[Found] = []
    for index, (colour, share) in enumerate(zip(colours, shares, strict=True)):
        share = np.where(around & (owner == index), share, 0.0)
        parts, count = _pieces(share > 0.5)
        for number in range(1, count + 1):
            part = parts == number
            if part.sum() < MIN_AREA:
                continue
            near = ndimage.binary_dilation(part, iterations=RIM) & ((parts == 0) | part)
            found.append(_name(np.where(near, share, 0.0), part, colour, left, top, shapes))
    return found


def _name(mask: Array, part: Array, colour: Array, left: int, top: int, shapes: Mapping[str, Distance]) -> Found:
    fits = sorted((_fit(mask, shape, distance, 0.0) for shape, distance in shapes.items()), reverse=True)
    if fits[0][0] - fits[1][0] < CERTAIN_MARGIN:
        soft = sorted((_fit(mask, shape, distance, SOFTNESS) for shape, distance in shapes.items()), reverse=True)
        # Each set is a view of the whole picture; the one with the better fit is taken whole.
        fits = max(fits, soft)
    (overlap, shape, x, y, radius), second = fits[0], fits[1]
    margin = overlap - second[0]
    name, distance = _nearest(colour, COLOURS)
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    return Found(
        shape=shape if overlap >= MIN_OVERLAP and margin >= MIN_MARGIN else None,
        colour=name if distance <= COLOUR_TOLERANCE else None,
        size="small" if radius < SIZE_LIMIT else "large",
        x=x + left,
        y=y + top,
        radius=radius,
        box=(left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1),
        overlap=overlap,
        margin=margin,
    )


@lru_cache(maxsize=64)
def _moments(distance: Distance) -> tuple[float, float]:
    """Area of the shape with radius 1, and how far below the box's centre its centroid lies."""
    radius = 100.0
    axis = np.arange(-110, 110, dtype=np.float32) + 0.5
    alpha = coverage(distance, axis[None, :], axis[:, None], radius)
    return float(alpha.sum()) / radius**2, float((alpha.sum(1) * axis).sum() / alpha.sum()) / radius


# Places and sizes tried round the one that area and centroid give: factors of the radius, shares of the radius.
_FACTORS, _SHIFTS = (0.93, 1.0, 1.07), (-0.07, 0.0, 0.07)
_TRIES = np.array([(f, dx, dy) for f in _FACTORS for dx in _SHIFTS for dy in _SHIFTS], dtype=np.float32)


def _fit(mask: Array, shape: str, distance: Distance, softness: float) -> tuple[float, str, float, float, float]:
    """(soft intersection over union, shape, x, y, radius) of the best template near the mask's area and centroid."""
    area, lower = _moments(distance)
    total = float(mask.sum())
    x = np.arange(mask.shape[1], dtype=np.float32) + 0.5
    y = np.arange(mask.shape[0], dtype=np.float32) + 0.5
    radius = (total / area) ** 0.5
    centre_x = float(mask.sum(0) @ x) / total
    centre_y = float(mask.sum(1) @ y) / total - lower * radius
    radii = radius * _TRIES[:, 0]
    xs, ys = centre_x + radius * _TRIES[:, 1], centre_y + radius * _TRIES[:, 2]
    templates = coverage(
        distance,
        x[None, None, :] - xs[:, None, None],
        y[None, :, None] - ys[:, None, None],
        radii[:, None, None],
    )
    if softness:
        templates = ndimage.gaussian_filter(templates, (0.0, softness, softness), mode="constant", truncate=2.5)
    common = np.minimum(templates, mask).sum((1, 2))
    # What the template covers outside the crop is missed by the mask too: its whole area counts, not what was drawn.
    overlaps = common / (total + area * radii**2 - common)
    best = int(overlaps.argmax())
    return float(overlaps[best]), shape, float(xs[best]), float(ys[best]), float(radii[best])
