"""Decoding: every mode to RGB squares, boxes along with the crop, damage named."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from pipelines import images
from pipelines.images import MAX_PIXELS, RejectedRowError, crop_boxes, decode_square, resize_square

GENERATOR = np.random.default_rng(0)


def encoded(image: Image.Image, format_: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format_, **options)
    return file.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    """A picture without sharp edges, so that resizing filters agree."""
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    channels = [127 + 120 * np.sin(x + y), 127 + 120 * np.cos(2 * x), 127 + 120 * np.sin(y)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def box(label="a", x=0.0, y=0.0, w=1.0, h=1.0):
    return {"label": label, "x": x, "y": y, "w": w, "h": h}


def test_an_image_of_the_right_size_is_kept_pixel_for_pixel():
    pixels = GENERATOR.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    square = decode_square(encoded(Image.fromarray(pixels)), size=32)
    np.testing.assert_array_equal(square.pixels, pixels)
    assert (square.left, square.top, square.side) == (0, 0, 32)


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90), (61, 60)])
def test_short_side_is_resized_and_the_centre_kept(width, height):
    image = smooth(width, height)
    scale = 24 / min(width, height)
    resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 24) // 2, (resized.height - 24) // 2
    expected = np.asarray(resized.crop((left, top, left + 24, top + 24)), dtype=int)
    found = decode_square(encoded(image), size=24).pixels
    # Half a pixel of a smooth picture; what is cut off first does not shine through the edge.
    assert np.abs(found - expected).max() <= 14
    off_centre = np.asarray(resized.crop((0, 0, 24, 24)), dtype=int)
    if max(width, height) > 61:
        assert np.abs(found - off_centre).max() > 20


def test_shrinking_averages_instead_of_skipping():
    chequered = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    pixels = decode_square(encoded(Image.fromarray(chequered)), size=8).pixels
    assert np.abs(pixels.astype(int) - 127).max() < 12


@pytest.mark.parametrize(("before", "after"), [(300, 224), (333, 48), (64, 64), (30, 64), (2, 8), (1, 8)])
def test_resizing_is_pillows_to_one_grey_level(before, after):
    noise = GENERATOR.integers(0, 256, (before, before, 3), dtype=np.uint8)
    found = resize_square(noise, size=after).astype(int)
    picture = Image.fromarray(noise)
    expected = np.asarray(picture.resize((after, after), Image.Resampling.BICUBIC))
    assert np.abs(found - expected).max() <= (1 if after <= before else 2)
    if before not in (1, after):
        other = np.asarray(picture.resize((after, after), Image.Resampling.BILINEAR))
        assert np.abs(found - other).max() > 5


JPEGS = {
    "4:2:0": {"subsampling": 2},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True, "quality": 60},
    "turned": {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_both_decoders_give_the_same_pixels(monkeypatch, mode, options):
    pytest.importorskip("simplejpeg", reason="the extra `fast` is not installed")
    noise = Image.fromarray(GENERATOR.integers(0, 256, (37, 50, 3), dtype=np.uint8))
    data = encoded(noise.convert(mode), "JPEG", **options)
    quick = decode_square(data, size=16)
    # The quick one was taken, except where Pillow has to turn the picture.
    assert (images._quick_jpeg(data, Image.open(io.BytesIO(data))) is None) == ("exif" in options)
    monkeypatch.setattr(images, "simplejpeg", None)
    plain = decode_square(data, size=16)
    np.testing.assert_array_equal(quick.pixels, plain.pixels)
    assert (quick.width, quick.height) == (plain.width, plain.height)
    assert (quick.width, quick.height) == ((37, 50) if "exif" in options else (50, 37))


@pytest.mark.parametrize("exif", [{}, JPEGS["turned"]], ids=["upright", "turned"])
def test_large_films_are_decoded_at_a_fraction_and_look_the_same(monkeypatch, exif):
    film = smooth(900, 610)
    data = encoded(film, "JPEG", quality=95, **exif)
    found = decode_square(data, size=64)
    monkeypatch.setattr(images, "_LARGEST_DRAFT", 1)
    whole = decode_square(data, size=64)
    difference = np.abs(found.pixels.astype(int) - whole.pixels)
    # It was decoded another way, and nobody sees it.
    assert 0 < difference.mean() < 1
    assert difference.max() <= 8
    assert (found.width, found.height) == (whole.width, whole.height)
    assert (found.left, found.top, found.side) == pytest.approx((whole.left, whole.top, whole.side), abs=4)
    monkeypatch.undo()
    # Twice the size that is kept must be left.
    assert images._reduction(Image.open(io.BytesIO(data)), size=64) == 4
    assert images._reduction(Image.open(io.BytesIO(data)), size=153) == 1
    assert images._reduction(Image.open(io.BytesIO(encoded(film))), size=64) == 1


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (9, 9), 100), (100, 100, 100)),
        (Image.new("1", (9, 9), 1), (255, 255, 255)),
        (Image.new("P", (9, 9), 0), (0, 0, 0)),
        (Image.new("LA", (9, 9), (100, 255)), (100, 100, 100)),
        (Image.new("RGBA", (9, 9), (200, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (9, 9), (200, 0, 0, 255)), (200, 0, 0)),
        (Image.fromarray(np.full((9, 9), 25700, dtype=np.uint16)), (100, 100, 100)),
        (Image.new("I", (9, 9), 257), (1, 1, 1)),
    ],
    ids=["L", "1", "P", "LA", "transparent", "opaque", "I;16", "I"],
)
def test_modes_become_rgb(image, expected):
    format_ = "TIFF" if image.mode == "I" else "PNG"
    pixels = decode_square(encoded(image, format_), size=8).pixels
    assert pixels.shape == (8, 8, 3)
    assert (pixels == expected).all()


def test_a_transparent_palette_colour_becomes_white():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30] * 256)
    assert (decode_square(encoded(image), size=8).pixels == (10, 20, 30)).all()
    assert (decode_square(encoded(image, transparency=0), size=8).pixels == 255).all()


def test_cmyk_jpeg():
    pixels = decode_square(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), size=8).pixels
    assert np.abs(pixels.astype(int) - [254, 0, 0]).max() < 8


def test_exif_rotation_is_applied():
    image = smooth(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to look at it
    turned = decode_square(encoded(image, exif=exif), size=16)
    assert (turned.width, turned.height) == (20, 40)
    upright = decode_square(encoded(image.rotate(270, expand=True)), size=16)
    np.testing.assert_array_equal(turned.pixels, upright.pixels)
    assert (decode_square(encoded(image), size=16).pixels != upright.pixels).any()


def test_one_pixel_and_a_long_strip_are_images():
    assert (decode_square(encoded(Image.new("RGB", (1, 1), (7, 8, 9))), size=8).pixels == (7, 8, 9)).all()
    assert decode_square(encoded(Image.new("RGB", (5000, 1))), size=8).pixels.shape == (8, 8, 3)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_truncated_images_are_refused(format_):
    data = encoded(smooth(64, 64), format_)
    decode_square(data, size=8)
    for length in (len(data) // 2, len(data) * 3 // 4, 20):
        with pytest.raises(RejectedRowError) as error:
            decode_square(data[:length], size=8)
        assert error.value.reason == "undecodable_image"


def test_damage_in_the_middle_of_a_png_is_refused():
    data = bytearray(encoded(Image.fromarray(GENERATOR.integers(0, 256, (32, 32, 3), dtype=np.uint8))))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(RejectedRowError) as error:
        decode_square(bytes(data), size=8)
    assert error.value.reason == "undecodable_image"


def test_random_damage_is_always_named():
    for format_ in ("PNG", "JPEG", "TIFF", "WEBP"):
        data = encoded(smooth(24, 24), format_)
        for _ in range(60):
            broken = bytearray(data)
            for _ in range(3):
                broken[GENERATOR.integers(len(broken))] = GENERATOR.integers(256)
            with contextlib.suppress(RejectedRowError):  # any other error fails the test
                decode_square(bytes(broken), size=8)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "missing_image"),
        (b"not an image", "undecodable_image"),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "unsupported_image_mode"),
        (encoded(Image.new("I", (4, 4), 70000), "TIFF"), "unsupported_image_mode"),
    ],
)
def test_refusals(data, reason):
    with pytest.raises(RejectedRowError) as error:
        decode_square(data, size=8)
    assert error.value.reason == reason


def test_a_small_file_that_asks_for_gigabytes_is_refused():
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(RejectedRowError, match=r"9460 x 9460|exceeds limit") as error:
        decode_square(encoded(Image.new("1", (side, side))), size=8)
    assert error.value.reason == "image_too_large"


def test_boxes_move_with_the_crop():
    square = decode_square(encoded(smooth(200, 100)), size=32)  # columns 50..150 remain
    moved = crop_boxes(
        [
            box("inside", 0.375, 0.2, 0.25, 0.5),
            box("cut", 0.0, 0.0, 0.5, 1.0),
            box("outside", 0.8, 0.1, 0.1, 0.1),
        ],
        image=square,
    )
    assert moved == [
        pytest.approx(box("inside", 0.25, 0.2, 0.5, 0.5)),
        pytest.approx(box("cut", 0.0, 0.0, 0.5, 1.0)),
    ]


def test_boxes_of_a_square_image_stay():
    square = decode_square(encoded(smooth(50, 50)), size=32)
    boxes = [box("a", 0.1, 0.2, 0.3, 0.4), box("over the edge", 0.9, 0.9, 0.3, 0.3)]
    assert crop_boxes(boxes, image=square) == [
        pytest.approx(boxes[0]),
        pytest.approx(box("over the edge", 0.9, 0.9, 0.1, 0.1)),
    ]


@pytest.mark.parametrize("wrong", [{"w": 0.0}, {"h": -0.1}, {"x": float("nan")}, {"y": None}])
def test_boxes_without_area_or_numbers_are_refused(wrong):
    square = decode_square(encoded(smooth(50, 50)), size=32)
    with pytest.raises(RejectedRowError, match="finite") as error:
        crop_boxes([{**box(), **wrong}], image=square)
    assert error.value.reason == "invalid_box"
