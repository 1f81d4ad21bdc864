"""3x3 convolutions that leave out what small maps never use."""

import torch.nn.functional as F
from torch import Tensor, nn


class Conv3x3(nn.Conv2d):
    """A padded 3x3 convolution without bias.

    Small images end as a single pixel long before the last layer; there eight of nine
    taps would multiply padding and are left out. The result is that of `nn.Conv2d`.
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
        return super().forward(images)
