"""Every colour mode that Pillow knows -> 8-bit sRGB on a background.

What becomes of each Pillow mode:

    1, L, P, RGB          as they are; a palette is looked up; the first frame of an animation
    RGBA LA PA RGBa La    laid on the background; so are palettes with transparent entries and PNG colour keys (tRNS)
    CMYK                  by its ICC profile, else (1 - c)(1 - k); JPEGs by Adobe's convention (stored inverted)
    YCbCr LAB HSV         Pillow's own conversion
    I;16 (any order)      value * 255 / 65535, or / (2^bits - 1) when a TIFF says how many bits it uses
    I, F                  see `_stretch`
    16-bit RGB, RGBA      Pillow keeps the high byte of each sample
"""

from __future__ import annotations

import io
import logging
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

log = logging.getLogger(__name__)

# PNG says which grey is transparent in the file's own bits; Pillow widens the pixels but not that number.
_GREY_STEP = {"L;2": 85, "L;4": 17}
# Closest where it is dark: there the slope of the transfer curve shows small differences most.
_LATTICE = (0, 1, 3, 6, 10, 15, 22, 32, 48, 64, 96, 128, 160, 192, 224, 255)


def to_rgb(image: Image.Image, layout: str, background: tuple[int, int, int]) -> tuple[Image.Image, Image.Image | None]:
    """Any Pillow mode -> RGB on a background, in sRGB; and how opaque it was (mode L), None where all of it."""
    profile = image.info.get("icc_profile")
    alpha: Image.Image | None = None
    if image.mode.startswith(("I", "F")):
        image, alpha = _wide_grey(image)
    elif image.has_transparency_data:
        image, alpha = _split_alpha(image, layout)
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    image = _to_srgb(image, profile) if isinstance(profile, bytes) and profile else image
    image = image if image.mode == "RGB" else image.convert("RGB")
    if alpha is None or alpha.getextrema() == (255, 255):
        return image, None
    ground = Image.new("RGB", image.size, background)
    ground.paste(image, mask=alpha)
    return ground, alpha


def _split_alpha(image: Image.Image, layout: str) -> tuple[Image.Image, Image.Image]:
    """(L or RGB, alpha) of an image that has transparency in any of Pillow's forms."""
    key = image.info.get("transparency")
    if layout in _GREY_STEP and isinstance(key, int):
        image.info["transparency"] = key * _GREY_STEP[layout]
    if layout == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.mode in ("LA", "La"):
        image = image if image.mode == "LA" else image.convert("LA")
        return image.getchannel("L"), image.getchannel("A")
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    return image.convert("RGB"), image.getchannel("A")


def _wide_grey(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """8-bit grey (and alpha, for a PNG with a transparent grey) of a 16-bit, 32-bit or float image."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        grey = values.astype(np.float32) * np.float32(255.0 / _grey_top(image))
    else:
        grey = _stretch(values.astype(np.float64), sixteen=image.mode == "I" and image.format in ("PNG", "PPM"))
    key = image.info.get("transparency")
    alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
    return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8)), alpha


def _grey_top(image: Image.Image) -> int:
    """The value of white: 65535, unless a TIFF states fewer bits a sample (10, 12, 14 from scientific cameras)."""
    bits = getattr(image, "tag_v2", {}).get(258, (16,))
    return 2 ** int(bits[0]) - 1 if 8 < int(bits[0]) <= 16 else 65535


def _stretch(values: np.ndarray, sixteen: bool) -> np.ndarray:
    """Grey values of unknown scale [h, w] -> 0..255.

    `sixteen` says that the format makes 65535 white (PNG, PGM). Otherwise the range found decides: values within 0..1
    are multiplied by 255, values within 0..255 stay, values within 0..65535 are divided by 257, and anything else is
    stretched from its own least value (black) to its greatest (white).
    """
    if not np.isfinite(values).all():
        raise ValueError("some values are not finite numbers")
    if sixteen:
        return values / 257.0
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1:
        return values * 255.0
    if low >= 0 and high <= 65535:
        return values if high <= 255 else values / 257.0
    return (values - low) * (255.0 / max(high - low, 1e-30))


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The colour transform from a profile to sRGB; None when it would change no colour by more than one level.

    Raises:
        ValueError: the profile is for another kind of picture.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    described: Any = source.profile
    space = described.xcolor_space.strip()
    if {"RGB": "RGB", "CMYK": "CMYK", "L": "GRAY"}.get(mode) != space:
        raise ValueError(f"a {space} profile in a {mode} picture")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return transform
    steps = np.arange(256, dtype=np.uint8) if mode == "L" else np.array(_LATTICE, dtype=np.uint8)
    lattice = steps[None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(len(steps), -1, 3)
    probe = Image.fromarray(lattice)
    after = np.asarray(ImageCms.applyTransform(probe, transform), dtype=np.int64)
    same = np.abs(after - np.asarray(probe.convert("RGB"), dtype=np.int64)).max() <= 1
    return None if same else transform


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Apply an ICC profile; a broken or unfitting one is ignored, as every viewer does."""
    try:
        transform = _transform(profile, image.mode)
        converted = None if transform is None else ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        log.debug("colour profile ignored: %s", error)
        return image
    return image if converted is None else converted
