"""The encoder against torchvision's own, its stems and its stages."""

import copy

import pytest
import torch
import torchvision
from samples import STATISTICS, make_encoder
from torch import nn

from fedssl.networks.encoder import STAGES, Conv3x3, Encoder, EncoderSettings, stem_for


@pytest.mark.parametrize(("image_size", "side"), [(8, 8), (32, 32), (64, 32), (96, 48), (224, 56)])
def test_the_stem_follows_the_image_size(image_size, side):
    encoder = make_encoder(stem=stem_for(image_size))
    images = torch.zeros(1, 3, image_size, image_size)
    stem = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
    assert stem.shape == (1, 64, side, side)


@pytest.mark.parametrize(
    ("side", "stem"),
    [
        (40, "conv3x3_stride1"),
        (41, "conv3x3_stride2"),
        (128, "conv3x3_stride2"),
        (129, "imagenet"),
    ],
)
def test_stems_change_at_these_sizes(side, stem):
    assert stem_for(side) == stem


@pytest.mark.parametrize(("architecture", "features"), [("resnet18", 512), ("resnet50", 2048)])
def test_the_encoder_has_torchvisions_names_and_shapes(architecture, features):
    encoder = make_encoder(architecture, "imagenet")
    plain = getattr(torchvision.models, architecture)()
    missing, unexpected = plain.load_state_dict(encoder.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    assert list(encoder.state_dict()) == list(plain.state_dict())[:-2]  # in their order
    assert encoder.feature_size == features
    assert encoder.eval()(torch.rand(2, 3, 16, 16)).shape == (2, features)


def test_a_small_stem_loads_once_torchvisions_conv1_has_its_shape():
    encoder = make_encoder(stem="conv3x3_stride1").eval()
    plain = torchvision.models.resnet18().eval()
    plain.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    plain.maxpool = plain.fc = torch.nn.Identity()
    plain.load_state_dict(encoder.state_dict())
    images = torch.rand(4, 3, 12, 12)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in STATISTICS)
    expected = plain((images - mean) / std)
    torch.testing.assert_close(encoder(images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "size"), [("resnet18", 8), ("resnet18", 32), ("resnet50", 8)]
)
def test_the_encoder_computes_what_torchvisions_does(architecture, size):
    ours = make_encoder(architecture, "imagenet")
    theirs = getattr(torchvision.models, architecture)()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(16, 3, size, size, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in STATISTICS)
    for mode in (True, False):
        ours.train(mode), theirs.train(mode)
        expected = theirs((images - mean) / std)
        # BatchNorm over a few values magnifies rounding.
        torch.testing.assert_close(ours(images), expected, rtol=1e-3, atol=2e-3)
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-3, atol=1e-3)


def test_the_channel_statistics_are_taken_off_but_do_not_travel():
    plain = Encoder(EncoderSettings("resnet18", "conv3x3_stride2", [0.0] * 3, [1.0] * 3)).eval()
    shifted = Encoder(
        EncoderSettings("resnet18", "conv3x3_stride2", [0.1, 0.2, 0.3], [0.5, 1, 2])
    ).eval()
    assert "mean" not in shifted.state_dict()
    shifted.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 16, 16)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 1, 2])
    normalized = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(shifted(images), plain(normalized))


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_the_last_stage_gives_the_features_and_widths_are_told(architecture):
    encoder = make_encoder(architecture, "conv3x3_stride2").eval()
    images = torch.rand(2, 3, 32, 32)
    stages = encoder.stages(images)
    assert tuple(stages) == STAGES
    torch.testing.assert_close(stages["layer4"], encoder(images))
    for name, pooled in stages.items():
        assert pooled.shape == (2, encoder.width(name))
    assert encoder.width("layer4") == encoder.feature_size


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (("resnet34", "imagenet"), "unknown encoder 'resnet34', known: resnet18, resnet50"),
        (("resnet18", "wide"), "unknown stem 'wide', known: conv3x3_stride1"),
    ],
)
def test_unknown_architectures_are_refused(names, remedy):
    with pytest.raises(ValueError, match=remedy):
        make_encoder(*names)


def test_the_seed_alone_decides_the_initialization():
    first, again, other = (make_encoder(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def both_ways(plain, other, images):
    """Convolve with each; give outputs, and gradients of images and weights."""
    found = []
    for conv in (plain, other):
        inputs = images.clone().requires_grad_()
        output = conv(inputs)
        (output**2).sum().backward()
        found.append((output, inputs.grad, conv.weight.grad))
    return found


@pytest.mark.parametrize("side", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_leaving_out_taps_on_padding_changes_nothing(side, stride):
    plain = nn.Conv2d(5, 7, 3, stride, 1, bias=False, dtype=torch.float64)
    tight = Conv3x3.of(copy.deepcopy(plain))
    images = torch.randn(4, 5, side, side, dtype=torch.float64)
    expected, found = both_ways(plain, tight, images)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a)


def test_every_3x3_convolution_of_an_encoder_is_replaced_and_keeps_its_name():
    encoder = make_encoder()
    found = {name: m for name, m in encoder.named_modules() if isinstance(m, nn.Conv2d)}
    tight = {name for name, conv in found.items() if isinstance(conv, Conv3x3)}
    assert tight == {name for name, conv in found.items() if conv.kernel_size == (3, 3)}
    assert {"conv1", "layer1.0.conv1", "layer4.1.conv2"} <= tight


def test_taking_a_convolution_over_shares_its_weights():
    plain = nn.Conv2d(4, 6, 3, 2, 1, bias=False)
    assert Conv3x3.of(plain).weight is plain.weight
