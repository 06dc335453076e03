"""Every kind of picture against a reference computed here, with numpy, from the numbers written into the file."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from latentgen.core.errors import UserError
from latentgen.data.images import BadPicture, decode, decode_pixels
from latentgen.data.reading import Reading, scale

H, W = 24, 40
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (H, W, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (H, W), dtype=np.uint8)
GREY = RNG.integers(0, 256, (H, W), dtype=np.uint8)
WIDE = RNG.integers(0, 65536, (H, W)).astype(np.uint16)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(content: bytes, **options) -> np.ndarray:
    image = decode(content, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(np.int64)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    colour = colour if colour.ndim == 3 else np.repeat(colour[..., None], 3, 2)
    share = alpha[..., None] / 255.0
    return np.rint(colour * share + 255.0 * (1 - share)).astype(np.int64)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.astype(np.int64)[..., None], 3, 2)


def png(rows: np.ndarray, depth: int, colour: int, *chunks: tuple[bytes, bytes], width: int = W) -> bytes:
    """A PNG made by hand, for what Pillow cannot write; `rows` are the packed bytes of each row."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0))
    rest = b"".join(chunk(*item) for item in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + rest + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def big_endian(array: np.ndarray) -> np.ndarray:
    return array.astype(">u2").reshape(len(array), -1)


# ---- modes


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "TGA", "PPM"])
def test_rgb_is_untouched(kind):
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(RGB), kind)), RGB)


def test_grey_and_one_bit():
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(GREY), "PNG")), three(GREY))
    bits = Image.fromarray(GREY > 127)
    assert bits.mode == "1"
    np.testing.assert_array_equal(pixels(saved(bits, "PNG")), three((GREY > 127) * 255))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha_goes_on_white(kind):
    rgba = Image.fromarray(np.dstack([RGB, ALPHA]))
    np.testing.assert_allclose(pixels(saved(rgba, kind)), on_white(RGB, ALPHA), atol=1)
    grey = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    np.testing.assert_allclose(pixels(saved(grey, kind)), on_white(GREY, ALPHA), atol=1)


def test_hidden_colours_do_not_show():
    rgba = np.dstack([RGB, np.zeros_like(ALPHA)])
    assert pixels(saved(Image.fromarray(rgba), "PNG")).min() == 255
    solid = np.dstack([RGB, np.full_like(ALPHA, 255)])
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(solid), "WEBP", lossless=True)), RGB)


@pytest.mark.parametrize("transparency", [None, 3, bytes([0, 128, 255, 7])])
def test_palette(transparency):
    table = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(GREY)
    image.putpalette(table.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    alpha = np.full(256, 255, np.uint8)
    if isinstance(transparency, int):
        alpha[transparency] = 0
    elif transparency is not None:
        alpha[:4] = list(transparency)
    expected = on_white(table[GREY], alpha[GREY])
    np.testing.assert_allclose(pixels(saved(image, "PNG", **options)), expected, atol=1)


def test_png_colour_keys():
    rgb = RGB.copy()
    rgb[3:9, 5:9] = (1, 2, 3)
    key = (rgb == (1, 2, 3)).all(-1)
    expected = np.where(key[..., None], 255, rgb)
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(rgb), "PNG", transparency=(1, 2, 3))), expected)
    grey = saved(Image.fromarray(GREY), "PNG", transparency=7)
    np.testing.assert_array_equal(pixels(grey), three(np.where(GREY == 7, 255, GREY)))


def test_png_colour_keys_in_fewer_and_more_bits():
    quarters = RNG.integers(0, 4, (H, W), dtype=np.uint8)
    packed = (quarters.reshape(H, -1, 4) << np.array([6, 4, 2, 0])).sum(-1).astype(np.uint8)
    content = png(packed, 2, 0, (b"tRNS", struct.pack(">H", 1)))
    np.testing.assert_array_equal(pixels(content), three(np.where(quarters == 1, 255, quarters * 85)))
    wide = WIDE.copy()
    wide[:4] = 1000
    content = png(big_endian(wide), 16, 0, (b"tRNS", struct.pack(">H", 1000)))
    expected = np.where(wide == 1000, 255, np.rint(wide / 257.0))
    np.testing.assert_array_equal(pixels(content), three(expected))
    rgb = RNG.integers(0, 65536, (H, W, 3)).astype(np.uint16)
    rgb[:4] = (513, 770, 1027)
    content = png(big_endian(rgb), 16, 2, (b"tRNS", struct.pack(">3H", 513, 770, 1027)))
    expected = np.where((rgb == (513, 770, 1027)).all(-1)[..., None], 255, rgb >> 8)
    np.testing.assert_array_equal(pixels(content), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    expected = np.rint(WIDE / 65535.0 * 255.0)
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(WIDE), kind)), three(expected))
    dark = np.full((4, 4), 300, np.uint16)
    assert pixels(saved(Image.fromarray(dark), kind)).max() == 1


