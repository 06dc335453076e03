"""Scene -> picture: analytic signed distances, evaluated inside each object's bounding box only.

Every shape is centred on its bounding box, whose larger half-side is `radius`. A distance function takes pixel
coordinates relative to that centre and returns the signed distance to the outline (negative inside), exact near the
straight and round parts of the outline, which is all that one pixel of antialiasing needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from latentgen.core.errors import UserError
from latentgen.data.sources.shapes_scene import BACKGROUNDS, COLOURS, SIDE, Scene

Array = np.ndarray
Radius = float | np.ndarray

# Unit proportions, relative to the radius.
SQUARE = 0.9
CROSS_ARM = 0.36
STAR_INNER = 0.45
STAR_OUTER = 1 / math.cos(math.radians(18))
HEART = 1 / (0.5 + math.sqrt(0.5))


def _circle(x: Array, y: Array, radius: Radius) -> Array:
    return np.sqrt(x * x + y * y) - radius


def _square(x: Array, y: Array, radius: Radius) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - SQUARE * radius


def _triangle(x: Array, y: Array, radius: Radius) -> Array:
    """Equilateral, pointing up."""
    half_height = math.sqrt(0.75) * radius
    return np.maximum(math.sqrt(0.75) * np.abs(x) - 0.5 * (y + half_height), y - half_height)


def _star(x: Array, y: Array, radius: Radius) -> Array:
    """Five points, one up. The plane is folded onto one half-point, where the outline is one straight line."""
    outer = STAR_OUTER * radius
    up = outer * (1 - math.cos(math.radians(36))) / 2 - y
    c, s = math.cos(math.radians(36)), math.sin(math.radians(36))
    x = np.abs(x)
    for side in (1.0, -1.0):
        # Mirrors at 36 degrees to the point that is up (reflecting the lower points onto it), then at -36.
        beyond = 2 * np.maximum(side * c * x - s * up, 0.0)
        x, up = x - side * c * beyond, up + s * beyond
    x = np.abs(x)
    # From the point to the inner corner, as a unit vector: the outline's direction does not depend on the radius.
    edge_x, edge_y = STAR_INNER * s, STAR_INNER * c - 1
    length = math.hypot(edge_x, edge_y)
    return (-edge_y * x + edge_x * (up - outer)) / length


def _heart(x: Array, y: Array, radius: Radius) -> Array:
    """A square on its corner and a half disc on each of its upper sides."""
    half = HEART * radius
    x = np.abs(x)
    y = y - (math.sqrt(0.5) - 0.5) / 2 * half
    disc = np.sqrt((x - half / 2) ** 2 + (y + half / 2) ** 2) - half * math.sqrt(0.5)
    corner = (x + np.abs(y) - half) * math.sqrt(0.5)
    return np.minimum(disc, corner)


def _cross(x: Array, y: Array, radius: Radius) -> Array:
    x, y = np.abs(x), np.abs(y)
    arm = CROSS_ARM * radius
    return np.minimum(np.maximum(x - radius, y - arm), np.maximum(x - arm, y - radius))


Distance = Callable[[Array, Array, Radius], Array]
"""(x, y, radius) -> signed distance to the outline, in the same unit; mirrored at x = 0 the shape is itself."""

DISTANCES: Mapping[str, Distance] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
}


def coverage(distance: Distance, x: Array, y: Array, radius: Radius) -> Array:
    """How much of each pixel a shape covers, in [0, 1]; x, y and radius in pixels, relative to the shape's centre.

    The arguments broadcast, so that one call can draw a shape at many places and sizes.
    """
    return np.clip(0.5 - distance(x, y, radius), 0.0, 1.0)


def render(scene: Scene, resolution: int = SIDE, shapes: Mapping[str, Distance] = DISTANCES) -> Array:
    """The scene as an antialiased picture, uint8 [resolution, resolution, 3], RGB.

    Args:
        resolution: side in pixels.
        shapes: how every shape of the scene is drawn; the world's, unless shapes are to be drawn that it lacks.

    Raises:
        UserError: the resolution is not a positive multiple of 64.
    """
    if resolution < SIDE or resolution % SIDE:
        raise UserError(f"shapes: resolution is {resolution}; choose a multiple of {SIDE}")
    scale = resolution / SIDE
    picture = np.empty((resolution, resolution, 3), dtype=np.uint8)
    background = np.array(BACKGROUNDS[scene.background], dtype=np.uint8)
    picture[...] = background
    for item in scene.items:
        cx, cy, radius = item.x * scale, item.y * scale, item.radius * scale
        left, right = max(int(cx - radius - 1), 0), min(int(cx + radius + 2), resolution)
        top, bottom = max(int(cy - radius - 1), 0), min(int(cy + radius + 2), resolution)
        x = np.arange(left, right, dtype=np.float32)[None, :] + np.float32(0.5 - cx)
        y = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - cy)
        alpha = coverage(shapes[item.shape], x, y, radius)[..., None]
        # Boxes do not overlap, so the background is all that lies under an object.
        change = np.array(COLOURS[item.colour], dtype=np.float32) - background
        picture[top:bottom, left:right] = background + alpha * change + np.float32(0.5)
    return picture
