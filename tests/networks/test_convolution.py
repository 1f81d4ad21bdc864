"""Fast convolutions are convolutions, and taken only where they pay."""

import copy

import pytest
import torch
from samples import make_encoder
from torch import nn

from fedssl.networks.convolution import MAX_SIDE, MIN_BATCH, Conv3x3, minimal_filtering, winograd


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


@pytest.mark.parametrize("side", [2, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_winograd_is_the_convolution(side, memory):
    plain = nn.Conv2d(5, 7, 3, padding=1, bias=False, dtype=torch.float64)
    fast = copy.deepcopy(plain)
    fast.forward = lambda images: winograd(images, fast.weight)
    images = torch.randn(3, 5, side, side, dtype=torch.float64).to(memory_format=memory)
    expected, found = both_ways(plain, fast, images)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize(("side", "products"), [(2, 3), (3, 5), (4, 6), (6, 10), (8, 12)])
def test_filtering_takes_so_many_multiplications(side, products):
    filtering = minimal_filtering(side, torch.float32)
    assert filtering.tiles * filtering.products == products
    assert filtering.values.shape == (products, side)


@pytest.mark.parametrize("side", [1, 5, 7])
def test_other_sides_are_refused(side):
    with pytest.raises(ValueError, match=f"side of {side}"):
        minimal_filtering(side, torch.float32)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_float32_loses_nothing_that_matters_to_an_encoder(size):
    exact = make_encoder().double()
    fast = copy.deepcopy(exact).float()
    images = torch.rand(MIN_BATCH, 3, size, size)
    torch.testing.assert_close(fast(images).double(), exact(images.double()), rtol=1e-3, atol=1e-3)


def test_only_batches_in_float32_take_winograds_way(monkeypatch):
    taken = []

    def watch(images, weight):
        taken.append(images.shape)
        return winograd(images, weight)

    monkeypatch.setattr("fedssl.networks.convolution.winograd", watch)
    conv = Conv3x3(8, 8, 3, 1, 1, bias=False)
    images = torch.randn(MIN_BATCH, 8, 4, 4)
    conv(images[1:])
    conv(images[:, :, :, :3])
    conv(torch.randn(MIN_BATCH, 8, MAX_SIDE + 4, MAX_SIDE + 4))
    Conv3x3(8, 8, 3, 2, 1, bias=False)(images)
    conv.double()(images.double())
    conv.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        conv(images)
    assert taken == []
    conv(images)
    assert taken == [(MIN_BATCH, 8, 4, 4)]


def test_training_may_follow_inference():
    minimal_filtering.cache_clear()
    conv = Conv3x3(8, 8, 3, 1, 1, bias=False)
    images = torch.randn(MIN_BATCH, 8, 4, 4)
    with torch.inference_mode():
        conv(images)
    conv(images).sum().backward()
    assert conv.weight.grad is not None


def test_every_3x3_convolution_of_an_encoder_is_fast_and_keeps_its_name():
    encoder = make_encoder()
    found = {name: m for name, m in encoder.named_modules() if isinstance(m, nn.Conv2d)}
    fast = {name for name, conv in found.items() if isinstance(conv, Conv3x3)}
    assert fast == {name for name, conv in found.items() if conv.kernel_size == (3, 3)}
    assert {"conv1", "layer1.0.conv1", "layer4.1.conv2"} <= fast


def test_taking_a_convolution_over_shares_its_weights():
    plain = nn.Conv2d(4, 6, 3, 2, 1, bias=False)
    assert Conv3x3.of(plain).weight is plain.weight
