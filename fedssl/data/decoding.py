"""From files and bytes to pixels of one size: the one rule for training, tests and features."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from fedssl.data.sources.base import Encoded

DEPTHS = (8, 10, 12, 14, 16)  # bits of a pixel that cameras and scanners use
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEADER = 26  # bytes, up to the kind of its colours
MAX_SAMPLE_VALUE = 281  # TIFF's tag
BROKEN = (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError)


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
            depth = _depth_said(image)  # before the pixels are loaded
            rgb, scale = to_rgb(ImageOps.exif_transpose(image), depth)
            if scale:
                assumed.append(scale)
            if rgb.size != (image_size, image_size):
                rgb = ImageOps.fit(rgb, (image_size, image_size), Image.Resampling.BILINEAR)
            pixels = np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))
            return Decoded(pixels, tuple(assumed))
    except BROKEN:  # PIL raises any of these on broken files
        return None


def _open(data: bytes | Path | np.ndarray) -> Image.Image:
    if isinstance(data, np.ndarray):
        return Image.fromarray(data)
    if isinstance(data, Path):
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
        exif, depth_info = plain.getexif(), plain.info
    buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    channels = decode_png(buffer, ImageReadMode.UNCHANGED).numpy().astype(np.int64)
    count = len(channels) - (len(channels) in (2, 4))  # without alpha
    colours, scale = scale_numbers(channels[:count])
    alpha = (channels[count:] >> 8).astype(np.uint8)
    image = Image.fromarray(
        np.concatenate([colours, alpha]).transpose(1, 2, 0), {1: "L", 2: "LA"}.get(len(channels))
    )
    image.info = {**depth_info, "assumed": scale}
    image.getexif().update(exif)
    return image


def _depth_said(image: Image.Image) -> int | None:
    """Give the bits of a pixel that a file says it uses, if it says so."""
    tiles = getattr(image, "tile", None)
    if image.format == "PPM" and tiles and tiles[0][0].startswith("ppm"):
        return 16  # Pillow has scaled the values by the largest that the header names
    largest = getattr(image, "tag_v2", {}).get(MAX_SAMPLE_VALUE)
    largest = largest[0] if isinstance(largest, tuple) else largest
    return int(largest).bit_length() if largest else None


def to_rgb(image: Image.Image, depth: int | None = None) -> tuple[Image.Image, str | None]:
    """Convert an image of any mode to RGB, on white where it is transparent.

    Args:
        depth: bits of a pixel, where the file says it.

    Returns:
        The image, and how its numbers were scaled if they are no bytes.
    """
    scale = image.info.get("assumed")
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        numbers, scale = scale_numbers(np.asarray(image), depth)
        return Image.fromarray(numbers).convert("RGB"), scale
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB"), scale
    return image.convert("RGB"), scale


def scale_numbers(values: np.ndarray, depth: int | None = None) -> tuple[np.ndarray, str | None]:
    """Turn numbers into bytes by what the file says or, where it does not, they hold.

    Numbers from 0 on use as many bits as the largest one needs, of 8, 10, 12, 14, 16 or
    more, and keep the upper 8 of these; fractions up to 1 are shares of white. With
    numbers below 0 the smallest becomes black and the largest white. What is no number
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
    elif np.issubdtype(values.dtype, np.floating) and high <= 1 and depth is None:
        scaled, assumed = numbers * 256, "fractions from 0 to 1"
    else:
        needed = int(high).bit_length()
        bits = depth or next((each for each in DEPTHS if each >= needed), needed)
        scaled, assumed = numbers / 2.0 ** (bits - 8), None if depth else f"{bits} bits in use"
    return np.clip(scaled, 0, 255).astype(np.uint8), assumed
