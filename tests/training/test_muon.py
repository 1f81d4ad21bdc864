import pytest
import torch
from torch import nn

from fedssl.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(8, 8), (8, 50), (50, 8)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalize(1000 * matrix)  # the scale does not matter
    turned = left.T @ found @ right.T
    torch.testing.assert_close(turned, torch.diag(turned.diag()), rtol=0, atol=1e-4)
    likely = turned.diag()[values > 0.02 * values.norm()]
    assert len(likely) >= 7
    assert likely.min() > 0.6
    assert turned.diag().max() < 1.25


def test_bfloat16_is_precise_enough():
    matrix = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    exact, coarse = orthogonalize(matrix), orthogonalize(matrix.bfloat16())
    assert coarse.dtype == torch.bfloat16
    assert (coarse - exact).norm() < 0.04 * exact.norm()
    weight = nn.Parameter(torch.zeros(64, 300))
    weight.grad = matrix
    Muon([weight], lr=0.1, dtype=torch.bfloat16).step()
    assert weight.dtype == torch.float32
    assert (weight.detach() + 0.1 * exact).norm() < 0.004 * exact.norm()


def test_taps_that_nothing_reaches_stay_and_cost_nothing(monkeypatch):
    shapes = []
    monkeypatch.setattr(
        "fedssl.training.muon.orthogonalize", lambda m: shapes.append(m.shape) or orthogonalize(m)
    )
    inner, whole = nn.Parameter(torch.ones(4, 6, 1, 1)), nn.Parameter(torch.ones(4, 6, 3, 3))
    inner.grad = torch.randn(4, 6, 1, 1, generator=torch.Generator().manual_seed(0))
    whole.grad = torch.zeros_like(whole)
    whole.grad[:, :, 1, 1] = inner.grad[:, :, 0, 0]
    Muon([inner, whole], lr=0.1).step()
    assert shapes == [(4, 6), (4, 6)]
    torch.testing.assert_close(whole[:, :, 1, 1], inner[:, :, 0, 0])
    whole.data[:, :, 1, 1] = 1
    assert torch.equal(whole, torch.ones_like(whole))


def test_a_gradient_of_zeros_moves_nothing():
    assert torch.equal(orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))
    weight = nn.Parameter(torch.ones(3, 5, 3, 3))
    weight.grad = torch.zeros_like(weight)
    Muon([weight], lr=0.1).step()
    assert torch.equal(weight, torch.ones_like(weight))


@pytest.mark.parametrize(("outputs", "inputs", "scale"), [(6, 2, 3), (2, 6, 1)])
def test_a_step_is_of_the_given_length_in_every_direction(outputs, inputs, scale):
    weight = nn.Parameter(torch.zeros(outputs, inputs, 1, 1))
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.1).step()
    expected = -0.1 * scale**0.5 * orthogonalize((1.95 * weight.grad).flatten(1))
    torch.testing.assert_close(weight.detach().flatten(1), expected)


def test_momentum_remembers_and_weights_without_gradient_stay():
    moved, still = (nn.Parameter(torch.zeros(3, 3, 3, 3)) for _ in range(2))
    optimizer = Muon([moved, still], lr=0.1, momentum=0.5)
    moved.grad = torch.randn(moved.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    before = moved.detach().clone()
    moved.grad = torch.zeros_like(moved)
    optimizer.step()
    assert not torch.equal(moved, before)
    assert torch.equal(still, torch.zeros_like(still))
