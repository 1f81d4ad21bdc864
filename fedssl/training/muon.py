"""Muon: SGD with momentum whose steps on weight matrices have singular values near one.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
https://kellerjordan.github.io/posts/muon/, with their coefficients. The one of
`torch.optim` takes no convolutions and computes in bfloat16 always, which processors
without it only emulate; this one computes in bfloat16 where training does.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 3  # of the five that its authors take: as good in a trial, and cheaper


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix (M, N) near one, between 0.6 and 1.2.

    Newton-Schulz, X <- (a + b X X' + c (X X')^2) X, on the smaller Gram matrix alone, so
    that the long side counts twice and not with every iteration. Singular values below a
    fiftieth of the matrix' norm stay smaller.
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    product = factor = _polynomial(gram)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _polynomial(gram)
        product = factor @ product
    result = product @ wide
    return result if len(matrix) <= matrix.shape[1] else result.T


def _polynomial(gram: Tensor) -> Tensor:
    """Compute a + b G + c G^2."""
    result = torch.addmm(gram, gram, gram, beta=B, alpha=C)
    result.diagonal().add_(A)
    return result


class Muon(Optimizer):
    """Nesterov's momentum, orthogonalized for each weight.

    Weights are seen as matrices: the outputs by everything else. A step is scaled by
    sqrt(max(1, outputs / inputs)), as its authors do.
    """

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Set the optimizer up.

        Args:
            weights: floats, matrices (O, I) or convolutions (O, I, H, W).
            lr: the length of a step in each direction of the matrix.
            momentum: 0 up to 1.
            dtype: of the matrix products, float32 or bfloat16; weights and momentum stay floats.
        """
        super().__init__(weights, {"lr": lr, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override] # takes no closure
        """Move each weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group["lr"], group["momentum"])

    def _move(self, weight: nn.Parameter, grad: Tensor, lr: float, momentum: float) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        velocity = state["momentum_buffer"].mul_(momentum).add_(grad)
        ahead, taps = (_taps_inside(w) for w in (grad.add(velocity, alpha=momentum), weight))
        # On small maps outer taps only see padding.
        used = torch.linalg.vector_norm(ahead, dim=(0, 3)) > 0
        where = slice(None) if used.all() else (slice(None), used)
        direction = ahead[where]
        step = orthogonalize(direction.flatten(1).to(self.dtype)).reshape(direction.shape)
        taps[where] -= lr * max(1, len(weight) / weight[0].numel()) ** 0.5 * step


def _taps_inside(weight: Tensor) -> Tensor:
    """View a weight as (O, H, W, I), which in channels-last memory is its order."""
    return weight.permute(0, 2, 3, 1) if weight.dim() == 4 else weight[:, None, None]
