"""From files and bytes to pixels of one size."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from fedssl.data.sources.base import Encoded


def decode_batches(
    images: Iterator[Encoded], image_size: int, batch_size: int
) -> Iterator[list[tuple[Encoded, np.ndarray | None]]]:
    """Decode images, a batch after the other, by as many threads as PyTorch uses.

    Each image comes with `decode`'s result.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        while batch := list(islice(images, batch_size)):
            pixels = pool.map(lambda image: decode(image.data, image_size), batch)
            yield list(zip(batch, pixels, strict=True))


def decode(data: bytes | Path | np.ndarray, image_size: int) -> np.ndarray | None:
    """Decode an image of any size and mode to uint8 (3, image_size, image_size).

    The shorter side is resized, the longer one cropped to the middle.
    Transparent pixels become white, 16-bit images keep their upper 8 bits, and
    the camera's rotation is applied.

    Returns:
        None where the image can't be read.
    """
    try:
        with _open(data) as image:
            rgb = ImageOps.exif_transpose(to_rgb(image))
            if rgb.size != (image_size, image_size):
                rgb = ImageOps.fit(rgb, (image_size, image_size), Image.Resampling.BILINEAR)
            return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # PIL raises any of these on broken files


def _open(data: bytes | Path | np.ndarray) -> Image.Image:
    if isinstance(data, np.ndarray):
        return Image.fromarray(data)
    return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, on white where it is transparent."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) * 255 / max(high - low, 1e-9)).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
