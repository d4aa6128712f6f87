"""Which process of how many this is, and where process 0 waits for the others."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sharding.mesh import DeviceError

TIMEOUT = 120.0  # seconds in which all are there
_PORT = 8476  # of process 0, where a launcher names none

# Of each launcher: the variables with the number of processes, and this one's.
_LAUNCHERS = (("SLURM_NTASKS", "SLURM_PROCID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("WORLD_SIZE", "RANK"))


@dataclass(frozen=True)
class Distributed:
    """One process of several that run one model.

    Attributes:
      coordinator: host and port at which process 0 waits for the others, as they reach it.
      processes: how many there are.
      process_id: which of them this is, from 0.
      timeout: seconds in which all of them must be there.

    Raises DeviceError for what cannot be.
    """

    coordinator: str
    processes: int
    process_id: int
    timeout: float = TIMEOUT

    def __post_init__(self) -> None:
        if re.fullmatch(r"(\[[^\]]+\]|[^:\s]+):\d{1,5}", self.coordinator) is None or not 0 < self.address[1] < 1 << 16:
            raise DeviceError(f"coordinator {self.coordinator!r}: give HOST:PORT, as the other processes reach process 0")
        if self.processes < 1:
            raise DeviceError(f"{self.processes} processes: give how many there are, this one included")
        if not 0 <= self.process_id < self.processes:
            raise DeviceError(f"process id {self.process_id} of {self.processes} processes: give 0 to {self.processes - 1}")

    @property
    def address(self) -> tuple[str, int]:
        """The coordinator's host and port."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    @classmethod
    def given(cls, coordinator: str | None, processes: int | None, process_id: int | None) -> Distributed | None:
        """What is given, the rest as the launcher of this process says; None where nothing is given."""
        if coordinator is None and processes is None and process_id is None:
            return None
        found = of_launcher(os.environ)
        processes = found[0] if processes is None and found else processes
        process_id = found[1] if process_id is None and found else process_id
        if coordinator == "auto":
            coordinator = _coordinator(os.environ)
        if coordinator is None or processes is None or process_id is None:
            raise DeviceError(
                "--coordinator, --processes and --process-id belong together: give all three, or the first under srun, mpirun or "
                "torchrun"
            )
        return cls(coordinator, processes, process_id)


def of_launcher(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """How many processes Slurm, Open MPI or torchrun has started, and which of them this is; None where it is none of theirs."""
    for count, index in _LAUNCHERS:
        if environ.get(count, "").isdigit() and environ.get(index, "").isdigit():
            return int(environ[count]), int(environ[index])
    return None


def _coordinator(environ: Mapping[str, str]) -> str:
    """Where the launcher says that process 0 is. Raises DeviceError."""
    if "MASTER_ADDR" in environ:
        return f"{environ['MASTER_ADDR']}:{environ.get('MASTER_PORT', _PORT)}"
    if nodes := environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST"):
        return f"{first_of(nodes)}:{_PORT}"
    raise DeviceError("--coordinator auto: no launcher says where process 0 is; give HOST:PORT")


def first_of(nodes: str) -> str:
    """The first host of Slurm's list: of `gpu[03-07,9],cpu1`, `gpu03`."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?", nodes)
    return nodes if found is None else "".join(part or "" for part in found.groups())
