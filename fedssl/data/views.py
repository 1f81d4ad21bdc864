"""SimCLR's random views for a whole batch at once, each image with its own parameters.

Shapes: B images, 3 channels, H x W pixels. Crop, flip, shear and rotation are
one resampling; brightness, contrast, saturation, hue and grayscale are one affine
map of the colours, clamped once at the end (torchvision clamps after each).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in PIL and torchvision
RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a view. Probabilities are per image, strengths as in torchvision.

    Attributes:
        output_size: side of the views in pixels.
        crop_scale: range of the crop's share of the area.
        crop_ratio: range of width / height, drawn log-uniformly.
        flip: probability of a horizontal flip.
        rotation: largest rotation in degrees, to both sides.
        shear: largest horizontal shear, pixels per pixel of height, to both sides.
        jitter: probability that the colours of an image are jittered at all.
        brightness, contrast, saturation: factor from [1 - s, 1 + s].
        hue: rotation of the hue from [-s, s] turns (s at most 0.5).
        grayscale: probability of losing the colours.
        blur: probability of a Gaussian blur.
        blur_sigma: range of the blur's standard deviation in pixels.
    """

    output_size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float
    rotation: float
    shear: float
    jitter: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale: float
    blur: float
    blur_sigma: tuple[float, float]

    def two_views(self, images: Tensor, generator: Generator) -> Tensor:
        """Draw two views of uint8 images (B, 3, H, W).

        Args:
            generator: on the CPU, whatever the device of the images; the same
                state gives the same views.

        Returns:
            float32 (2B, 3, output_size, output_size) in [0, 1]; rows i and
            i + B show the same image.
        """
        pixels = images.float() / 255
        pixels = pixels.repeat(2, 1, 1, 1)
        views = resample(pixels, self._draw_geometry(pixels.shape, generator), self.output_size)
        views = self._recolor(views, generator)
        return self._maybe_blur(views, generator) if self.blur > 0 else views

    def _draw_geometry(self, shape: torch.Size, generator: Generator) -> Tensor:
        """Map output to input coordinates, both in [-1, 1]: (B, 2, 3)."""
        count, _, height, width = shape
        box = draw_crops(count, height, width, self.crop_scale, self.crop_ratio, generator)
        center_x, center_y, share_x, share_y = box.unbind(1)
        mirror = 1 - 2 * (torch.rand(count, generator=generator) < self.flip).float()
        turn = torch.rand(count, generator=generator) * 2 - 1
        angle = turn * math.radians(self.rotation)
        slant = self.shear * (torch.rand(count, generator=generator) * 2 - 1)
        cos, sin = torch.cos(angle), torch.sin(angle)
        # Mirror, then shear, then turn, then shrink to the crop.
        row_x = [share_x * cos * mirror, share_x * (cos * slant - sin), center_x]
        row_y = [share_y * sin * mirror, share_y * (sin * slant + cos), center_y]
        return torch.stack([torch.stack(row_x, dim=1), torch.stack(row_y, dim=1)], dim=1)

    def _recolor(self, views: Tensor, generator: Generator) -> Tensor:
        count = len(views)

        def factor(strength: float) -> Tensor:
            value = 1 + strength * (2 * torch.rand(count, generator=generator) - 1)
            return value.clamp(min=0)

        factors = [factor(s) for s in (self.brightness, self.contrast, self.saturation)]
        turns = self.hue * (2 * torch.rand(count, generator=generator) - 1)
        jittered = torch.rand(count, generator=generator) < self.jitter
        gray = torch.rand(count, generator=generator) < self.grayscale
        brightness, contrast, saturation = (torch.where(jittered, f, 1.0) for f in factors)
        turns = torch.where(jittered, turns, 0.0)
        saturation, turns = torch.where(gray, 0.0, saturation), torch.where(gray, 0.0, turns)
        parameters = (brightness, contrast, saturation, turns)
        return recolor(views, *(p.to(views.device, non_blocking=True) for p in parameters))

    def _maybe_blur(self, views: Tensor, generator: Generator) -> Tensor:
        low, high = self.blur_sigma
        sigma = low + (high - low) * torch.rand(len(views), generator=generator)
        blurred = torch.rand(len(views), generator=generator) < self.blur
        # A sigma this small leaves the image as it is.
        sigma = torch.where(blurred, sigma, 1e-3)
        return gaussian_blur(views, sigma.to(views.device), radius=math.ceil(2 * high))


def make_augmentation(spec: Mapping[str, Any], output_size: int) -> Augmentation:
    """Build the views of the `augment` section."""
    values: dict[str, Any] = {
        key: value if isinstance(value, int | float) else tuple(value)
        for key, value in spec.items()
    }
    return Augmentation(output_size, **values)


