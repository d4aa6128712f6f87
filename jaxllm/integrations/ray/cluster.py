"""Where workers run: a Ray cluster, how many there are, and what of a node each takes."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from jaxllm.requests.outputs import RequestError

KNOCK = 10.0  # seconds in which a cluster's head answers


@dataclass(frozen=True)
class Place:
    """What workers take.

    Attributes:
      workers: how many; None: as many as the cluster's nodes hold, and of those that take CPUs alone one a node.
      num_gpus: of each worker, all on one node; None: a node's, the fewest that one with any has; without GPUs its TPUs.
      num_cpus: of each.
      resources: others of each, by their names in Ray: {"TPU": 4}.
    """

    workers: int | None = None
    num_gpus: float | None = None
    num_cpus: float = 1
    resources: Mapping[str, float] = field(default_factory=dict)

    def filled(self) -> Place:
        """With what is None found in the cluster. Raises RequestError where no node holds a worker."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus, resources = self.num_gpus, dict(self.resources)
        if gpus is None:
            gpus = 0 if resources else _of_a_node(nodes, "GPU")
            if not gpus and not resources and (tpus := _of_a_node(nodes, "TPU")):
                resources = {"TPU": tpus}
        place = replace(self, num_gpus=gpus, resources=resources)
        if self.workers is not None:
            if self.workers < 1:
                raise RequestError(f"{self.workers} workers: give 1 at least")
            return place
        wanted = {name: amount for name, amount in {"GPU": gpus, **resources}.items() if amount}
        if not wanted:
            return replace(place, workers=sum(node.get("CPU", 0) >= self.num_cpus for node in nodes) or 1)
        workers = sum(min(int(node.get(name, 0) // amount) for name, amount in wanted.items()) for node in nodes)
        if not workers:
            said = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
            raise RequestError(f"no node of the cluster has {said} for a worker: ask for fewer")
        return replace(place, workers=workers)

    def options(self) -> dict[str, Any]:
        """Of an actor. One without accelerators does not look for any."""
        found: dict[str, Any] = {
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus or 0,
            "resources": dict(self.resources) or None,
        }
        if not self.num_gpus and not self.resources:
            found["runtime_env"] = {"env_vars": {"JAX_PLATFORMS": "cpu"}}
        # Jobs restart workers themselves, with a bound that looks at what was achieved between two deaths.
        return found | {"scheduling_strategy": "SPREAD", "max_restarts": 0, "max_task_retries": 0}


def _of_a_node(nodes: list[dict[str, float]], name: str) -> float:
    """How much of a resource a node has: the least of those that have any."""
    return min((node[name] for node in nodes if node.get(name)), default=0)


@contextmanager
def cluster(address: str) -> Iterator[None]:
    """Connected to the cluster at `address`: "auto", "local" or host:port, as `ray.init` takes it.

    Where this process is connected already, that is used and kept. Raises RequestError where there is no cluster.
    """
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise RequestError(f"no Ray cluster answers at {address} ({first}): start one with `ray start --head`") from error
    try:
        yield
    finally:
        ray.shutdown()


def knock(address: str) -> None:
    """Raises OSError where nobody listens at host:port: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        socket.create_connection((host, int(port)), KNOCK).close()
