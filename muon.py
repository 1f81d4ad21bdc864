"""Muon: SGD with momentum whose steps on weight matrices have singular values near one.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks",
https://kellerjordan.github.io/posts/muon/, with their coefficients. The one of
`torch.optim` takes no convolutions and computes in bfloat16 always, which processors
without it only emulate.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring the singular values of a float matrix (M, N) near one, between 0.7 and 1.2.

    Newton-Schulz, X <- (a + b X X' + c (X X')^2) X, on the smaller Gram matrix alone, so
    that the long side counts twice and not with every iteration. Very small singular
    values stay below; columns of zeros stay zeros.
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    used = (wide != 0).any(dim=0)  # of small images, some taps of a convolution see nothing
    result = torch.zeros_like(wide)
    result[:, used] = _whiten(wide[:, used])
    return result if wide is matrix else result.T


def _whiten(wide: Tensor) -> Tensor:
    """Do the iterations on a matrix (M, N) whose Gram matrix (M, M) is the smaller one."""
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    product = identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(ITERATIONS):
        factor = A * identity + B * gram + C * (gram @ gram)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ wide


class Muon(Optimizer):
    """Nesterov's momentum, orthogonalized for each weight.

    Weights are seen as matrices: the outputs by everything else. A step is scaled by
    sqrt(max(1, outputs / inputs)), as its authors do.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        """Set the optimizer up.

        Args:
            weights: of two or more dimensions, all floats.
            lr: the length of a step in each direction of the matrix.
            momentum: 0 up to 1.
        """
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move each weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group["lr"], group["momentum"])

    def _move(self, weight: nn.Parameter, lr: float, momentum: float) -> None:
        state = self.state[weight]
        if not state:
            state["velocity"] = torch.zeros_like(weight)
        velocity = state["velocity"].mul_(momentum).add_(weight.grad)
        ahead = weight.grad.add(velocity, alpha=momentum).flatten(1)
        outputs, inputs = ahead.shape
        step = orthogonalize(ahead).reshape(weight.shape)
        weight.sub_(step, alpha=lr * max(1, outputs / inputs) ** 0.5)
