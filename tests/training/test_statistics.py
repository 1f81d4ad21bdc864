"""BatchNorm's statistics, measured anew and pooled over clients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from samples import BACKEND, VIEWS, make_encoder, make_simclr, state_bytes

from fedssl.networks.state import load_state, norm_layers
from fedssl.seeding import generator_for
from fedssl.training.statistics import (
    MEAN,
    SQUARE,
    WHOLE,
    measure_moments,
    pool_moments,
)
from fedssl.training.statistics import (
    VIEWS as OF_VIEWS,
)

SIDE = 8


def measure(method, pixels, rows, batch_size=512, views=VIEWS):
    """Measure on the given rows of digits."""
    return measure_moments(
        method,
        pixels,
        np.asarray(rows),
        views,
        SIDE,
        batch_size=batch_size,
        generator=generator_for(0, "test"),
        backend=BACKEND,
    )


def small():
    return make_simclr(encoder=make_encoder(stem="imagenet"))


def test_the_method_is_as_before(digits):
    method = small().eval()
    before = state_bytes(method)
    measure(method, digits.train.pixels, range(40))
    assert state_bytes(method) == before
    assert not method.training
    assert not any(layer._forward_pre_hooks for layer in norm_layers(method).values())


def test_all_layers_are_measured_on_views_and_the_encoders_on_whole_images(digits):
    method = small()
    moments = measure(method, digits.train.pixels, range(40))
    layers = norm_layers(method)
    inner = [name for name in layers if name.startswith("encoder.")]
    assert 0 < len(inner) < len(layers)
    expected = {f"{OF_VIEWS}{name}{kind}" for name in layers for kind in (MEAN, SQUARE)}
    expected |= {f"{WHOLE}{name}{kind}" for name in inner for kind in (MEAN, SQUARE)}
    assert moments.keys() == expected


def test_of_one_batch_it_is_what_batchnorm_itself_takes(digits):
    """With momentum 1 a forward pass in train mode leaves a batch's own statistics."""
    method = small()
    pooled = pool_moments([measure(method, digits.train.pixels, range(64))], [64])
    for layer in norm_layers(method).values():
        layer.momentum = 1.0
    method.encoder.train()(torch.from_numpy(digits.train.pixels[:64].copy()).float() / 255)
    for name, layer in norm_layers(method.encoder).items():
        place = f"{WHOLE}encoder.{name}"
        torch.testing.assert_close(pooled[f"{place}.running_mean"], layer.running_mean)
        # BatchNorm divides by one less than there are, here at least 64 values.
        torch.testing.assert_close(
            pooled[f"{place}.running_var"], layer.running_var, rtol=0.02, atol=1e-5
        )


def test_the_pool_is_that_of_all_images_in_one_place(digits):
    """Of the first layer, whose input knows no batches: exact means over uneven clients."""
    method, pixels = small(), digits.train.pixels
    parts = [range(0, 10), range(10, 64)]
    told = [measure(method, pixels, part) for part in parts]
    pooled = pool_moments(told, [10, 54])
    together = pool_moments([measure(method, pixels, range(64))], [64])
    for kind in ("running_mean", "running_var"):
        name = f"{WHOLE}encoder.bn1.{kind}"
        torch.testing.assert_close(pooled[name], together[name])
    naive = (told[0][f"{WHOLE}encoder.bn1{MEAN}"] + told[1][f"{WHOLE}encoder.bn1{MEAN}"]) / 2
    assert not torch.allclose(naive, together[f"{WHOLE}encoder.bn1.running_mean"])


def test_the_variance_between_clients_counts():
    told = [
        {f"{OF_VIEWS}a{MEAN}": torch.tensor([mean]), f"{OF_VIEWS}a{SQUARE}": torch.tensor([square])}
        for mean, square in ((0.0, 1.0), (4.0, 17.0))
    ]
    pooled = pool_moments(told, [3, 1])
    assert pooled[f"{OF_VIEWS}a.running_mean"].tolist() == [1.0]
    assert pooled[f"{OF_VIEWS}a.running_var"].tolist() == [1.0 + 3.0]  # within and between


@pytest.mark.parametrize("batch_size", [7, 64])
def test_at_most_so_many_images_are_used(digits, batch_size, monkeypatch):
    from fedssl.training import statistics

    seen, take = [], statistics.get_batch
    monkeypatch.setattr(statistics, "IMAGES", 50)
    monkeypatch.setattr(
        statistics, "get_batch", lambda *given: seen.append(len(given[1])) or take(*given)
    )
    measure(small(), digits.train.pixels, range(100), batch_size)
    assert sum(seen) == 2 * 50
    assert min(seen) >= 2


def test_averaged_weights_have_other_statistics_than_their_clients(digits):
    """The mean of two random networks: the mean of their statistics tells too large variances."""
    pixels, networks = digits.train.pixels, [small(), small()]
    torch.manual_seed(1)
    for parameter in networks[1].parameters():
        torch.nn.init.normal_(parameter, std=float(parameter.detach().std()))
    mean = small()
    states = [network.state_dict() for network in networks]
    load_state(mean, {n: (states[0][n] + states[1][n]) / 2 for n in states[0]})
    name = f"{WHOLE}encoder.layer1.0.bn1.running_var"
    told = [
        pool_moments([measure(network, pixels, range(64))], [64])[name]
        for network in (*networks, mean)
    ]
    assert float(told[2].mean()) < 0.8 * float((told[0] + told[1]).mean() / 2)


def test_the_seed_decides(digits):
    method, pixels = small(), digits.train.pixels
    views = replace(VIEWS, output_size=SIDE)
    first, again = (measure(method, pixels, range(40), views=views) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
