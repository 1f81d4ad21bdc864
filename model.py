"""The SimCLR network, its loss, and what is read from a frozen encoder.

SimCLR: Chen et al., "A Simple Framework for Contrastive Learning of Visual
Representations", https://arxiv.org/abs/2002.05709.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18, resnet50

from convolution import Conv3x3

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


class SimCLR(Encoder):
    """An encoder and the projection heads that only the loss sees.

    With deep supervision (Lee et al., https://arxiv.org/abs/1409.5185) earlier stages have
    heads and losses of their own, so that they learn from the first step on.
    """

    def __init__(
        self,
        architecture: str,
        stem: str,
        projection_hidden: int,
        projection_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        deep_supervision: Sequence[str] = (),
    ) -> None:
        """Build all parts at random initialization.

        Args:
            architecture, stem, mean, std: see `Encoder`.
            projection_hidden, projection_size: widths of the two-layer heads.
            deep_supervision: names of earlier stages with heads of their own.
        """
        super().__init__(architecture, stem, mean, std)
        sizes = projection_hidden, projection_size
        self.projection_head = make_head(self.feature_size, *sizes)
        widths = {name: self.feature_size >> 3 - STAGES.index(name) for name in deep_supervision}
        self.deep_heads = nn.ModuleDict({n: make_head(w, *sizes) for n, w in widths.items()})

    def forward(self, views: Tensor) -> Tensor:
        """Project views (B, 3, H, W) in [0, 1] to the loss's space (B, projection_size)."""
        return self.projection_head(self.features(views))

    def project_stages(self, views: Tensor) -> list[Tensor]:
        """Project views to what `forward` gives, and beside it those of each deep head."""
        stages = self.stages(views)
        deep = [head(stages[name]) for name, head in self.deep_heads.items()]
        return [self.projection_head(stages[STAGES[-1]]), *deep]


def make_head(features: int, hidden: int, size: int) -> nn.Sequential:
    """Build a projection head from features (B, features) to projections (B, size)."""
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, size),
    )


def build_model(
    model: Mapping[str, Any], dataset: Mapping[str, Any], seed: int, device: torch.device
) -> SimCLR:
    """Build the network of a run at the initialization that the seed gives.

    Args:
        model, dataset: these sections of the configuration; the stem "auto"
            follows the image size.
    """
    stem = stem_for(dataset["image_size"]) if model["stem"] == "auto" else model["stem"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = SimCLR(
            model["encoder"],
            stem,
            model["projection_hidden"],
            model["projection_size"],
            dataset["mean"],
            dataset["std"],
            model["deep_supervision"],
        )
    return built.to(device, memory_format=torch.channels_last)


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """Normalized temperature-scaled cross entropy, equation 1 of the SimCLR paper.

    Args:
        projections: (2B, D), B >= 2 images; rows i and i + B are the two views
            of one image. Computed in float32 whatever the dtype.
        temperature: above 0.

    Returns:
        The mean over all 2B anchors, in nats; log(2B - 1) when all projections
        are equal.

    Raises:
        ValueError: an odd number of rows or fewer than two images.
    """
    rows = projections.shape[0]
    if rows % 2 or rows < 4:
        raise ValueError(f"NT-Xent needs two views of at least two images, got {rows} rows")
    with torch.autocast(projections.device.type, enabled=False):
        unit = F.normalize(projections.float(), dim=1)
        similarity = unit @ unit.T / temperature
        similarity.fill_diagonal_(-torch.inf)
        partner = torch.arange(rows, device=unit.device).roll(rows // 2)
        return F.cross_entropy(similarity, partner)


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a complete state, by name.

    Raises:
        ValueError: a missing, unknown or misshapen array, named.
    """
    own = model.state_dict()
    odd = sorted(own.keys() ^ state.keys())
    if odd:
        kind = "missing" if odd[0] in own else "unknown"
        raise ValueError(f"{kind} array {odd[0]!r} ({len(odd)} names differ)")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
            raise ValueError(f"array {name!r} has shape {shapes}")
    model.load_state_dict(state)
