"""SimCLR and NT-Xent against the paper's formula, loop by loop."""

import math

import pytest
import torch
from samples import make_encoder, make_simclr, state_bytes

from fedssl.methods.base import local_arrays
from model import SimCLR, nt_xent


def naive_nt_xent(projections, temperature, negatives=()):
    """Equation 1 of the paper, loop by loop: anchors, their partners, all others."""
    rows = len(projections)
    points = [*projections.double(), *negatives]
    unit = [[float(x) / float(z.norm()) for x in z] for z in points]

    def similarity(i, k):
        total = 0.0
        for a, b in zip(unit[i], unit[k], strict=True):
            total += a * b
        return total / temperature

    total = 0.0
    for i in range(rows):
        partner = (i + rows // 2) % rows
        others = 0.0
        for k in range(len(points)):
            if k != i:
                others += math.exp(similarity(i, k))
        total -= math.log(math.exp(similarity(i, partner)) / others)
    return total / rows


def random_projections(images, size=5, seed=0):
    return torch.randn(2 * images, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("images", [2, 3, 8])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_the_formula(images, temperature):
    projections = random_projections(images, seed=images)
    expected = naive_nt_xent(projections, temperature)
    assert float(nt_xent(projections, temperature)) == pytest.approx(expected, rel=1e-5)


def test_negatives_of_others_stand_among_the_rest_of_the_formula():
    projections, negatives = random_projections(3), random_projections(4, seed=1).double()
    expected = naive_nt_xent(projections, 0.3, negatives)
    assert float(nt_xent(projections, 0.3, negatives)) == pytest.approx(expected, rel=1e-5)
    assert expected > naive_nt_xent(projections, 0.3) + 0.1


def test_simclr_sees_negatives_of_others_in_training_alone(views):
    torch.manual_seed(0)
    method = SimCLR(make_encoder(), 0.5, 16, 8, shared_negatives=2.0)
    assert method.shares_projections
    plain = [float(method.train(mode).loss(views).reported) for mode in (True, False)]
    seen = []
    points = torch.randn(50, 8)
    for _ in range(2):
        method.take_negatives(points, torch.Generator().manual_seed(3))
        seen.append([float(method.train(mode).loss(views).reported) for mode in (True, False)])
    assert seen[0][0] == seen[1][0] > plain[0]
    assert seen[0][1] == pytest.approx(plain[1], rel=0.2)  # no more than the statistics moved
    method.take_negatives(None, torch.Generator())
    assert method.train()._draw_negatives(4) is None
    assert not make_simclr().shares_projections


def test_nt_xent_does_not_care_which_view_comes_first():
    first, second = random_projections(6).chunk(2)
    forward = nt_xent(torch.cat([first, second]), 0.5)
    assert torch.isclose(forward, nt_xent(torch.cat([second, first]), 0.5))


def test_nt_xent_does_not_care_about_the_order_of_the_images():
    first, second = random_projections(6).chunk(2)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    mixed = nt_xent(torch.cat([first[order], second[order]]), 0.5)
    assert torch.isclose(nt_xent(torch.cat([first, second]), 0.5), mixed)


def test_nt_xent_does_care_whose_view_is_whose():
    """Rows i and i + B are partners; neighbours are not."""
    views = torch.eye(4).repeat(2, 1)
    interleaved = views.view(2, 4, 4).transpose(0, 1).reshape(8, 4)
    assert nt_xent(views, 0.5) < nt_xent(interleaved, 0.5) - 1


def test_nt_xent_of_equal_projections_is_the_logarithm_of_the_choices():
    assert float(nt_xent(torch.ones(12, 3), 0.5)) == pytest.approx(math.log(11))


def test_nt_xent_of_separated_pairs_has_its_closed_form():
    views = torch.eye(4).repeat(2, 1)  # partners equal, all else orthogonal
    expected = math.log(1 + 6 * math.exp(-1 / 0.5))
    assert float(nt_xent(views, 0.5)) == pytest.approx(expected, rel=1e-6)


def test_nt_xent_computes_in_float32_under_autocast():
    projections = random_projections(8, size=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(projections, 0.1)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, nt_xent(projections, 0.1))


@pytest.mark.parametrize("rows", [0, 2, 5])
def test_nt_xent_refuses_fewer_than_two_images(rows):
    with pytest.raises(ValueError, match="at least two images"):
        nt_xent(torch.randn(rows, 4), 0.5)


@pytest.fixture
def views():
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_without_deep_supervision_total_and_reported_are_nt_xent(views):
    method = make_simclr(temperature=0.2).eval()
    losses = method.loss(views)
    (projections,) = method.project(views)
    expected = naive_nt_xent(projections.detach(), 0.2)
    assert float(losses.reported) == pytest.approx(expected, rel=1e-4)
    assert torch.equal(losses.total.detach(), losses.reported)
    assert losses.total.requires_grad
    assert not losses.reported.requires_grad
    assert not losses.projections.requires_grad
    torch.testing.assert_close(losses.projections, projections.detach())


def test_both_views_go_through_the_method_in_their_order(views):
    method = make_simclr().eval()
    (projections,) = method.project(views)
    for half, rows in zip(views.chunk(2), projections.chunk(2), strict=True):
        torch.testing.assert_close(method.project(half)[0], rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_deep_heads_project_earlier_stages(architecture, views):
    encoder = make_encoder(architecture, "conv3x3_stride2")
    method = make_simclr(encoder=encoder, deep=["layer1", "layer3"]).eval()
    last, *others = method.project(views)
    assert [other.shape for other in (last, *others)] == [(8, 128)] * 3
    torch.testing.assert_close(last, method.projection_head(encoder(views)))
    stages = encoder.stages(views)
    for name, found in zip(["layer1", "layer3"], others, strict=True):
        torch.testing.assert_close(found, method.deep_heads[name](stages[name]))


def test_deep_supervision_adds_the_mean_of_its_losses_but_reports_the_last_stages(views):
    method = make_simclr(deep=["layer1", "layer2"]).eval()
    losses = method.loss(views)
    projections = [projected.detach() for projected in method.project(views)]
    last, *deep = (float(nt_xent(each, method.temperature)) for each in projections)
    assert float(losses.reported) == pytest.approx(last, rel=1e-6)
    assert float(losses.total.detach()) == pytest.approx(last + sum(deep) / 2, rel=1e-6)
    losses.total.backward()
    for head in method.deep_heads.values():
        assert float(head[0].weight.grad.norm()) > 0


def test_deep_heads_do_not_change_the_rest_of_the_initialization():
    plain, deep = make_simclr(seed=3), make_simclr(seed=3, deep=["layer2"])
    state = deep.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


def test_all_of_simclrs_state_is_shared():
    method = make_simclr(deep=["layer2"])
    assert method.local_names() == frozenset()
    assert local_arrays(method) == {}
    assert list(method.shared_state()) == list(method.state_dict())
    before = state_bytes(method)
    method.after_step(0.5)
    assert state_bytes(method) == before


class PrivateHead(SimCLR):
    """Keeps its projection head with the client."""

    def local_names(self):
        return frozenset(f"projection_head.{name}" for name in self.projection_head.state_dict())


def test_shared_state_leaves_local_names_out_and_local_arrays_are_copies():
    method = PrivateHead(make_encoder(), 0.5, 16, 8)
    shared = method.shared_state()
    assert list(shared) == [f"encoder.{name}" for name in method.encoder.state_dict()]
    kept = local_arrays(method)
    assert kept.keys() | shared.keys() == method.state_dict().keys()
    assert not kept.keys() & shared.keys()
    torch.nn.init.zeros_(method.projection_head[0].weight)
    assert kept["projection_head.0.weight"].any()
