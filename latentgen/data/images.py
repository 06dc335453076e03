"""One picture file -> 8-bit sRGB, whatever it holds; a file that cannot give a whole picture is a `BadPicture`.

What becomes of each colour mode stands in `modes`.
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile

from latentgen.data.modes import to_rgb
from latentgen.data.quiet import quiet_pillow

log = logging.getLogger(__name__)

MAX_PIXELS = 120_000_000
MAX_BYTES = 1 << 30
WHITE = (255, 255, 255)
# Formats that Pillow opens but that are no pictures of pixels, or that start another program (Ghostscript).
REFUSED = frozenset({"EPS", "WMF", "HDF5", "GRIB", "BUFR", "MPEG"})
_TURNS = {  # EXIF 2.32, tag 0x0112
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# What Pillow's metadata readers raise on damaged EXIF; it is not worth a picture.
_BAD_EXIF = (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, OSError, struct.error)


class BadPicture(Exception):
    """A file that gives no whole picture; the text is the reason, without the file's name."""


def decode(
    source: str | Path | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    short_side: int | None = None,
    background: tuple[int, int, int] = WHITE,
) -> Image.Image:
    """The picture in a file (or in its bytes) as a Pillow image of mode RGB, 8 bits, sRGB, upright.

    Args:
        source: path or content of the file.
        max_pixels: a header that promises more pixels is refused before anything is decoded (decompression bombs).
        short_side: the side wanted later; a JPEG may then be decoded at 1/2, 1/4 or 1/8, never below twice this.
        background: what lies behind transparent pixels.

    What libjpeg mends without a word in the middle of a JPEG (stripes of wrong colour) cannot be noticed here.

    Raises:
        BadPicture: not a picture, damaged, truncated (a part is never returned), too large, or missing.
    """
    return _decoded(source, max_pixels, short_side, background)[0]


def decode_pixels(
    source: str | Path | bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    short_side: int | None = None,
    background: tuple[int, int, int] = WHITE,
) -> NDArray[np.uint8]:
    """The pixels that `decode` gives, uint8 `[h, w, 3]`. Plain JPEGs, which are most of what there is, are handed to
    libjpeg-turbo directly: bit for bit the same (at another size where `short_side` lets them be smaller), and sooner.

    Raises:
        BadPicture: as `decode`.
    """
    content = source if isinstance(source, bytes) else read_file(Path(source))
    plain = _plain_jpeg(content, max_pixels, short_side)
    if plain is not None:
        return plain
    return np.array(_decoded(content, max_pixels, short_side, background)[0])


def _plain_jpeg(content: bytes, max_pixels: int, short_side: int | None) -> NDArray[np.uint8] | None:
    """A whole JPEG of grey or of three colours without a profile; None for every other file, and for damaged ones."""
    if not content.startswith(b"\xff\xd8\xff"):
        return None
    with quiet_pillow():
        try:
            image = Image.open(io.BytesIO(content))
            _check_header(image, max_pixels)
        except Exception:  # `_decoded` will say what is wrong with it
            return None
        if image.format != "JPEG" or image.mode not in ("L", "RGB") or image.info.get("icc_profile"):
            return None
        turn = _turn(image)
    side = 0 if short_side is None else 2 * short_side
    try:
        colour = "GRAY" if image.mode == "L" else "RGB"
        pixels = simplejpeg.decode_jpeg(content, colour, min_height=side, min_width=side)
    except ValueError:
        return None
    if "progressive" not in image.info and (pixels[-8:, -128:] == 128).all():
        return None  # perhaps cut short
    pixels = pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)
    return pixels if turn is None else np.ascontiguousarray(_TURNED[turn](pixels))