def test_sixteen_bit_grey_big_endian():
    image = Image.frombytes("I;16B", (W, H), WIDE.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(saved(image, "TIFF")), three(np.rint(WIDE / 257.0)))


def test_sixteen_bit_colour_and_alpha():
    rgb = RNG.integers(0, 65536, (H, W, 3)).astype(np.uint16)
    np.testing.assert_allclose(pixels(png(big_endian(rgb), 16, 2)), np.rint(rgb / 257.0), atol=1)
    grey_alpha = np.stack([WIDE, WIDE[::-1]], -1)
    expected = on_white(np.rint(WIDE / 257.0), np.rint(WIDE[::-1] / 257.0))
    np.testing.assert_allclose(pixels(png(big_endian(grey_alpha), 16, 4)), expected, atol=2)


def test_tiff_says_how_many_bits_it_uses():
    twelve = (WIDE >> 4).reshape(H, -1, 2).astype(np.int64)
    packed = np.stack([twelve[..., 0] >> 4, (twelve[..., 0] & 15) << 4 | twelve[..., 1] >> 8, twelve[..., 1] & 255], -1)
    data = packed.astype(np.uint8).tobytes()
    tags = [(256, 3, W), (257, 3, H), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, H)]
    tags.append((279, 4, len(data)))
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    content = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    np.testing.assert_array_equal(pixels(content), three(np.rint((WIDE >> 4) / 4095.0 * 255.0)))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (GREY.astype(np.float32) / 255.0, GREY),
        (GREY.astype(np.float32), GREY),
        (WIDE.astype(np.float32), np.rint(WIDE / 257.0)),
        (WIDE.astype(np.int32), np.rint(WIDE / 257.0)),
        (GREY.astype(np.float32) - 1000.0, np.rint((GREY - GREY.min()) * (255.0 / np.ptp(GREY)))),
        (np.full((H, W), -3.0, np.float32), np.zeros((H, W))),
    ],
)
def test_floats_and_wide_integers_by_their_range(values, expected):
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(values), "TIFF")), three(expected))


def test_values_that_are_not_finite():
    values = np.zeros((H, W), np.float32)
    values[3, 3] = np.nan
    with pytest.raises(BadPicture, match="not finite"):
        decode(saved(Image.fromarray(values), "TIFF"))


def test_cmyk():
    inks = RNG.integers(0, 256, (H, W, 4), dtype=np.uint8)
    image = Image.frombytes("CMYK", (W, H), inks.tobytes())
    light = 255.0 - inks
    np.testing.assert_allclose(pixels(saved(image, "TIFF")), light[..., :3] * light[..., 3:] / 255.0, atol=1)


def test_cmyk_jpeg_stored_inverted():
    image = Image.new("CMYK", (W, H), (200, 20, 60, 30))
    content = saved(image, "JPEG", quality=100)
    assert b"Adobe" in content
    expected = np.array([55, 235, 195]) * 225 / 255
    np.testing.assert_allclose(pixels(content).mean((0, 1)), expected, atol=3)


def test_ycbcr_and_lab_tiff():
    image = Image.new("RGB", (W, H), (200, 90, 30))
    np.testing.assert_allclose(
        pixels(saved(image.convert("YCbCr"), "TIFF", compression="jpeg")).mean((0, 1)), (200, 90, 30), atol=3
    )
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    np.testing.assert_allclose(pixels(saved(lab, "TIFF")).mean((0, 1)), (200, 90, 30), atol=4)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (W, H), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        content = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(pixels(content).mean((0, 1)), (255, 0, 0), atol=3)


# ---- orientation and colour profiles

SHOWN = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", SHOWN)
def test_orientation(kind, orientation):
    image = Image.fromarray(RGB).resize((W, H), box=(0, 0, 4, 3))  # smooth, so that JPEG keeps it
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}[kind]
    expected = SHOWN[orientation](np.asarray(image)).astype(np.int64)
    np.testing.assert_allclose(pixels(saved(image, kind, exif=exif, **options)), expected, atol=6)


def test_damaged_orientation_is_upright():
    content = saved(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(pixels(content), RGB)


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_srgb_profile_changes_nothing():
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(RGB), "PNG", icc_profile=srgb_profile())), RGB)


