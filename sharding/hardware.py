"""Rates of accelerators by their makers' data sheets, the ceilings of a roofline; stand-ins for devices that are not here."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jax

MIB, GIB = 1 << 20, 1 << 30
NVLINK, PCIE, ICI = 12e-6, 30e-6, 4e-6  # seconds that a small exchange takes, by the way it goes
LAUNCH = 2e-6  # seconds
NETWORK = 20e-6  # seconds more that one between hosts takes
MOST = 64  # devices of a host of a target, and hosts


@dataclass(frozen=True)
class Hardware:
    """Rates of one device. FLOPs are those of dense products; the link is all of it, to its neighbours, in one direction.

    Attributes:
      name: as a target is called, `H100`.
      kind: regular expression for jax's `device_kind`.
      memory: bytes, as the driver reports them; TPUs: those a program can have.
      flops: FLOPs a second of 16-bit products added in float32.
      float32_flops: FLOPs a second of float32 products that are not rounded to TF32.
      bandwidth: bytes a second between the chip and its memory.
      link: bytes a second to the other devices of the machine.
      hop: seconds that a collective takes at least.
      capability: NVIDIA's compute capability; None of others.
      curve: where measured, (rows, seconds that a product with so many takes for each number of its matrix), rows increasing.
      cache_rate: where measured, bytes a second of the cache that attention of single tokens goes through.
      gather_rate: where measured, bytes a second that a device gets of the others' shards of an array.
      launch: seconds that an operation takes at least.
      network: bytes a second to other hosts, a device's share of what its maker's own machines have; None: as the link.
    """

    name: str
    kind: str
    memory: int
    flops: float
    float32_flops: float
    bandwidth: float
    link: float
    hop: float
    capability: str | None
    curve: tuple[tuple[int, float], ...] = ()
    cache_rate: float | None = None
    gather_rate: float | None = None
    launch: float = LAUNCH
    network: float | None = None

    @property
    def platform(self) -> str:
        """jax's name of the platform, "gpu" or "tpu"."""
        return "gpu" if self.capability else "tpu"


# In the order in which a device's kind is looked for. Networks: of the DGX of that generation, 100 to 400 Gbit/s for one or two
# GPUs; of machines without NVLink 100 Gbit/s for four. Hosts of a TPU's slice are linked as its chips are.
KNOWN = (
    Hardware("V100-32GB", r"V100-SXM", 32510 * MIB, 125e12, 15.7e12, 900e9, 150e9, NVLINK, "7.0", network=6.25e9),
    Hardware("V100-PCIe-32GB", r"V100", 32510 * MIB, 112e12, 14e12, 900e9, 16e9, PCIE, "7.0", network=3.125e9),
    Hardware("A100-40GB", r"A100-SXM4-40GB", 40536 * MIB, 312e12, 19.5e12, 1555e9, 300e9, NVLINK, "8.0", network=25e9),
    Hardware("A100-80GB", r"A100-SXM4", 81153 * MIB, 312e12, 19.5e12, 2039e9, 300e9, NVLINK, "8.0", network=25e9),
    Hardware("A100-PCIe-80GB", r"A100", 81153 * MIB, 312e12, 19.5e12, 1935e9, 32e9, PCIE, "8.0", network=3.125e9),
    Hardware("H200", r"H200", 143771 * MIB, 989e12, 67e12, 4800e9, 450e9, NVLINK, "9.0", network=50e9),
    Hardware("H100-PCIe", r"H100 PCIe", 81559 * MIB, 756e12, 51e12, 2000e9, 64e9, PCIE, "9.0", network=3.125e9),
    Hardware("H100", r"H100", 81559 * MIB, 989e12, 67e12, 3352e9, 450e9, NVLINK, "9.0", network=50e9),
    Hardware("B200", r"B200", 183359 * MIB, 2250e12, 80e12, 8000e9, 900e9, NVLINK, "10.0", network=50e9),
    Hardware("L40S", r"L40S", 46068 * MIB, 362e12, 91.6e12, 864e9, 32e9, PCIE, "8.9", network=3.125e9),
    Hardware("L4", r"\bL4\b", 23034 * MIB, 121e12, 30.3e12, 300e9, 32e9, PCIE, "8.9", network=3.125e9),
    Hardware("RTX-4090", r"RTX 4090", 24564 * MIB, 165e12, 82.6e12, 1008e9, 32e9, PCIE, "8.9", network=3.125e9),
    # Of four chips in a square each has two neighbours. A float32 product is six of bfloat16.
    Hardware("TPU-v5e", r"TPU v5 ?(lite|e)", 15 * GIB + 768 * MIB, 197e12, 197e12 / 6, 819e9, 90e9, ICI, None),
    Hardware("TPU-v5p", r"TPU v5", 95 * GIB, 459e12, 459e12 / 6, 2765e9, 180e9, ICI, None),
    Hardware("TPU-v6e", r"TPU v6", 31 * GIB + 256 * MIB, 918e12, 918e12 / 6, 1640e9, 180e9, ICI, None),
)


@dataclass(frozen=True)
class AbsentDevice:
    """A stand-in in a `Mesh` for a device that is not here: enough of a `jax.Device` to plan with, not to compile or to run."""

    id: int
    hardware: Hardware
    process_index: int = 0

    @property
    def platform(self) -> str:
        return self.hardware.platform

    @property
    def device_kind(self) -> str:
        return self.hardware.name

    @property
    def compute_capability(self) -> str | None:
        return self.hardware.capability

    def memory_stats(self) -> dict[str, int]:
        """Memory statistics of a device that holds nothing yet."""
        return {"bytes_limit": self.hardware.memory, "bytes_in_use": 0}


def hardware(device: jax.Device | AbsentDevice) -> Hardware | None:
    """Rates of a device; None of one that is not known here."""
    if isinstance(device, AbsentDevice):
        return device.hardware
    return next((known for known in KNOWN if re.search(known.kind, device.device_kind)), None)


def named(name: str) -> Hardware:
    """The hardware of a name, however spelt: `H100`, `rtx4090`, `v6e`; of several kinds, such as of `A100`, the first.

    Raises ValueError that lists those there are.
    """
    names = {_plain(known.name): known for known in KNOWN}
    for known in KNOWN:
        first, _, rest = known.name.partition("-")
        names.setdefault(_plain(rest if first == "TPU" else first), known)
    if found := names.get(_plain(name)):
        return found
    raise ValueError(f"unknown hardware {name!r}; there are {', '.join(known.name for known in KNOWN)}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def absent_devices(target: str) -> list[AbsentDevice]:
    """`4xH100`, `H100` for one, or `2x8xH100` for two hosts of eight -> stand-ins for them.

    Raises ValueError for what is no such target.
    """
    match = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)??(?:(\d+)\s*[xX*]\s*)?((?!\d+\s*[xX*]\s*\S).+)", target.strip())
    hosts, count = (int(match[1] or 1), int(match[2] or 1)) if match else (0, 0)
    if match is None or not (1 <= count <= MOST and 1 <= hosts <= MOST):
        raise ValueError(
            f"target {target!r}: name a count from 1 to {MOST} and a device, such as 4xH100, or hosts of so many, such as "
            "2x8xH100"
        )
    return absent(named(match[3]), count, hosts)


def absent(hardware: Hardware, count: int, hosts: int = 1) -> list[AbsentDevice]:
    """`count` devices on each host."""
    return [AbsentDevice(i, hardware, i // count) for i in range(hosts * count)]
