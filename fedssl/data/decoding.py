"""From files and bytes to pixels of one size: the one rule for training, tests and features."""

import io
import logging
import stat
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from fedssl.data.sources.base import Encoded

DEPTHS = (8, 10, 12, 14, 16)  # bits of a pixel that cameras and scanners use
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEADER = 26  # bytes, up to the kind of its colours
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # those that pixels come from
WHOLE_RANGE = 65535  # of two bytes: as the largest number of a PGM it says nothing
# TIFF's tags, https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf
BITS_PER_SAMPLE, PHOTOMETRIC, MAX_SAMPLE_VALUE, SAMPLE_FORMAT = 258, 262, 281, 339
WHITE_IS_ZERO, UNSIGNED, SIGNED = 0, 1, 2

# What can't be read is counted and named; the library's own lines would tell it again.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Numbers:
    """What a file says of its numbers, which Pillow leaves to us.

    Attributes:
        depth: bits of a pixel in use, where the file says it.
        sign: TIFF's word for it where Pillow takes the numbers otherwise: UNSIGNED of 32 bits,
            SIGNED of 8.
        white_is_zero: the largest is black.
        has_deep_colours: 16 bits for each of several, of which Pillow keeps the upper 8.
    """

    depth: int | None = None
    sign: int | None = None
    white_is_zero: bool = False
    has_deep_colours: bool = False


@dataclass(frozen=True)
class Decoded:
    """An image that could be read.

    Attributes:
        pixels: uint8 (3, S, S).
        assumed: what its file left open and was decided here, for a line that counts them.
    """

    pixels: np.ndarray
    assumed: tuple[str, ...]


def decode_batches(
    images: Iterator[Encoded], image_size: int, batch_size: int
) -> Iterator[list[tuple[Encoded, Decoded | None]]]:
    """Decode images, a batch after the other, by as many threads as PyTorch uses.

    Each image comes with `read_image`'s result.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        while batch := list(islice(images, batch_size)):
            decoded = pool.map(lambda image: read_image(image.data, image_size), batch)
            yield list(zip(batch, decoded, strict=True))


def decode(data: bytes | Path | np.ndarray, image_size: int) -> np.ndarray | None:
    """Give the pixels of `read_image`, None where the image can't be read."""
    image = read_image(data, image_size)
    return image.pixels if image else None


def read_image(data: bytes | Path | np.ndarray, image_size: int) -> Decoded | None:
    """Decode an image of any size and mode to uint8 (3, image_size, image_size).

    The camera's rotation is applied, whatever the format. The shorter side is
    resized, the longer one cropped to the middle. Transparent pixels become white. Of
    numbers with more than 8 bits the upper 8 of those in use are kept, see
    `scale_numbers`. Of several pages or frames the first counts.

    Returns:
        None where the image can't be read.
    """
    try:
        with _open(data) as image:
            pages = getattr(image, "n_frames", 1)
            assumed = [] if pages == 1 else ["the first of several pages or frames"]
            said = _read_numbers(image)  # before the pixels are loaded
            rgb, scale = to_rgb(ImageOps.exif_transpose(image), said)
            if scale:
                assumed.append(scale)
            if rgb.size != (image_size, image_size):
                rgb = ImageOps.fit(rgb, (image_size, image_size), Image.Resampling.BILINEAR)
            pixels = np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))
            return Decoded(pixels, tuple(assumed))
    except Exception:  # PIL raises a dozen unrelated types on broken files
        return None


def _open(data: bytes | Path | np.ndarray) -> Image.Image:
    if isinstance(data, np.ndarray):
        numbers, scale = (data, None) if data.dtype == np.uint8 else scale_numbers(data)
        image = Image.fromarray(numbers)
        image.info["assumed"] = scale
        return image
    if isinstance(data, Path):
        if not stat.S_ISREG(data.stat().st_mode):  # a pipe would never end
            raise OSError(f"{data} is no file")
        with data.open("rb") as file:
            start = file.read(PNG_HEADER)
    else:
        start = data[:PNG_HEADER]
    if _has_deep_colours(start):
        return _open_deep_png(data)
    return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)


def _has_deep_colours(start: bytes) -> bool:
    """Tell a PNG with 16 bits for each of several channels, of which Pillow keeps the upper 8."""
    is_png = start.startswith(PNG_SIGNATURE) and len(start) == PNG_HEADER
    return is_png and start[24] == 16 and start[25] != 0


def _open_deep_png(data: bytes | Path) -> Image.Image:
    """Open such a PNG with the upper 8 of the bits that its colours use."""
    from torchvision.io import ImageReadMode, decode_png

    content = data if isinstance(data, bytes) else data.read_bytes()
    with Image.open(io.BytesIO(content)) as plain:
        exif, clear = plain.getexif(), plain.info.get("transparency")
    buffer = torch.frombuffer(bytearray(_plain_png(content)), dtype=torch.uint8)
    channels = decode_png(buffer, ImageReadMode.UNCHANGED).numpy().astype(np.int64)
    count = len(channels) - (len(channels) in (2, 4))  # without alpha
    colours, scale = scale_numbers(channels[:count])
    if clear is not None:
        colours[:, (clear == channels.T).all(axis=2).T] = 255
    alpha = (channels[count:] >> 8).astype(np.uint8)
    image = Image.fromarray(
        np.concatenate([colours, alpha]).transpose(1, 2, 0), {1: "L", 2: "LA"}.get(len(channels))
    )
    image.info["assumed"] = scale
    image.getexif().update(exif)
    return image