def test_nearly_srgb_profile_changes_nothing():
    """Rounding in somebody's copy of sRGB must not disturb the pixels."""
    profile = srgb_profile()
    at = struct.unpack(">I", profile[profile.index(b"rXYZ") + 4 :][:4])[0] + 11
    nudged = profile[:at] + bytes([profile[at] ^ 0x10]) + profile[at + 1 :]
    by_lcms = ImageCms.profileToProfile(
        Image.fromarray(RGB), io.BytesIO(nudged), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert by_lcms is not None
    assert 0 < np.abs(np.asarray(by_lcms).astype(int) - RGB).max() <= 1
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(RGB), "PNG", icc_profile=nudged)), RGB)


def test_profile_is_applied_before_alpha():
    """A profile whose red and blue primaries are exchanged must exchange red and blue."""
    swapped = srgb_profile()
    for old, new in ((b"rXYZ", b"????"), (b"bXYZ", b"rXYZ"), (b"????", b"bXYZ")):
        swapped = swapped.replace(old, new, 1)
    content = saved(Image.fromarray(RGB), "PNG", icc_profile=swapped)
    np.testing.assert_allclose(pixels(content), RGB[..., ::-1], atol=2)
    content = saved(Image.fromarray(np.dstack([RGB, ALPHA])), "PNG", icc_profile=swapped)
    np.testing.assert_allclose(pixels(content), on_white(RGB[..., ::-1], ALPHA), atol=2)


@pytest.mark.parametrize("profile", [b"junk", b"\0" * 200, srgb_profile()[:300]])
def test_broken_profile_is_ignored(profile):
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(RGB), "PNG", icc_profile=profile)), RGB)


def test_profile_for_another_kind_of_picture_is_ignored():
    np.testing.assert_array_equal(pixels(saved(Image.fromarray(GREY), "PNG", icc_profile=srgb_profile())), three(GREY))


# ---- what is no whole picture


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "TGA", "PPM"])
def test_truncated(kind):
    content = saved(Image.fromarray(RGB), kind)
    decode(content)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(BadPicture) as caught:
            decode(content[: int(len(content) * share)])
        assert str(caught.value)


