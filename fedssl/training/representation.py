"""Is the representation still alive? What contrastive learning can lose without a word.

The loss alone does not tell: a collapsed representation, all images in one
point or on one line, can look like a slow start.
"""

import torch
from torch import Tensor
from torch.nn import functional


def measure_representation(projections: Tensor) -> dict[str, float]:
    """Measure how a batch's projections lie on the unit sphere.

    - alignment: mean squared distance of the two views of an image, from 0 to 4,
      and uniformity: log of the mean of exp(-2 |x - y|^2) over pairs of
      different images, at most 0; both of https://arxiv.org/abs/2005.10242
      (alpha = 2, t = 2).
    - effective rank: exp of the entropy of the normalized singular values,
      from 1 to the smaller side of the matrix; Roy and Vetterli,
      https://ieeexplore.ieee.org/document/7098875, as in RankMe,
      https://arxiv.org/abs/2210.02885.

    Args:
        projections: (2B, D), the second view of an image B rows behind the first.
    """
    unit = functional.normalize(projections.float(), dim=1).double()
    first, second = unit.chunk(2)
    alignment = float((first - second).square().sum(dim=1).mean())
    uniformity = torch.pdist(first).square().mul(-2).exp().mean().log()
    values = torch.linalg.svdvals(unit)
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    entropy = torch.special.entr(shares).sum()
    return {
        "alignment": alignment,
        "uniformity": float(uniformity),
        "effective-rank": float(entropy.exp()),
    }