def draw_crops(
    count: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: Generator,
) -> Tensor:
    """Draw random resized crops as torchvision does, without rounding to pixels.

    Each image takes the first of ten boxes that fits, or the whole image.

    Returns:
        (count, 4): centre x and y in [-1, 1], share of the width and height.
    """
    shape = (count, CROP_ATTEMPTS)
    area = scale[0] + (scale[1] - scale[0]) * torch.rand(shape, generator=generator)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * torch.rand(shape, generator=generator))
    aspect = aspect * height / width  # from pixels to shares of the sides
    share_x, share_y = torch.sqrt(area * aspect), torch.sqrt(area / aspect)
    fits = (share_x <= 1) & (share_y <= 1)
    first = fits.int().argmax(dim=1, keepdim=True)  # 0 where none fits
    some = fits.any(dim=1)
    share_x = torch.where(some, share_x.gather(1, first)[:, 0], 1.0)
    share_y = torch.where(some, share_y.gather(1, first)[:, 0], 1.0)
    place = 2 * torch.rand(count, 2, generator=generator) - 1
    center_x, center_y = place[:, 0] * (1 - share_x), place[:, 1] * (1 - share_y)
    return torch.stack([center_x, center_y, share_x, share_y], dim=1)


def resample(images: Tensor, geometry: Tensor, output_size: int) -> Tensor:
    """Sample images (B, 3, H, W) bilinearly at an affine grid, edges repeated.

    Args:
        geometry: (B, 2, 3), maps output to input coordinates in [-1, 1].
    """
    shape = [len(images), 3, output_size, output_size]
    grid = F.affine_grid(geometry.to(images.device, non_blocking=True), shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def recolor(
    images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor
) -> Tensor:
    """Apply the four jitters in this order as one affine map, then clamp to [0, 1].

    Hue turns the chroma plane of YIQ, which keeps the luma; torchvision turns
    HSV instead: the same direction, but the luma moves too.

    Args:
        images: float (B, 3, H, W) in [0, 1].
        brightness, contrast, saturation: factors (B,), 1 for none.
        hue: turns (B,), 0 for none.
    """
    device = images.device
    luma = torch.tensor(LUMA, device=device)
    identity = torch.eye(3, device=device)
    column = (-1, 1, 1)
    # Contrast blends with the mean luma of the brightened image.
    mean_luma = brightness * (images.mean(dim=(2, 3)) @ luma)
    offset = ((1 - contrast) * mean_luma).view(-1, 1).expand(-1, 3)
    scale = (brightness * contrast).view(column) * identity
    to_gray = luma.expand(3, 3)
    desaturate = saturation.view(column) * identity + (1 - saturation).view(column) * to_gray
    matrix = hue_rotation(hue) @ desaturate
    matrix, offset = matrix @ scale, (matrix @ offset.unsqueeze(2))
    flat = torch.baddbmm(offset, matrix, images.flatten(2))
    return flat.clamp_(0, 1).view_as(images)


def hue_rotation(turns: Tensor) -> Tensor:
    """Colour matrices (B, 3, 3) that turn the chroma of YIQ by `turns` (B,)."""
    to_yiq = torch.tensor(RGB_TO_YIQ, device=turns.device)
    angle = -2 * math.pi * turns  # the way HSV counts hues: red, green, blue
    cos, sin = torch.cos(angle), torch.sin(angle)
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    rows = [one, zero, zero, zero, cos, -sin, zero, sin, cos]
    turn = torch.stack(rows, dim=1).view(-1, 3, 3)
    return torch.linalg.inv(to_yiq) @ turn @ to_yiq


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each image with its own sigma (B,) in pixels, edges reflected."""
    count, channels, height, width = images.shape
    radius = min(radius, height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets / sigma.view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    padded = F.pad(images, [radius] * 4, mode="reflect")
    flat = padded.reshape(1, count * channels, height + 2 * radius, width + 2 * radius)
    flat = F.conv2d(flat, kernel.view(-1, 1, 1, 2 * radius + 1), groups=count * channels)
    flat = F.conv2d(flat, kernel.view(-1, 1, 2 * radius + 1, 1), groups=count * channels)
    return flat.view_as(images)


def shrink(images: Tensor, resolution: int) -> Tensor:
    """Shrink square float images (N, 3, S, S) to `resolution` pixels where they are larger."""
    if images.shape[-1] <= resolution:
        return images
    return F.interpolate(images, size=(resolution, resolution), mode="bilinear", antialias=True)
