"""One decoding rule: modes, orientations, depths and broken bytes."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from fedssl.data.decoding import decode, read_image, scale_numbers

ORIENTATION = 0x112


def saved(image, form, **how):
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def deep_png(values, colour_type):
    """Write a PNG with 16 bits a channel, which Pillow can't."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_images_of_the_right_size_keep_their_pixels(rng):
    pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    assert np.array_equal(decode(pixels, 12), pixels.transpose(2, 0, 1))


def test_transparent_pixels_become_white_and_16_bits_keep_the_upper_8():
    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    assert (decode(clear, 4) == 255).all()
    deep = np.full((4, 4), 0x4321, dtype=np.uint16)
    assert (decode(deep, 4) == 0x43).all()


@pytest.fixture
def twelve_bits(rng):
    values = rng.integers(0, 4096, (12, 12))
    values[0, 0] = 4095
    return values


def numeric_files(values):
    """Write the same numbers in every format that holds them."""
    deep = Image.fromarray(values.astype(np.uint16))
    return {
        "PNG": saved(deep, "PNG"),
        "PGM": saved(deep, "PPM"),
        "PGM as text": b"P2\n12 12\n65535\n" + " ".join(map(str, values.ravel())).encode(),
        "PGM up to 4095": b"P5\n12 12\n4095\n" + values.astype(">u2").tobytes(),
        "TIFF of 16 bits": saved(deep, "TIFF"),
        "TIFF of 32 bits": saved(Image.fromarray(values.astype(np.int32)), "TIFF"),
        "TIFF of floats": saved(Image.fromarray(values.astype(np.float32)), "TIFF"),
        "PNG with colours": deep_png(np.stack([values] * 3, axis=2), 2),
        "PNG with alpha": deep_png(np.stack([values, np.full((12, 12), 65535)], axis=2), 4),
    }


def test_twelve_bits_look_alike_in_every_format(twelve_bits):
    expected = np.stack([twelve_bits >> 4] * 3)
    for name, data in numeric_files(twelve_bits).items():
        image = read_image(data, 12)
        assert np.array_equal(image.pixels, expected), name
        says = name == "PGM up to 4095"
        assert image.assumed == (() if says else ("12 bits in use",)), name


def test_what_a_file_says_wins_over_its_values(twelve_bits):
    dark = twelve_bits // 8  # below 512
    said = b"P5\n12 12\n4095\n" + dark.astype(">u2").tobytes()
    assert np.array_equal(decode(said, 12)[0], dark >> 4)
    tiff = saved(Image.fromarray(dark.astype(np.uint16)), "TIFF", tiffinfo={281: 4095})
    assert read_image(tiff, 12).assumed == ()
    assert np.array_equal(decode(tiff, 12)[0], dark >> 4)


@pytest.mark.parametrize(
    ("values", "expected", "assumed"),
    [
        ([0, 255], [0, 255], "8 bits in use"),
        ([0, 1000], [0, 250], "10 bits in use"),
        ([0, 16383], [0, 255], "14 bits in use"),
        ([0, 65535], [0, 255], "16 bits in use"),
        ([0, 2**20], [0, 128], "21 bits in use"),
        ([-1000, 0, 3000], [0, 64, 255], "numbers below 0"),
        ([0.0, 0.5, 1.0], [0, 128, 255], "fractions"),
        ([0.0, 128.0], [0, 128], "8 bits in use"),
        ([0.0, 0.5, 1.02], [0, 128, 255], "fractions"),
        ([0.0, 1.0, 1.5, 3.0], [0, 1, 1, 3], "8 bits in use"),
        ([np.nan, 0.0, np.inf, 1.0], [0, 0, 0, 255], "fractions"),
        ([7, 7], [7, 7], "8 bits in use"),
    ],
)
def test_numbers_become_bytes_by_what_they_hold(values, expected, assumed):
    scaled, words = scale_numbers(np.array([values]))
    assert scaled.tolist() == [expected]
    assert words.startswith(assumed)


