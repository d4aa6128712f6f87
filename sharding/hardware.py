"""What accelerators can do, by their makers' data sheets: the ceilings of a roofline."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Hardware:
    """Rates of one device. FLOPs are those of dense products; the link is all of it, to its neighbours, in one direction.

    Attributes:
      flops: a second, of 16-bit products added in float32.
      float32_flops: a second, of float32 products that are not rounded to TF32.
      bandwidth: bytes a second between the chip and its memory.
      link: bytes a second to the other devices of the machine.
    """

    name: str
    flops: float
    float32_flops: float
    bandwidth: float
    link: float


# Matched against jax's `device_kind`, in this order.
_KNOWN = [
    (r"V100-SXM", Hardware("V100 SXM2", 125e12, 15.7e12, 900e9, 150e9)),
    (r"V100", Hardware("V100 PCIe", 112e12, 14e12, 900e9, 16e9)),
    (r"A100-SXM4-40GB", Hardware("A100 SXM4 40 GB", 312e12, 19.5e12, 1555e9, 300e9)),
    (r"A100-SXM4", Hardware("A100 SXM4 80 GB", 312e12, 19.5e12, 2039e9, 300e9)),
    (r"A100", Hardware("A100 PCIe", 312e12, 19.5e12, 1935e9, 32e9)),
    (r"H200", Hardware("H200 SXM5", 989e12, 67e12, 4800e9, 450e9)),
    (r"H100 PCIe", Hardware("H100 PCIe", 756e12, 51e12, 2000e9, 64e9)),
    (r"H100", Hardware("H100 SXM5", 989e12, 67e12, 3352e9, 450e9)),
    (r"B200", Hardware("B200", 2250e12, 80e12, 8000e9, 900e9)),
    (r"L40S", Hardware("L40S", 362e12, 91.6e12, 864e9, 32e9)),
    (r"\bL4\b", Hardware("L4", 121e12, 30.3e12, 300e9, 32e9)),
    (r"RTX 4090", Hardware("RTX 4090", 165e12, 82.6e12, 1008e9, 32e9)),
]


def hardware(device: jax.Device) -> Hardware | None:
    """Rates of a device that is known here."""
    return next((known for pattern, known in _KNOWN if re.search(pattern, device.device_kind)), None)
