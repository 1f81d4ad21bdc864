"""The encoder: a ResNet from images to features."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18, resnet50

from fedssl.networks.convolution import Conv3x3

ENCODERS = {"resnet18": resnet18, "resnet50": resnet50}
STAGES = ("layer1", "layer2", "layer3", "layer4")
STEMS = ("auto", "conv3x3_stride1", "conv3x3_stride2", "imagenet")


def stem_for(image_size: int) -> str:
    """Name the stem that keeps a useful feature map for images of this size in pixels."""
    if image_size <= 40:
        return "conv3x3_stride1"
    return "conv3x3_stride2" if image_size <= 128 else "imagenet"


def make_encoder(architecture: str, stem: str) -> ResNet:
    """Build a torchvision ResNet without its classifier, features as output.

    The parameter names are torchvision's, so `encoder.safetensors` loads into
    `torchvision.models.resnet18()` once its `conv1` has the stem's shape.

    Args:
        architecture: "resnet18" (512 features) or "resnet50" (2048 features).
        stem: "conv3x3_stride1" and "conv3x3_stride2" replace the first
            convolution and drop the max-pooling (the paper's change for small
            images, appendix B.9); "imagenet" keeps torchvision's own stem.

    Raises:
        ValueError: an unknown architecture or stem.
    """
    if architecture not in ENCODERS:
        raise ValueError(f"unknown encoder {architecture!r}, known: {', '.join(ENCODERS)}")
    if stem not in STEMS[1:]:
        raise ValueError(f"unknown stem {stem!r}, known: {', '.join(STEMS[1:])}")
    encoder = ENCODERS[architecture](weights=None)
    encoder.fc = nn.Identity()
    if stem != "imagenet":
        stride = 1 if stem == "conv3x3_stride1" else 2
        encoder.conv1 = nn.Conv2d(3, 64, 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    for block in encoder.modules():
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer.groups == 1:
                setattr(block, name, Conv3x3.of(layer))
    return encoder


class Encoder(nn.Module):
    """A ResNet from images to features, with the channel statistics taken off its input."""

    def __init__(
        self, architecture: str, stem: str, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        """Build it at random initialization.

        Args:
            architecture, stem: see `make_encoder`.
            mean, std: three channel statistics of images in [0, 1]; they are
                constants and no part of the state.
        """
        super().__init__()
        self.architecture, self.stem = architecture, stem
        self.encoder = make_encoder(architecture, stem)
        self.feature_size = 512 * self.encoder.layer4[-1].expansion
        for name, value in (("mean", mean), ("std", std)):
            statistics = torch.tensor(value, dtype=torch.float32).view(1, 3, 1, 1)
            self.register_buffer(name, statistics, persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to features (B, feature_size)."""
        return self.encoder(self._normalize(images))

    def stages(self, images: Tensor) -> dict[str, Tensor]:
        """Encode images to the mean over the map of each stage, (B, width); layer4's are features.

        Widths are 64, 128, 256 and 512, four times that in a ResNet-50.
        """
        network, pooled = self.encoder, {}
        maps = network.relu(network.bn1(network.conv1(self._normalize(images))))
        maps = network.maxpool(maps)
        for name in STAGES:
            maps = getattr(network, name)(maps)
            pooled[name] = network.avgpool(maps).flatten(1)
        return pooled

    def _normalize(self, images: Tensor) -> Tensor:
        normalized = (images - self.mean) / self.std
        return normalized.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images, as `features` does."""
        return self.features(images)
