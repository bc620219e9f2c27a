"""The device that a stage computes on, set up so that equal runs give equal numbers."""

from __future__ import annotations

import os

import torch

from ..methods import InvalidInput


def check_device(name: str) -> None:
    """Raises: InvalidInput when the device, "cpu" or "cuda", is not usable: Sievit never falls back in silence."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(
            "device is cuda, and torch sees no usable GPU here",
            f"check the driver for CUDA {torch.version.cuda}, or set device: cpu",
            field="device",
        )


def open_device(name: str) -> torch.device:
    """ "cpu" or "cuda". Raises: InvalidInput as `check_device`."""
    check_device(name)
    if name == "cuda":
        # cuBLAS is deterministic only with a fixed workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        # The fused attention kernels' backward passes add in an order that varies; the plain products do not.
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_flash_sdp(False)
    # On a CPU too: the gradient of an indexed table is added up by all threads at once, in the order they come in.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling what is still empty is a check of torch's own, at a pass over all memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.device(name)


def start_peak(device: torch.device) -> None:
    """Start `peak_mb` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_mb(device: torch.device) -> float | None:
    """The most that torch had allocated on this GPU since `start_peak`, in MB (10^6 bytes); None on a CPU."""
    return round(torch.cuda.max_memory_allocated(device) / 1e6, 1) if device.type == "cuda" else None
