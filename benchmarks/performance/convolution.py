"""How much faster our 3x3 convolution is, forward and backward, in float32.

    python -m benchmarks.performance.convolution --out=results/convolution.json

PyTorch's own and that of fedssl/networks/convolution.py in turns, in one process, for the
maps of a ResNet-18; medians. Ratios mean something; absolute figures depend on the machine.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fedssl.federation.resources import count_cores
from fedssl.networks.convolution import winograd
from fedssl.runs.provenance import provenance

IMAGES = 256  # views of a step
CASES = ((2, 512), (4, 256), (8, 128), (16, 64), (4, 512), (8, 256), (16, 128), (32, 64))


def plain(images: Tensor, weight: Tensor) -> Tensor:
    """Convolve as `nn.Conv2d` does."""
    return F.conv2d(images, weight, padding=1)


def time_step(
    convolve: Callable[[Tensor, Tensor], Tensor], images: Tensor, weight: Tensor
) -> float:
    """Time one pass forward and backward, in seconds."""
    images.grad = weight.grad = None
    began = time.perf_counter()
    output = convolve(images, weight)
    output.backward(torch.ones_like(output))
    return time.perf_counter() - began


def compare(side: int, channels: int, repeats: int) -> dict[str, float]:
    """Measure both for maps of so many pixels and channels, after one step to warm up."""
    shapes = ((IMAGES, channels, side, side), (channels, channels, 3, 3))
    images, weight = (
        torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
        for shape in shapes
    )
    times: dict[str, list[float]] = {"plain": [], "winograd": []}
    for _ in range(repeats + 1):
        times["plain"].append(time_step(plain, images, weight))
        times["winograd"].append(time_step(winograd, images, weight))
    plain_s, winograd_s = (statistics.median(found[1:]) for found in times.values())
    return {
        "side": side,
        "channels": channels,
        "plain_ms": round(1000 * plain_s, 1),
        "winograd_ms": round(1000 * winograd_s, 1),
        "ratio": round(plain_s / winograd_s, 2),
    }


def main() -> None:
    """Measure all maps; print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(count_cores())
    result = {
        "command": "python -m benchmarks.performance.convolution",
        "measured": provenance(),
        "rows": [],
    }
    for side, channels in CASES:
        row = compare(side, channels, given.repeats)
        result["rows"].append(row)
        print(f"{side:3} x {side:<3}{channels:5} channels: {row['ratio']:.2f} times", flush=True)
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
