import math

import pytest
import torch
import torchvision

from fedssl.networks.encoder import make_encoder, stem_for
from fedssl.networks.state import load_state
from model import SimCLR, nt_xent
from utils import build_model

CPU = torch.device("cpu")


def naive_nt_xent(projections, temperature):
    """Equation 1 of the paper, loop by loop."""
    rows = len(projections)
    unit = [z / z.norm() for z in projections.double()]
    total = 0.0
    for i in range(rows):
        j = (i + rows // 2) % rows
        others = [math.exp(unit[i] @ unit[k] / temperature) for k in range(rows) if k != i]
        total -= math.log(math.exp(unit[i] @ unit[j] / temperature) / sum(others))
    return total / rows


@pytest.mark.parametrize("images", [2, 3, 8])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_the_formula(images, temperature):
    projections = torch.randn(2 * images, 5, generator=torch.Generator().manual_seed(images))
    expected = naive_nt_xent(projections, temperature)
    assert float(nt_xent(projections, temperature)) == pytest.approx(expected, rel=1e-5)


def test_nt_xent_does_not_care_which_view_comes_first():
    first, second = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    forward = nt_xent(torch.cat([first, second]), 0.5)
    assert torch.isclose(forward, nt_xent(torch.cat([second, first]), 0.5))


def test_nt_xent_of_equal_projections_is_the_logarithm_of_the_choices():
    assert float(nt_xent(torch.ones(12, 3), 0.5)) == pytest.approx(math.log(11))


def test_nt_xent_of_separated_pairs_has_its_closed_form():
    views = torch.eye(4).repeat(2, 1)  # partners equal, all else orthogonal
    expected = math.log(1 + 6 * math.exp(-1 / 0.5))
    assert float(nt_xent(views, 0.5)) == pytest.approx(expected, rel=1e-6)


def test_nt_xent_computes_in_float32_under_autocast():
    projections = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(projections, 0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, nt_xent(projections, 0.1))


@pytest.mark.parametrize("rows", [0, 2, 5])
def test_nt_xent_refuses_fewer_than_two_images(rows):
    with pytest.raises(ValueError, match="at least two images"):
        nt_xent(torch.randn(rows, 4), 0.5)


@pytest.mark.parametrize(("image_size", "side"), [(8, 8), (32, 32), (64, 32), (96, 48), (224, 56)])
def test_the_stem_follows_the_image_size(image_size, side):
    encoder = make_encoder("resnet18", stem_for(image_size))
    images = torch.zeros(1, 3, image_size, image_size)
    stem = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images))))
    assert stem.shape == (1, 64, side, side)


@pytest.mark.parametrize(("architecture", "features"), [("resnet18", 512), ("resnet50", 2048)])
def test_the_encoder_has_torchvisions_names(architecture, features):
    encoder = make_encoder(architecture, "imagenet")
    plain = getattr(torchvision.models, architecture)()
    missing, unexpected = plain.load_state_dict(encoder.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    network = SimCLR(architecture, "conv3x3_stride1", 64, 32, [0.5] * 3, [0.5] * 3).eval()
    images = torch.rand(2, 3, 16, 16)
    assert network.features(images).shape == (2, features)
    assert network(images).shape == (2, 32)


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_deep_heads_project_earlier_stages(architecture):
    deep = ["layer1", "layer3"]
    network = SimCLR(architecture, "conv3x3_stride2", 64, 32, [0.5] * 3, [0.5] * 3, deep).eval()
    views = torch.rand(4, 3, 32, 32)
    last, *others = network.project_stages(views)
    torch.testing.assert_close(last, network(views))
    assert [other.shape for other in others] == [(4, 32)] * 2
    torch.testing.assert_close(network.stages(views)["layer4"], network.features(views))
    (third,) = [network.deep_heads["layer3"](network.stages(views)["layer3"])]
    torch.testing.assert_close(others[1], third)


@pytest.mark.parametrize("size", [8, 32])
def test_the_encoder_computes_what_torchvisions_does(size):
    ours = make_encoder("resnet18", "imagenet")
    theirs = torchvision.models.resnet18()
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(16, 3, size, size)  # BatchNorm over a few values magnifies rounding
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("names", [("resnet34", "imagenet"), ("resnet18", "wide")])
def test_unknown_architectures_are_refused(names):
    with pytest.raises(ValueError, match="unknown"):
        make_encoder(*names)


def test_the_seed_alone_decides_the_initialization(config):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = build_model(config.model, config.dataset, 1, CPU).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(8)
    again = build_model(config.model, config.dataset, 1, CPU).state_dict()
    other = build_model(config.model, config.dataset, 2, CPU).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.conv1.weight"], other["encoder.conv1.weight"])


@pytest.mark.parametrize("defect", ["missing", "unknown", "shape"])
def test_a_wrong_state_is_named(model, defect):
    state = model.state_dict()
    if defect == "missing":
        del state["encoder.bn1.weight"]
    elif defect == "unknown":
        state["encoder.bn1.extra"] = torch.zeros(1)
    else:
        state["encoder.bn1.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=rf"{defect}.*encoder\.bn1|encoder\.bn1.*{defect}"):
        load_state(model, state)
