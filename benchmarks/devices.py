"""The peak speed of a device's matrix products: from a table for known GPUs, else measured."""

from __future__ import annotations

import time

import torch

# Dense bfloat16 or float16 products with float32 sums, in TFLOP/s, as NVIDIA's data sheets and white papers give them.
# The first name that the device's name contains counts, so longer names come first.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "H200": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 4080 SUPER": 104.4,
    "RTX 4080": 97.5,
    "RTX 3090 Ti": 80.0,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}


def known_peak(name: str) -> float | None:
    """The 16-bit peak of a GPU in TFLOP/s by its name; None where the table lacks it."""
    words = name.replace("-", " ").split()
    for known, peak in PEAK_TFLOPS.items():
        model = known.split()
        if any(words[start : start + len(model)] == model for start in range(len(words))):
            return peak
    return None


def device_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The device's peak in TFLOP/s, and the source of that number."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        peak = known_peak(torch.cuda.get_device_name(device))
        if peak is not None:
            return peak, "data sheet"
    return measured_peak(device, dtype), "measured matrix product"


def measured_peak(device: torch.device, dtype: torch.dtype, size: int | None = None, seconds: float = 0.5) -> float:
    """TFLOP/s of the fastest of some products of two matrices [size, size]."""
    size = size or (4096 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    fastest, until = float("inf"), time.perf_counter() + seconds
    for number in range(1000):
        started = time.perf_counter()
        torch.mm(a, b)
        wait_for(device)
        fastest = min(fastest, time.perf_counter() - started)
        if number >= 5 and time.perf_counter() > until:  # the first ones prepare
            break
    return 2 * size**3 / fastest / 1e12


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
