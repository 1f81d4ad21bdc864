"""States of networks, loaded by name."""

from collections.abc import Mapping

from torch import Tensor, nn


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a complete state, by name.

    Raises:
        ValueError: a missing, unknown or misshapen array, named.
    """
    own = model.state_dict()
    odd = sorted(own.keys() ^ state.keys())
    if odd:
        kind = "missing" if odd[0] in own else "unknown"
        raise ValueError(f"{kind} array {odd[0]!r} ({len(odd)} names differ)")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
            raise ValueError(f"array {name!r} has shape {shapes}")
    model.load_state_dict(state)