_TURNED: dict[Image.Transpose, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {
    Image.Transpose.FLIP_LEFT_RIGHT: lambda x: x[:, ::-1],
    Image.Transpose.FLIP_TOP_BOTTOM: lambda x: x[::-1],
    Image.Transpose.ROTATE_90: lambda x: np.rot90(x, 1),
    Image.Transpose.ROTATE_180: lambda x: np.rot90(x, 2),
    Image.Transpose.ROTATE_270: lambda x: np.rot90(x, 3),
    Image.Transpose.TRANSPOSE: lambda x: x.swapaxes(0, 1),
    Image.Transpose.TRANSVERSE: lambda x: np.rot90(x, 2).swapaxes(0, 1),
}


def transparency(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image | None:
    """How opaque each pixel of a picture is, mode L, upright, 255 where it hides what lies behind; None where all are.

    Raises:
        BadPicture: as `decode`.
    """
    return _decoded(source, max_pixels, None, WHITE)[1]


def read_file(path: Path) -> bytes:
    """Content of a picture file. Raises `BadPicture` if it cannot be read or is larger than `MAX_BYTES`."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BadPicture(f"the file is larger than {MAX_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise BadPicture(f"the file cannot be read: {error.strerror or error}") from error


def _decoded(
    source: str | Path | bytes, max_pixels: int, short_side: int | None, background: tuple[int, int, int]
) -> tuple[Image.Image, Image.Image | None]:
    """The picture, and its transparency if it has any."""
    content = source if isinstance(source, bytes) else read_file(Path(source))
    if not content:
        raise BadPicture("the file is empty (0 bytes)")
    with quiet_pillow() as messages:
        try:
            image = Image.open(io.BytesIO(content))
            _check_header(image, max_pixels)
            _draft(image, short_side)
            layout = _layout(image)
            image.load()
            turn = _turn(image)
            if image.format == "JPEG" and "progressive" not in image.info and _ends_in_grey(image):
                _check_whole(image, content, short_side)
            if not messages:
                found, alpha = to_rgb(image, layout, background)
                if turn is None:
                    return found, alpha
                return found.transpose(turn), None if alpha is None else alpha.transpose(turn)
        except BadPicture:
            raise
        except Exception as error:  # Pillow's plugins raise nearly every type of exception on a hostile file
            raise BadPicture(_reason(error, content)) from error
    raise BadPicture(f"damaged data (libtiff: {messages[0]})")


def _check_header(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if image.format in REFUSED:
        raise BadPicture(f"{image.format} files are not supported; convert it to PNG or JPEG")
    if width < 1 or height < 1:
        raise BadPicture(f"the header says {width} x {height} pixels")
    if width * height > max_pixels:
        raise BadPicture(f"too large: {width} x {height} pixels, at most {max_pixels} are allowed; make it smaller")


def _reason(error: Exception, content: bytes) -> str:
    """Why Pillow gave up, in words for the person whose file it is."""
    head = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {error}"
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page saved under a picture's name"
    if b"<svg" in head:
        return "a vector drawing (SVG); convert it to PNG"
    if content[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return "HEIC pictures are not supported; convert it to JPEG or PNG"
    if head.startswith((b"#?radiance", b"#?rgbe")):
        return "Radiance HDR pictures are not supported; convert it to PNG or JPEG"
    if isinstance(error, Image.UnidentifiedImageError) and content.startswith((b"II*\0", b"MM\0*")):
        return "a kind of TIFF that is not supported (colours of float numbers, for one), or damaged; convert it to PNG"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture, or damaged at its beginning"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"damaged or incomplete: {text[:200]}"


def _draft(image: Image.Image, short_side: int | None) -> None:
    """Let a JPEG be decoded smaller, at least twice as large as wanted; other formats are left as they are."""
    if short_side is not None:
        image.draft(None, (2 * short_side, 2 * short_side))


def _layout(image: ImageFile.ImageFile) -> str:
    """How the file stores its samples, in Pillow's name (such as "RGB;16B"); known only before loading."""
    arguments: Any = image.tile[0][3] if image.tile else None
    name = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return name if isinstance(name, str) else ""


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright by its EXIF (or XMP) orientation; unreadable metadata means upright."""
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except _BAD_EXIF as error:
        log.debug("EXIF could not be read: %s", error)
        return None


def _ends_in_grey(image: Image.Image) -> bool:
    """Whether the last 8 rows end in 128 columns of exactly middle grey: what libjpeg paints where data is missing."""
    tail = image.crop((max(image.width - 128, 0), max(image.height - 8, 0), image.width, image.height))
    return image.mode in ("L", "RGB") and np.unique(np.asarray(tail)).tolist() == [128]


def _check_whole(image: Image.Image, content: bytes, short_side: int | None) -> None:
    """Tell a JPEG that was cut short (and closed by an end marker, so that libjpeg is content) from a grey picture.

    Two bytes before the end marker are left out. In a whole picture they belong to the grey at its end, and nothing
    else changes. In a damaged one they are the last that was drawn before the grey, so something not grey changes.
    """
    end = content.rfind(b"\xff\xd9")
    shorter = Image.open(io.BytesIO(content[: end - 2] + content[end:]))
    _draft(shorter, short_side)
    before = np.asarray(image)
    if (before != np.asarray(shorter))[before != 128].any():
        raise BadPicture("damaged or incomplete: the picture's data ends before its last row")
