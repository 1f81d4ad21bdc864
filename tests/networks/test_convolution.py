"""Convolutions without the taps that see padding alone are convolutions."""

import copy

import pytest
import torch
from samples import make_encoder
from torch import nn

from fedssl.networks.convolution import Conv3x3


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
