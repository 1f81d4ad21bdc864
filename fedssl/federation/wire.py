"""Fewer bytes for a model on its way: rounded to bfloat16, 8 or 4 bits, then entropy-coded.

A message carries the rounded weights; the server keeps the exact ones. A reply carries the
rounded change that training made. What rounding takes from a change is added to the client's
next one: error feedback, Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient
Compression Schemes", https://arxiv.org/abs/1901.09847.

Matrices and convolutions are rounded, by rows: those of an output. Vectors, such as biases and
BatchNorm's statistics, travel as they are; they are few.
"""

import zlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Wire = Literal["float32", "bfloat16", "int8", "int4"]
State = Mapping[str, Tensor]
DOWN: Mapping[Wire, Wire] = {  # what the weights of a message are rounded to
    "float32": "float32",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "int4": "int8",  # 4 bits are too few for weights, which nothing corrects
}
STEP = "step "  # before the name of an array, in that of its rows' steps
LARGEST_8, LARGEST_4 = 127, 7  # of the whole numbers
STEP_4 = 0.7  # of a row's root mean square: 2.6 bits a number, of a normal distribution


def is_rounded(tensor: Tensor) -> bool:
    """Tell whether an array is one of those that are rounded."""
    return tensor.is_floating_point() and tensor.ndim > 1


def encode(state: State, wire: Wire) -> dict[str, Tensor]:
    """Round a state: whole numbers with a step for each row, or bfloat16.

    Returns:
        An array of shape (R, ...) as int8 of that shape, and its steps as float32 (R,) by the
        name with STEP before it; or as bfloat16. Vectors and counters as they are.

    Raises:
        FloatingPointError: a number is not finite.
    """
    coded: dict[str, Tensor] = {}
    for name, value in state.items():
        if not is_rounded(value) or wire == "float32":
            coded[name] = value
            continue
        if not torch.isfinite(value).all():
            raise FloatingPointError(f"array {name!r} of the update is not finite")
        if wire == "bfloat16":
            coded[name] = value.bfloat16()
            continue
        rows = value.flatten(1)
        if wire == "int8":
            largest, step = LARGEST_8, rows.abs().amax(1) / LARGEST_8
        else:
            largest, step = LARGEST_4, rows.square().mean(1).sqrt() * STEP_4
        numbers = (rows / step.clamp(min=torch.finfo(step.dtype).tiny)[:, None]).round()
        coded[name] = numbers.clamp(-largest, largest).to(torch.int8).reshape(value.shape)
        coded[f"{STEP}{name}"] = step
    return coded


def decode(coded: State) -> dict[str, Tensor]:
    """Give what `encode` left of a state, in float32.

    Raises:
        ValueError: steps are missing or odd.
    """
    state: dict[str, Tensor] = {}
    for name, value in coded.items():
        if name.startswith(STEP):
            continue
        step = coded.get(f"{STEP}{name}")
        if value.dtype == torch.int8 and value.ndim > 1:
            if step is None or step.shape != value.shape[:1] or step.dtype != torch.float32:
                raise ValueError(f"array {name!r} lacks a step for each row")
            wide = step.reshape(-1, *[1] * (value.ndim - 1))
            state[name] = value.float() * wide
        else:
            state[name] = value.float() if value.dtype == torch.bfloat16 else value
    return state


def encode_update(
    start: State, trained: State, left: State, wire: Wire
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Round the change that training made, and what earlier rounding has left of others.

    Args:
        start: as the message brought it.
        left: as this function gave it the last time; nothing the first time.

    Returns:
        What travels, and what is left for the next time, itself in 8 bits.

    Raises:
        FloatingPointError: a number is not finite.
    """
    earlier = decode(left)
    change = {
        name: value - start[name] + earlier.get(name, 0.0) if is_rounded(value) else value
        for name, value in trained.items()
    }
    coded = encode(change, wire)
    arrived = decode(coded)
    rest = {n: change[n] - arrived[n] for n, value in change.items() if is_rounded(value)}
    return coded, encode(rest, "int8")


def add_update(start: State, coded: State) -> dict[str, Tensor]:
    """Give the trained state of a client: the server's exact one, and the change it sent.

    Raises:
        ValueError: an array is none of the model's, or the change can't be read.
    """
    trained = {}
    for name, value in decode(coded).items():
        if name not in start:
            raise ValueError(f"array {name!r} is unknown")
        if value.shape != start[name].shape:
            raise ValueError(f"array {name!r} has shape {tuple(value.shape)}")
        trained[name] = start[name] + value if is_rounded(value) else value
    return trained


def compress(data: bytes) -> bytes:
    """Give frequent bytes few bits; nothing here repeats, so no search for that."""
    stream = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    return stream.compress(data) + stream.flush()


def decompress(data: bytes, most: int) -> bytes:
    """Give back what `compress` was given.

    Args:
        most: bytes that this may be.

    Raises:
        ValueError: it is more, or something else.
    """
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, most)
    except zlib.error as error:
        raise ValueError(f"its arrays can't be decompressed ({error})") from error
    if not stream.eof or stream.unused_data:
        raise ValueError(f"its arrays are cut off, or more than {most / 1e6:,.1f} MB")
    return found
