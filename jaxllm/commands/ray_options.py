"""The options of commands that run on a Ray cluster, and the workers that they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jaxllm.commands.model_options import options_of

if TYPE_CHECKING:
    from jaxllm.integrations.ray.crew import Crew
    from jaxllm.integrations.ray.workers import Model


def add_ray(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("many nodes (jaxllm[ray])")
    where.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: auto, local, or host:port of its head")
    where.add_argument("--ray-workers", type=int, metavar="N", help="how many models (default: as many as the nodes hold)")
    where.add_argument("--ray-gpus", type=float, metavar="N", help="GPUs of each, on one node (default: all of a node's)")
    where.add_argument("--ray-cpus", type=float, metavar="N", default=1, help="CPUs of each (default 1)")


def check_ray() -> None:
    """Raises ValueError that says what to install."""
    try:
        import jaxllm.integrations.ray  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--ray: {error}") from error


def model_of(args: argparse.Namespace) -> Model:
    """The model of a command's options, as workers make it. Each of them has its devices in one process."""
    if any(vars(args).get(name) is not None for name in ("coordinator", "processes", "process_id")):
        raise ValueError("--ray divides rows between models of one process each: leave --coordinator and its like out")
    from jaxllm.integrations.ray.workers import Model

    return Model.of(args.model, options_of(args), args.virtual_devices)


@contextmanager
def crew_on_ray(args: argparse.Namespace, kind: Callable[..., Any], *arguments: Any) -> Iterator[Crew]:
    """Workers of a class of `integrations.ray.workers`, on the cluster that the command names."""
    from jaxllm.integrations.ray import Place, cluster
    from jaxllm.integrations.ray.workers import crew_of

    with cluster(args.ray):
        place = Place(args.ray_workers, args.ray_gpus, args.ray_cpus).filled()
        with crew_of(kind, place, *arguments) as crew:
            yield crew
