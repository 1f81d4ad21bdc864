"""The losses against those of Lightly, values and gradients, on random projections."""

import pytest
import torch
from lightly import loss as lightly
from torch.nn.functional import normalize

from fedssl.methods.barlow_twins import barlow_twins
from fedssl.methods.moco import info_nce
from fedssl.methods.simsiam import distance
from fedssl.methods.vicreg import vicreg
from model import nt_xent

QUEUE = normalize(torch.randn(32, 24, generator=torch.Generator().manual_seed(9)))


def lightly_moco(queries, keys):
    loss = lightly.NTXentLoss(temperature=0.2, memory_bank_size=QUEUE.shape)
    loss(QUEUE.clone().requires_grad_(), QUEUE)  # a full queue
    return loss(queries, keys)


PAIRS = {
    "simclr": (lambda a, b: nt_xent(torch.cat([a, b]), 0.3), lightly.NTXentLoss(0.3)),
    "vicreg": (lambda a, b: vicreg(torch.cat([a, b]), 25, 25, 1), lightly.VICRegLoss()),
    "barlow_twins": (lambda a, b: barlow_twins(torch.cat([a, b])), lightly.BarlowTwinsLoss()),
    "simsiam, byol": (distance, lambda a, b: 2 + 2 * lightly.NegativeCosineSimilarity()(a, b)),
    "moco": (lambda a, b: info_nce(a, b, QUEUE, 0.2), lightly_moco),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_gradients_equal_lightlys(name, seed):
    generator = torch.Generator().manual_seed(seed)
    given = torch.randn(2, 16, 24, generator=generator)
    values, gradients = [], []
    for loss in PAIRS[name]:
        first, second = given.clone().requires_grad_().unbind()
        first.retain_grad()
        second.retain_grad()
        value = loss(first, second)
        value.backward()
        values.append(value)
        gradients.append(torch.stack([first.grad, second.grad]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
    assert float(gradients[0].norm()) > 0