def _plain_png(content: bytes) -> bytes:
    """Leave out all that pixels don't come from, of which libpng would print what it dislikes."""
    kept, begin = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while begin < len(content):
        size = int.from_bytes(content[begin : begin + 4], "big")
        chunk = content[begin : begin + size + 12]  # with its length, kind and checksum
        if chunk[4:8] in PNG_CHUNKS:
            kept.append(chunk)
        begin += len(chunk)
    return b"".join(kept)


def _read_numbers(image: Image.Image) -> Numbers:
    """Read what a file says of its numbers."""
    if image.format == "PPM":
        *_, arguments = vars(image)["tile"][0]
        largest = arguments[1] if isinstance(arguments, tuple) else WHOLE_RANGE
        if image.mode == "I" and largest != WHOLE_RANGE:
            return Numbers(depth=16)  # Pillow has scaled them by the largest
        return Numbers(has_deep_colours=image.mode == "RGB" and largest == WHOLE_RANGE)
    tags = getattr(image, "tag_v2", {})
    bits, form, largest = (
        _first(tags.get(tag)) for tag in (BITS_PER_SAMPLE, SAMPLE_FORMAT, MAX_SAMPLE_VALUE)
    )
    depth = int(largest).bit_length() if largest else None
    if depth is None and bits in DEPTHS and bits % 8:
        depth = bits
    is_other = (form, bits, image.mode) in ((UNSIGNED, 32, "I"), (SIGNED, 8, "L"))
    white_is_zero = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    has_deep_colours = bits == 16 and len(image.getbands()) > 1
    return Numbers(depth, form if is_other else None, white_is_zero, has_deep_colours)


def _first(value: Any) -> Any:
    """Give the value of a tag, that of the first channel where each has one."""
    return value[0] if isinstance(value, tuple) and value else value


def to_rgb(image: Image.Image, said: Numbers = Numbers()) -> tuple[Image.Image, str | None]:
    """Convert an image of any mode to RGB, on white where it is transparent.

    Args:
        said: of the numbers by the file.

    Returns:
        The image, and how its numbers were scaled if they are no bytes.
    """
    scale = image.info.get("assumed")
    if said.has_deep_colours:
        scale = "the upper 8 of 16 bits for each colour"
    if image.mode.startswith("I;16") or image.mode in ("I", "F") or said.sign == SIGNED:
        values = np.asarray(image)
        if said.sign is not None:
            values = values.view(np.uint32 if said.sign == UNSIGNED else np.int8)
        numbers, scale = scale_numbers(values, said.depth)
        if said.white_is_zero:
            numbers = 255 - numbers
        transparent = image.info.get("transparency")
        if transparent is not None:
            numbers[values == transparent] = 255
        return Image.fromarray(numbers).convert("RGB"), scale
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB"), scale
    return image.convert("RGB"), scale


def scale_numbers(values: np.ndarray, depth: int | None = None) -> tuple[np.ndarray, str | None]:
    """Turn numbers into bytes by what the file says or, where it does not, they hold.

    Numbers from 0 on use as many bits as the largest one needs, of 8, 10, 12, 14, 16 or
    more, and keep the upper 8 of these; fractions up to 1, or a little above, are shares of
    white. With numbers below 0 the smallest becomes black and the largest white. What is no number
    is black.

    Args:
        values: of any shape, integers or floats.
        depth: bits, where the file says it.

    Returns:
        uint8 of the same shape, and a word on what was assumed; None where nothing was.
    """
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no number among the pixels")
    low, high = values[finite].min(), values[finite].max()
    numbers = np.where(finite, values, low).astype(np.float64)
    if low < 0:
        scaled = (numbers - low) * (256 / max(float(high) - float(low), 1e-9))
        assumed: str | None = "numbers below 0: stretched from the smallest to the largest"
    elif depth is None and _are_fractions(numbers, values.dtype):
        scaled, assumed = numbers * 256, "fractions from 0 to 1"
    else:
        needed = int(high).bit_length()
        bits = depth or next((each for each in DEPTHS if each >= needed), needed)
        scaled, assumed = numbers / 2.0 ** (bits - 8), None if depth else f"{bits} bits in use"
    return np.clip(scaled, 0, 255).astype(np.uint8), assumed


def _are_fractions(numbers: np.ndarray, dtype: np.dtype) -> bool:
    """Tell fractions up to 1 from numbers; what was resized may stand a little above."""
    high = numbers.max()
    has_parts = bool((numbers != np.floor(numbers)).any())
    return np.issubdtype(dtype, np.floating) and (high <= 1 or (high < 2 and has_parts))
