"""The encoder: a ResNet from images to features."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fedssl.networks.norms import norm_of

BLOCKS: dict[str, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}
STAGES = ("layer1", "layer2", "layer3", "layer4")
STEMS = ("conv3x3_stride1", "conv3x3_stride2", "imagenet")


def stem_for(image_size: int) -> str:
    """Name the stem that keeps a useful feature map for images of this size in pixels."""
    if image_size <= 40:
        return "conv3x3_stride1"
    return "conv3x3_stride2" if image_size <= 128 else "imagenet"


@dataclass(frozen=True)
class EncoderSettings:
    """What an encoder is built from.

    Attributes:
        architecture: "resnet18" (512 features) or "resnet50" (2048 features).
        stem: "conv3x3_stride1" and "conv3x3_stride2" replace the first
            convolution and drop the max-pooling (the change for small images of
            the SimCLR paper, appendix B.9); "imagenet" keeps torchvision's own.
        mean, std: three channel statistics of images in [0, 1].
        norm: see `norm_of`.
    """

    architecture: str
    stem: str
    mean: Sequence[float]
    std: Sequence[float]
    norm: str = "batch"


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


class Encoder(ResNet):
    """A torchvision ResNet without its classifier, the channel statistics taken off its input.

    The parameter names are torchvision's, so that its state loads into
    `torchvision.models.resnet18()` once its `conv1` has the stem's shape.
    """

    mean: Tensor
    std: Tensor
    feature_size: int

    def __init__(self, settings: EncoderSettings) -> None:
        """Build it at random initialization.

        Raises:
            ValueError: an unknown architecture, stem or norm.
        """
        if settings.architecture not in BLOCKS:
            known = ", ".join(BLOCKS)
            raise ValueError(f"unknown encoder {settings.architecture!r}, known: {known}")
        if settings.stem not in STEMS:
            raise ValueError(f"unknown stem {settings.stem!r}, known: {', '.join(STEMS)}")
        super().__init__(*BLOCKS[settings.architecture], norm_layer=norm_of(settings.norm))
        self.settings = settings
        self.feature_size = self.inplanes  # of the last block
        self.fc: nn.Module = nn.Identity()
        if settings.stem != "imagenet":
            stride = 1 if settings.stem == "conv3x3_stride1" else 2
            self.conv1 = nn.Conv2d(3, 64, 3, stride=stride, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool: nn.Module = nn.Identity()
        _leave_padding_out(self)
        for name, value in (("mean", settings.mean), ("std", settings.std)):
            statistics = torch.tensor(value, dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(name, statistics, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to features (B, feature_size)."""
        return super().forward(self._normalize(images))

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Encode images to the mean over the map of each stage, (B, width); layer4's are features.

        Widths are 64, 128, 256 and 512, four times that in a ResNet-50.
        """
        maps = self.relu(self.bn1(self.conv1(self._normalize(images))))
        maps, pooled = self.maxpool(maps), {}
        for name in STAGES:
            maps = getattr(self, name)(maps)
            pooled[name] = self.avgpool(maps).flatten(1)
        return pooled

    def width(self, stage: str) -> int:
        """Count the features of a stage."""
        return self.feature_size >> len(STAGES) - 1 - STAGES.index(stage)

    def _normalize(self, images: Tensor) -> Tensor:
        normalized = (images - self.mean) / self.std
        return normalized.contiguous(memory_format=torch.channels_last)


def _leave_padding_out(network: nn.Module) -> None:
    """Replace the 3x3 convolutions by those that leave out taps on padding alone."""
    for block in network.modules():
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer.groups == 1:
                setattr(block, name, Conv3x3.of(layer))
