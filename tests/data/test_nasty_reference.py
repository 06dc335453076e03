"""What is decoded of a hundred nasty files, against another decoder: OpenCV, and the equations of colour profiles."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from latentgen.data.images import BadPicture, decode

cv2 = pytest.importorskip("cv2")

FILES = Path(__file__).parents[2].parent / "shared" / "data" / "nasty" / "files"

pytestmark = pytest.mark.skipif(not FILES.is_dir(), reason="needs ../shared/data/nasty")

NO_SECOND_READER = {
    "007": "12-bit TIFF",
    "022": "TGA of grey and alpha",
    "023": "16-bit TGA",
    "040": "Apple's icons",
    "074": "BMP with broken run lengths",
    "110": "Photoshop",
    "111": "DirectDraw surface",
    "112": "XBM",
    "119": "Windows cursor",
    "154": "JPEG in XYB, by the tables of its profile",
    "174": "GIF frame larger than its screen",
}
"""Kinds that OpenCV does not read, by the number of the file."""

TURNED = {"049": lambda x: np.rot90(x, 1)[:, ::-1], "050": lambda x: np.rot90(x, 2), "052": lambda x: np.rot90(x, 2)}
"""Files whose orientation OpenCV does not know: AVIF's own, XMP's, ImageMagick's raw EXIF."""

# IEC 61966-2-1, primaries adapted to D50 as profiles have them.
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def files() -> list[Path]:
    return sorted(FILES.iterdir()) if FILES.is_dir() else []


def without_animation(content: bytes) -> bytes:
    """A PNG without the chunks that animate it: what is left is the picture that every reader shows."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    kept, at = [content[:8]], 8
    while at + 12 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        if content[at + 4 : at + 8] not in (b"acTL", b"fcTL", b"fdAT"):
            kept.append(content[at : at + 12 + length])
        at += 12 + length
    return b"".join(kept)


def eight_bits(pixels: NDArray) -> NDArray[np.float64]:
    if pixels.dtype == np.uint16:
        return pixels / 257.0
    return pixels * 255.0 if pixels.dtype.kind == "f" and pixels.max() <= 1 else pixels.astype(np.float64)


def read(content: bytes) -> NDArray[np.float64] | None:
    """By OpenCV: `[h, w, 3]`, RGB from 0 to 255, on white; None where it cannot."""
    data = np.frombuffer(without_animation(content), np.uint8)
    whole, colour = cv2.imdecode(data, cv2.IMREAD_UNCHANGED), cv2.imdecode(data, cv2.IMREAD_COLOR)
    if whole is None or colour is None:
        return None
    if whole.ndim == 3 and whole.shape[2] == 4:
        alpha = eight_bits(whole[..., 3:]) / 255
        return eight_bits(whole[..., 2::-1]) * alpha + 255 * (1 - alpha)
    if whole.dtype != np.uint8 and whole.ndim == 2:
        return np.repeat(eight_bits(whole)[..., None], 3, axis=2)
    return colour[..., ::-1].astype(np.float64)


def gamma_of(profile: bytes) -> float | None:
    """The exponent of a profile's red curve (ICC.1, section 10.6); None where it is sRGB's own curve."""
    at = profile.index(b"rTRC", 128)
    (offset,) = struct.unpack(">I", profile[at + 4 : at + 8])
    kind, _, count, value = struct.unpack(">4sIIH", profile[offset : offset + 14])
    return value / 256 if kind == b"curv" and count == 1 else None


def in_srgb(pixels: NDArray[np.float64], content: bytes) -> NDArray[np.float64]:
    """Colours of a profile of three primaries and curves, in sRGB, by the equations (ICC.1, annex F.3)."""
    with Image.open(io.BytesIO(content)) as image:
        profile = image.info.get("icc_profile")
    if not profile:
        return pixels
    try:
        described = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
    except OSError:  # a broken profile is ignored
        return pixels
    if not described.is_matrix_shaper or described.xcolor_space.strip() != "RGB":
        return pixels
    colorants = (described.red_colorant, described.green_colorant, described.blue_colorant)
    matrix = np.array([colorant[0] for colorant in colorants]).T
    gamma, value = gamma_of(profile), pixels / 255
    curve = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    linear = curve if gamma is None else value**gamma
    out = np.clip(linear @ (np.linalg.inv(SRGB) @ matrix).T, 0, 1)
    return 255 * np.where(out <= 0.0031308, out * 12.92, 1.055 * out ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name[:24])
def test_a_file_is_refused_with_a_reason_or_is_what_another_decoder_makes_of_it(path: Path) -> None:
    content, number = path.read_bytes(), path.name[:3]
    try:
        ours = np.asarray(decode(path)).astype(np.float64)
    except BadPicture as error:
        reason = str(error)
        ours = np.zeros(0)
    else:
        reason = ""
    if not len(ours):
        assert len(reason) > 10, "refused, and why"
        return
    theirs = read(content)
    if number in NO_SECOND_READER:
        assert ours.std() > 0 or ours.size < 100, "something is drawn"
        return
    assert theirs is not None, "OpenCV reads it"
    theirs = TURNED.get(number, lambda x: x)(in_srgb(theirs, content))
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 2.5
    assert np.abs(ours - theirs).mean() < 1