def tiff_of(values, bits, form=1, photometric=1, extra=(), channels=1):
    """Write a TIFF as no writer here does: any depth, sign and meaning of its numbers."""
    data, (height, width) = (
        values if isinstance(values, tuple) else (values.tobytes(), values.shape)
    )
    begin = 14 + 12 * (10 + len(extra))
    depths = bits if isinstance(bits, tuple) else (bits,)
    depths_at = depths[0] if len(depths) == 1 else begin + len(data)
    tags = [(256, 1, width), (257, 1, height), (258, len(depths), depths_at), (259, 1, 1)]
    tags += [(262, 1, photometric), (273, 1, begin), (277, 1, channels), (278, 1, height)]
    tags += [(279, 1, len(data)), (339, 1, form), *((tag, 1, value) for tag, value in extra)]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    entries = [struct.pack("<HHII", tag, 4, count, value) for tag, count, value in sorted(tags)]
    return head + b"".join(entries) + bytes(4) + data + struct.pack(f"<{len(depths)}I", *depths)


def pack_twelve(values):
    """Put pairs of numbers with 12 bits into three bytes."""
    first, second = values[:, ::2], values[:, 1::2]
    parts = first >> 4, (first & 15) << 4 | second >> 8, second & 255
    return np.stack(parts, axis=2).astype(np.uint8).tobytes(), values.shape


