"""States of networks: loaded by name, and their checksum."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


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


def norm_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """List the BatchNorm layers by name, in the module's order."""
    return {n: layer for n, layer in module.named_modules() if isinstance(layer, _BatchNorm)}


def state_digest(module: nn.Module) -> str:
    """Hash every parameter and buffer of a module's state, names included, to 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