def test_truncated_where_another_library_made_pillow_lenient(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for kind in ("PNG", "JPEG"):
        content = saved(Image.fromarray(RGB), kind)
        with pytest.raises(BadPicture):
            decode(content[: len(content) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("short_side", [None, 32])
def test_truncated_jpeg_with_an_end_marker(short_side):
    noise = RNG.integers(0, 256, (200, 300, 3), dtype=np.uint8)
    content = saved(Image.fromarray(noise), "JPEG")
    with pytest.raises(BadPicture, match="ends before"):
        decode(content[: len(content) // 2] + b"\xff\xd9", short_side=short_side)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_grey_at_the_end_of_a_whole_jpeg_is_fine(mode, optimize):
    noise = np.full((64, 200, 3), 128, np.uint8)
    noise[:30, :150] = RNG.integers(0, 256, (30, 150, 3))
    content = saved(Image.fromarray(noise).convert(mode), "JPEG", optimize=optimize)
    assert (pixels(content)[-8:] == 128).all()


def test_flipped_byte_in_png():
    content = bytearray(saved(Image.fromarray(RGB), "PNG"))
    content[len(content) // 2] ^= 255
    with pytest.raises(BadPicture, match="damaged"):
        decode(bytes(content))


def test_bomb_is_refused_by_its_header():
    content = png(np.zeros((1, 1), np.uint8), 1, 0)
    huge = content.replace(struct.pack(">II", W, 1), struct.pack(">II", 15_000, 15_000), 1)
    head = huge[12:29]
    huge = huge[:29] + struct.pack(">I", zlib.crc32(head)) + huge[33:]
    with pytest.raises(BadPicture, match="too large"):
        decode(huge)
    with pytest.raises(BadPicture, match=r"40 x 24 pixels, at most 959"):
        decode(saved(Image.fromarray(RGB), "PNG"), max_pixels=W * H - 1)
    decode(saved(Image.fromarray(RGB), "PNG"), max_pixels=W * H)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"plain words", "not a picture"),
        (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n", "Radiance HDR pictures are not supported"),
        (b"II*\0nothing else", "a kind of TIFF that is not supported"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "EPS"),
    ],
)
def test_not_a_picture(content, reason):
    with pytest.raises(BadPicture, match=reason):
        decode(content)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(BadPicture, match="cannot be read"):
            decode(path)
    (tmp_path / "a.png").write_bytes(saved(Image.fromarray(RGB), "PNG"))
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.png")), RGB)


def test_threads_leave_the_warning_filters_alone():
    before = list(warnings.filters)
    content = saved(Image.fromarray(RGB), "JPEG")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(pixels, [content] * 64))
    assert warnings.filters == before
    assert all((result == results[0]).all() for result in results)


# ---- cut and scaled


def fit(image: Image.Image, resolution: int, crop: str = "center") -> np.ndarray:
    return scale(np.array(image), Reading(resolution, crop).cut((image.height, image.width)))


def test_fit_keeps_the_pixels_of_the_right_size():
    square = RGB[:, :H]
    np.testing.assert_array_equal(fit(Image.fromarray(square), H), square)
    np.testing.assert_array_equal(fit(Image.fromarray(RGB), H), RGB[:, (W - H) // 2 : (W - H) // 2 + H])


def test_fit_center_and_stretch():
    image = Image.new("RGB", (300, 100), (255, 0, 0))
    image.paste((0, 0, 255), (100, 0, 200, 100))
    middle = np.full((20, 20, 3), (0, 0, 255))
    np.testing.assert_array_equal(fit(image, 20)[:, 4:-4], middle[:, 4:-4])
    np.testing.assert_allclose(fit(image, 20), middle, atol=20)  # the filter sees a little of what is cut off
    stretched = fit(image, 30, crop="stretch")
    assert tuple(stretched[15, 3]) == (255, 0, 0)
    assert tuple(stretched[15, 15]) == (0, 0, 255)


def test_fit_averages_when_it_shrinks():
    """A one-pixel chessboard must become grey, not a moire of black and white."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    small = fit(Image.fromarray(np.dstack([board] * 3)), 32).astype(int)
    assert np.abs(small - 127).max() <= 3


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.sampled_from(["center", "stretch"]))
@settings(max_examples=60)
def test_fit_shape_and_constant(width, height, resolution, crop):
    array = fit(Image.new("RGB", (width, height), (10, 200, 77)), resolution, crop)
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, np.full((resolution, resolution, 3), (10, 200, 77)))


def test_fit_unknown_crop():
    with pytest.raises(UserError, match=r"data\.crop.*middle.*center"):
        fit(Image.fromarray(RGB), 8, crop="middle")


def test_smaller_jpeg_decoding_gives_nearly_the_same_picture():
    y, x = np.mgrid[:600, :800]
    smooth = np.dstack([127 + 100 * np.sin(x / 60), 127 + 100 * np.cos(y / 50), x / 4]).clip(0, 255).astype(np.uint8)
    content = saved(Image.fromarray(smooth), "JPEG", quality=90)
    quick = decode(content, short_side=64)
    assert min(quick.size) >= 128
    assert max(quick.size) < 800
    full = fit(decode(content), 64).astype(int)
    assert np.abs(fit(quick, 64).astype(int) - full).mean() < 1.0


# ---- the way of plain JPEGs


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}]
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_plain_jpegs_are_bit_for_bit_what_pillow_makes_of_them(mode: str, options: dict, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (37, 52, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(file, "JPEG", exif=exif.tobytes(), **options)
    np.testing.assert_array_equal(decode_pixels(file.getvalue()), np.asarray(decode(file.getvalue())))


def test_damaged_jpegs_are_refused_either_way() -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    content = file.getvalue()
    for damaged in (content[:-500], content[:200], content[: len(content) // 2] + b"\xff\xd9", content[:3]):
        with pytest.raises(BadPicture) as one:
            decode_pixels(damaged)
        with pytest.raises(BadPicture) as other:
            decode(damaged)
        assert str(one.value) == str(other.value)


def test_a_large_jpeg_is_decoded_smaller_but_never_below_twice_what_is_wanted() -> None:
    file = io.BytesIO()
    Image.fromarray(RGB).resize((800, 640)).save(file, "JPEG", quality=95)
    whole = decode_pixels(file.getvalue())
    for side in (10, 64, 100, 300):
        small = decode_pixels(file.getvalue(), short_side=side)
        assert min(small.shape[:2]) >= min(2 * side, 640)
        assert small.shape[0] / small.shape[1] == pytest.approx(0.8, abs=0.02)
        cut = Reading(side).cut((640, 800))
        assert np.abs(scale(small, cut).astype(int) - scale(whole, cut)).mean() < 2
    assert decode_pixels(file.getvalue(), short_side=64).shape[0] < 640
