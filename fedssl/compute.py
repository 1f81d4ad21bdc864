"""The device, the precision and the memory that a process uses."""

import ctypes
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Backend:
    """Where and how exactly a process computes.

    Attributes:
        dtype: of the autocast forward passes, float32 for none.
    """

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> torch.autocast:
        """Give the context in which forward passes run."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def __str__(self) -> str:
        return f"device {self.device.type}, precision {str(self.dtype).removeprefix('torch.')}"


def choose_backend(precision: str, num_gpus: float | None = None) -> Backend:
    """Choose device and dtype, see `choose_device` and `choose_dtype`."""
    device = choose_device(num_gpus)
    return Backend(device, choose_dtype(precision, device))


def release_memory() -> None:
    """Give freed memory back to the system, which glibc may keep by the hundred megabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def choose_device(num_gpus: float | None = None) -> torch.device:
    """Choose CUDA where there is a GPU, unless this process was granted no share of it (0)."""
    return torch.device("cuda" if num_gpus != 0 and torch.cuda.is_available() else "cpu")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Choose the autocast type: bfloat16 where "auto" finds hardware for it, else float32."""
    if precision != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32
