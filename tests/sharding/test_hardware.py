"""Hardware by name, and the stand-ins for devices that are not here."""

from __future__ import annotations

import re

import jax
import pytest

from sharding.hardware import KNOWN, absent_devices, hardware, named
from sharding.layout import make_layout
from sharding.mesh import device_memory
from sharding.targets import target_devices, target_kinds

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("target", "count", "name"),
    [
        ("4xH100", 4, "H100"),
        ("H200", 1, "H200"),
        ("2x RTX 4090", 2, "RTX-4090"),
        ("2Xrtx4090", 2, "RTX-4090"),
        ("4xV100", 4, "V100-32GB"),
        ("8xA100-80GB", 8, "A100-80GB"),
        ("8xa100", 8, "A100-40GB"),
        ("4xv6e", 4, "TPU-v6e"),
        ("4xTPU v5p", 4, "TPU-v5p"),
        ("L4", 1, "L4"),
    ],
)
def test_a_target_is_a_count_and_a_name(target: str, count: int, name: str) -> None:
    devices = absent_devices(target)
    assert len(set(devices)) == count
    assert {device.hardware.name for device in devices} == {name}
    assert hardware(devices[0]) is devices[0].hardware


def test_a_target_may_be_hosts() -> None:
    devices = absent_devices("2x8xH100")
    assert [device.process_index for device in devices] == [0] * 8 + [1] * 8 and len(set(devices)) == 16
    assert [device.process_index for device in absent_devices("3 x RTX 4090")] == [0] * 3
    layout = make_layout("gathered-2x8", devices, 64)
    assert (layout.hosts("data"), layout.hosts("model")) == (2, 1)
    layout = make_layout("tensor", devices, 64)
    assert (layout.hosts("data"), layout.hosts("model")) == (1, 2)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("0x8xH100", "name a count from 1 to 64 and a device, such as 4xH100, or hosts of so many, such as 2x8xH100"),
        ("65x8xH100", "name a count from 1 to 64"),
        ("2x2x2xH100", "name a count from 1 to 64"),
        ("4xH1000", r"unknown hardware 'H1000'; there are V100-32GB, .*H100.* TPU-v6e"),
        ("4xTPU", "unknown hardware 'TPU'"),
        ("0xH100", "name a count from 1 to 64 and a device, such as 4xH100"),
        ("65xH100", "name a count from 1 to 64"),
        ("", "name a count"),
        ("4x", "unknown hardware '4x'"),
        ("x", "unknown hardware 'x'"),
        ("-4xH100", "unknown hardware '-4xH100'"),
    ],
)
def test_other_targets_are_refused(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        absent_devices(target)


def test_names_are_not_ambiguous() -> None:
    assert [named(known.name) for known in KNOWN] == list(KNOWN)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("Tesla V100-PCIE-32GB", "V100-PCIe-32GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("TPU v5 lite", "TPU-v5e"),
        ("TPU v5", "TPU-v5p"),
        ("TPU v6 lite", "TPU-v6e"),
    ],
)
def test_devices_are_known_by_what_jax_calls_them(kind: str, name: str) -> None:
    assert next(known for known in KNOWN if re.search(known.kind, kind)).name == name


def test_a_stand_in_can_be_laid_out() -> None:
    layout = make_layout("replicated-2x2", absent_devices("4xV100"), 64)
    assert (layout.platform, layout.capability) == ("gpu", 7.0)
    assert layout.sharding(("rows", "ffn")).shard_shape((8, 8)) == (4, 4)
    assert device_memory(layout.mesh.devices.flat[0]) == 32510 << 20
    assert make_layout("tensor", absent_devices("4xv6e"), 64).platform == "tpu"


def test_descriptions_to_compile_for_agree() -> None:
    """Bandwidth and capability of those that there is a description of."""
    for kind in target_kinds():
        try:
            device: jax.Device = target_devices(kind, 1)[0]
        except RuntimeError as error:
            pytest.skip(str(error))
        assert hardware(device) == named(kind), kind
        assert str(device.compute_capability) == named(kind).capability
