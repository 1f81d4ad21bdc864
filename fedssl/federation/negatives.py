"""Negatives from other clients: points drawn where their projections lie.

A client that holds few classes never sees images of the others, so nothing keeps these
apart from its own. It tells mean and covariance of its projections; the server draws points
from the normal distributions of all clients, and each client takes those of the others for
further negatives. No projection of an image travels.
"""

from collections.abc import Mapping

import torch
from flwr.app import RecordDict
from torch import Tensor

from fedssl.federation.messages import pack_tensors, read_tensors, unpack_tensors
from fedssl.seeding import generator_for

NEGATIVES = "negatives"  # an entry of the config record of a training message
POINTS, OWNERS = "points", "owners"
MEAN, COVARIANCE = "mean", "covariance"
SHARED = "shared."  # before a partition: what it told, among the arrays of a checkpoint
COUNT = 2048  # points of a round, of all clients together
CLIENTS = 64  # whose moments are kept, the newest
JITTER = 1e-3  # share of the mean variance added to each, so that few images give a distribution


def read_projections(content: RecordDict, size: int) -> dict[str, Tensor]:
    """Read mean (D,) and covariance (D, D) of projections.

    Args:
        size: of a projection.

    Raises:
        ValueError: what is wrong with it.
    """
    told = read_tensors(content, "moments of projections")
    shapes = {MEAN: (size,), COVARIANCE: (size, size)}
    if told.keys() != shapes.keys():
        raise ValueError(f"the moments of its projections are {sorted(told)[:3]}")
    for name, shape in shapes.items():
        if told[name].shape != shape or told[name].dtype != torch.float32:
            raise ValueError(f"the {name} of its projections is {tuple(told[name].shape)}")
        if not torch.isfinite(told[name]).all():
            raise ValueError(f"the {name} of its projections is not finite")
    _factor(told[COVARIANCE])
    return told


def draw_negatives(told: Mapping[int, Mapping[str, Tensor]], seed: int, round_number: int) -> bytes:
    """Draw points for a round, as many for each client, with the partitions they are of.

    Args:
        told: by partition, what each told last; two clients at least.

    Returns:
        Packed, float32 (N, D) and int64 (N,), N at most 2,048.
    """
    generator = generator_for(seed, "negatives", round_number)
    partitions = sorted(told)
    each = COUNT // len(partitions)
    points = [
        told[p][MEAN]
        + torch.randn(each, len(told[p][MEAN]), generator=generator)
        @ _factor(told[p][COVARIANCE]).T
        for p in partitions
    ]
    owners = torch.tensor(partitions).repeat_interleave(each)
    return pack_tensors({POINTS: torch.cat(points), OWNERS: owners})


def others(packed: object, partition: int) -> Tensor | None:
    """Take the points of the other clients out of a training message; None where it has none.

    Raises:
        ValueError: the message holds something else.
    """
    if not isinstance(packed, bytes):
        return None
    drawn = unpack_tensors(packed)
    return drawn[POINTS][drawn[OWNERS] != partition]


def newest(told: Mapping[int, Mapping[str, Tensor]]) -> dict[int, Mapping[str, Tensor]]:
    """Keep the clients that told last, of whom `told` has the newest at its end."""
    return dict(list(told.items())[-CLIENTS:])


def flatten(told: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name what clients told for a checkpoint, in its order."""
    return {
        f"{SHARED}{place}.{partition}.{name}": value
        for place, (partition, each) in enumerate(told.items())
        for name, value in each.items()
    }


def unflatten(arrays: Mapping[str, Tensor]) -> dict[int, Mapping[str, Tensor]]:
    """Take what clients told out of the arrays of a checkpoint."""
    found: dict[tuple[int, int], dict[str, Tensor]] = {}
    for name, value in arrays.items():
        if name.startswith(SHARED):
            _, place, partition, kind = name.split(".")
            found.setdefault((int(place), int(partition)), {})[kind] = value
    return {partition: found[place, partition] for place, partition in sorted(found)}


def _factor(covariance: Tensor) -> Tensor:
    """Factor a covariance, (D, D) lower.

    Raises:
        ValueError: it is none.
    """
    if not torch.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6):
        raise ValueError("the covariance of its projections is not symmetric")
    variances = covariance.diagonal()
    jitter = JITTER * variances.mean() + torch.finfo(torch.float32).tiny
    factor, failed = torch.linalg.cholesky_ex(covariance + jitter * torch.eye(len(covariance)))
    if failed or not torch.isfinite(factor).all():
        raise ValueError("the covariance of its projections has negative variances")
    return factor
