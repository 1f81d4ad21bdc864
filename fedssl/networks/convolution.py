"""3x3 convolutions that know what small images make of them.

On processors most of the training is 3x3 convolutions of small maps. Winograd's minimal
filtering (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
https://arxiv.org/abs/1509.09308) takes two to four times fewer multiplications. Written as
matrix products it is up to as much faster, and the gradients come by themselves.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SIDE = 8  # of a map; larger ones take longer this way, see benchmarks/convolution.py
MIN_BATCH = 32  # below it, transforming the weights costs more than it saves
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0)  # and infinity


class Conv3x3(nn.Conv2d):
    """A padded 3x3 convolution without bias, fast on small maps.

    Small images end as a single pixel long before the last layer; there eight of
    nine taps would multiply padding and are left out. On processors, somewhat larger
    maps take Winograd's way in float32. The result is that of `nn.Conv2d`, up to rounding.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Conv3x3":
        """Take over a convolution and its weights."""
        stride = conv.stride[0], conv.stride[1]
        new = cls(conv.in_channels, conv.out_channels, 3, stride, 1, bias=False)
        new.weight = conv.weight
        return new

    def forward(self, images: Tensor) -> Tensor:
        """Convolve images (B, C, H, W)."""
        height, width = images.shape[-2:]
        if height <= self.stride[0] and width <= self.stride[1]:
            return F.conv2d(images, self.weight[:, :, 1 : 1 + height, 1 : 1 + width])
        if self._winograd_pays(images):
            return winograd(images, self.weight)
        return super().forward(images)

    def _winograd_pays(self, images: Tensor) -> bool:
        """Tell whether these images (B, C, H, W) can go that way, and are faster so."""
        side = images.shape[-1]
        return (
            images.device.type == "cpu"
            and images.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_exporting()
            and self.stride == (1, 1)
            and images.shape[-2] == side
            and (side == 2 or side % 3 == 0 or side % 4 == 0)
            and side <= MAX_SIDE
            and len(images) >= MIN_BATCH
        )


class Filtering(NamedTuple):
    """A way to filter `side` values by three taps: A ((G taps) * (B values)), by tiles.

    Attributes:
        values: B, (tiles * products, side).
        taps: G, (products, 3).
        outputs: A, (side, tiles * products).
        tiles, products: the multiplications are tiles * products.
    """

    values: Tensor
    taps: Tensor
    outputs: Tensor
    tiles: int
    products: int


def winograd(images: Tensor, weight: Tensor) -> Tensor:
    """Convolve with padding 1 and stride 1 by minimal filtering along both sides.

    Args:
        images: (B, C, S, S), S = 2 or a multiple of 3 or 4.
        weight: (O, C, 3, 3).

    Returns:
        (B, O, S, S), channels last.
    """
    (count, channels, side, _), out = images.shape, len(weight)
    values, taps, outputs, tiles, products = minimal_filtering(side, images.dtype)
    filters = torch.kron(taps, taps) @ weight.permute(2, 3, 1, 0).reshape(9, channels * out)
    filters = filters.view(products**2, channels, out)

    rows = values @ images.permute(2, 3, 0, 1).reshape(side, -1)  # S, S B C
    both = values @ rows.view(tiles * products, side, -1)  # T P, T P, B C
    both = both.view(tiles, products, tiles, products, count, channels)
    both = both.permute(1, 3, 0, 2, 4, 5).reshape(products**2, -1, channels)
    multiplied = both @ filters  # P P, T T B, O
    multiplied = multiplied.view(products, products, tiles, tiles, count, out)
    multiplied = multiplied.permute(2, 0, 3, 1, 4, 5).reshape(tiles * products, -1, count * out)
    columns = outputs @ multiplied  # T P, S, B O
    result = outputs @ columns.view(tiles * products, -1)
    result = result.view(side, side, count, out).permute(2, 3, 0, 1)
    return result.contiguous(memory_format=torch.channels_last)


@functools.lru_cache
@torch.inference_mode(False)  # whoever comes first, gradients may follow
def minimal_filtering(side: int, dtype: torch.dtype) -> Filtering:
    """Find the filtering of `side` values between two zeros, of the padding.

    Tiles of three or four outputs take five or six multiplications, by Toom and Cook's
    interpolation; two outputs between zeros take three.

    Raises:
        ValueError: another side than 2 or a multiple of 3 or 4.
    """
    if side == 2:
        values = torch.tensor([[1, 1], [0, 1], [1, 0]], dtype=dtype)
        taps = torch.tensor([[0, 1, 0], [0, -1, 1], [1, -1, 0]], dtype=dtype)
        return Filtering(values, taps, torch.tensor([[1, 1, 0], [1, 0, 1]], dtype=dtype), 1, 3)
    if side % 3 and side % 4:
        raise ValueError(f"no filtering for a side of {side}, only for 2 and multiples of 3 and 4")
    tile = 4 if side % 4 == 0 else 3
    tiles, products = side // tile, tile + 2
    values = torch.linalg.inv(evaluate(products)).T
    scale = values.abs().amax(dim=1, keepdim=True)  # keeps all numbers near one
    padded = torch.zeros(tiles * products, side + 2, dtype=torch.float64)
    for number in range(tiles):  # neighbours share two values
        begin = number * tile
        rows = slice(number * products, (number + 1) * products)
        padded[rows, begin : begin + products] = values / scale
    taps = evaluate(3, products) * scale
    outputs = torch.block_diag(*[evaluate(tile, products).T] * tiles)
    values, taps, outputs = (
        matrix.to(dtype).contiguous() for matrix in (padded[:, 1:-1], taps, outputs)
    )
    return Filtering(values, taps, outputs, tiles, products)


def evaluate(coefficients: int, points: int | None = None) -> Tensor:
    """Evaluate polynomials at so many of the points, the last at infinity: a Vandermonde matrix.

    Args:
        points: as many as coefficients if left out.
    """
    points = points or coefficients
    finite = torch.tensor(POINTS[: points - 1], dtype=torch.float64)
    powers = finite[:, None] ** torch.arange(coefficients)
    infinity = F.one_hot(torch.tensor([coefficients - 1]), coefficients).double()
    return torch.cat([powers, infinity])