def test_what_any_file_says_of_its_numbers_counts(twelve_bits):
    dark = twelve_bits // 8  # below 512
    files = {
        "PGM up to 32767": (b"P5\n12 12\n32767\n" + dark.astype(">u2").tobytes(), dark >> 7),
        "TIFF of 12 bits": (tiff_of(pack_twelve(dark), 12), dark >> 4),
        "white is 0": (
            tiff_of((4095 - dark).astype("<u2"), 16, photometric=0, extra=[(281, 4095)]),
            dark >> 4,
        ),
        "signed bytes": (tiff_of((dark // 2 - 128).astype("i1"), 8, form=2), None),
        "32 bits": (tiff_of((twelve_bits << 20).astype("<u4"), 32), twelve_bits >> 4),
    }
    for name, (data, expected) in files.items():
        image = read_image(data, 12)
        if expected is None:  # stretched, since some are below 0
            low, high = dark.min() // 2, dark.max() // 2
            expected = np.clip((dark // 2 - low) * 256 / (high - low), 0, 255).astype(np.uint8)
        assert np.array_equal(image.pixels[0], expected), name


def test_white_is_zero_without_more_words(twelve_bits):
    turned = read_image(tiff_of((65535 - 16 * twelve_bits).astype("<u2"), 16, photometric=0), 12)
    assert np.array_equal(turned.pixels[0], twelve_bits >> 4)
    assert turned.assumed == ("16 bits in use",)
    floats = tiff_of((1 - twelve_bits / 4095).astype("<f4"), 32, form=3, photometric=0)
    assert np.abs(read_image(floats, 12).pixels[0].astype(int) - (twelve_bits >> 4)).max() <= 1


def test_of_deep_colours_in_a_tiff_or_ppm_the_upper_8_bits_are_kept_and_that_is_said(rng):
    colours = rng.integers(0, 65536, (8, 8, 3))
    ppm = b"P6\n8 8\n65535\n" + colours.astype(">u2").tobytes()
    image = read_image(ppm, 8)
    assert np.abs(image.pixels.transpose(1, 2, 0).astype(int) - (colours >> 8)).max() <= 1
    assert image.assumed == ("the upper 8 of 16 bits for each colour",)
    tiff = tiff_of((colours.astype("<u2").tobytes(), (8, 8)), (16, 16, 16), 1, 2, channels=3)
    image = read_image(tiff, 8)
    assert np.array_equal(image.pixels, (colours >> 8).transpose(2, 0, 1))
    assert image.assumed == ("the upper 8 of 16 bits for each colour",)


def with_chunk(png, kind, content):
    """Put a chunk before a PNG's pixels."""
    at = png.index(b"IDAT") - 4
    check = struct.pack(">I", zlib.crc32(kind + content))
    return png[:at] + struct.pack(">I", len(content)) + kind + content + check + png[at:]


def test_the_number_that_means_transparent_becomes_white(twelve_bits):
    twelve_bits[0, :2] = 7, 4095
    grey = with_chunk(deep_png(twelve_bits, 0), b"tRNS", struct.pack(">H", 7))
    expected = np.where(twelve_bits == 7, 255, twelve_bits >> 4)
    assert np.array_equal(decode(grey, 12)[0], expected)
    colours = np.stack([twelve_bits] * 3, axis=2)
    colours = with_chunk(deep_png(colours, 2), b"tRNS", struct.pack(">HHH", 7, 7, 7))
    assert np.array_equal(decode(colours, 12)[0], expected)


def test_no_library_prints_of_files_that_it_dislikes(capfd, recwarn, twelve_bits):
    colours = np.stack([twelve_bits] * 3, axis=2)
    files = [
        with_chunk(deep_png(colours, 2), b"iCCP", b"x\0\0garbage"),
        saved(Image.new("1", (10_000, 10_000), 1), "PNG"),  # more than Pillow is used to
        tiff_of((bytes(64), (8, 8)), 8, channels=9),
        saved(
            Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\1\2" * 20
        ),
    ]
    decoded = [decode(data, 8) for data in files]
    assert [image is None for image in decoded] == [False, False, True, False]
    assert capfd.readouterr() == ("", "")


def test_what_is_no_image_of_any_kind_is_unreadable(tmp_path):
    assert decode(np.zeros((8, 8, 5)), 8) is None
    assert decode(b"", 8) is None
    assert decode(tmp_path, 8) is None
    os.mkfifo(tmp_path / "pipe.png")
    assert decode(tmp_path / "pipe.png", 8) is None  # and nobody waits for it


def test_an_image_without_a_number_is_unreadable():
    nothing = saved(Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), "TIFF")
    assert read_image(nothing, 4) is None


LOSSLESS = {"WEBP": {"lossless": True, "exact": True}}
MODES = [
    *[(mode, form) for mode in ("RGB", "RGBA", "L", "LA", "P", "1") for form in ("PNG", "TIFF")],
    *[(mode, "WEBP") for mode in ("RGB", "RGBA", "L", "LA")],
    *[("I;16", form) for form in ("PNG", "TIFF")],
    ("CMYK", "TIFF"),
    *[(mode, "JPEG") for mode in ("RGB", "L", "CMYK", "1")],
]


@pytest.mark.parametrize(("mode", "form"), MODES)
def test_the_camera_s_rotation_holds_for_every_mode_and_format(mode, form, rng):
    base = Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
    else:
        image = base.convert(mode)
    upright = decode(saved(image, form, **LOSSLESS.get(form, {})), 16)
    reference = Image.fromarray(upright.transpose(1, 2, 0))
    seen = set()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        turned = decode(saved(image, form, exif=exif, **LOSSLESS.get(form, {})), 16)
        by_hand = reference.copy()
        by_hand.getexif()[ORIENTATION] = orientation
        expected = np.asarray(ImageOps.exif_transpose(by_hand)).transpose(2, 0, 1)
        assert np.array_equal(turned, expected), orientation
        seen.add(turned.tobytes())
    assert len(seen) == 8


def test_of_several_pages_the_first_counts_and_that_is_said(rng):
    pages = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(3)]
    for form in ("TIFF", "PNG", "WEBP"):
        how = LOSSLESS.get(form, {})
        data = saved(pages[0], form, save_all=True, append_images=pages[1:], **how)
        image = read_image(data, 8)
        assert np.array_equal(image.pixels, np.asarray(pages[0]).transpose(2, 0, 1)), form
        assert image.assumed == ("the first of several pages or frames",), form
