"""A model's weights as they travel: one Flower array, so that few requests carry them.

Flower sends every array as objects of its own, each with its own requests; on
a slow network their number costs more than their bytes (see benchmarks/wire.py).
"""

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

PACKED = "safetensors"


def pack_state(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Put all tensors, with names, shapes and dtypes, into one array of bytes."""
    data = save({name: tensor.contiguous() for name, tensor in state.items()})
    return ArrayRecord({PACKED: Array(np.frombuffer(data, dtype=np.uint8))})


def unpack_state(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Take the tensors out again.

    Raises:
        ValueError: the record holds something else.
    """
    if list(arrays) != [PACKED]:
        raise ValueError(f"arrays {sorted(arrays)[:3]} instead of {PACKED!r}")
    try:
        data = arrays[PACKED].numpy()  # refuses pickled objects
        if data.dtype == np.uint8 and data.ndim == 1:
            return load(data.tobytes())
    except (SafetensorError, TypeError, ValueError, EOFError) as error:
        raise ValueError(f"{PACKED!r} can't be read ({error})") from error
    raise ValueError(f"{PACKED!r} holds {data.dtype} {data.shape}, not bytes")
