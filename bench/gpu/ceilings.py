"""What the device can do: copies, products, launches, and the way from the host and back."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.results import Reporter, options_of_a_part
from bench.machine import copy_bandwidth, describe, matmul_rate
from jaxllm.planning.measure import measure


def main() -> None:
    parser = options_of_a_part(__doc__)
    parser.add_argument("--few", action="store_true", help="not what a plan is made of")
    args = parser.parse_args()
    report = Reporter(args)
    report(machine=describe(), memory=jax.devices()[0].memory_stats())
    report(copy_bytes_per_second=copy_bandwidth())
    for dtype in ("bfloat16", "float16", "float32"):
        with report.guarded(dtype):
            report(**{f"{dtype}_flops_per_second": matmul_rate(dtype)})
    report(round_trip_seconds=round_trip())
    if args.few:
        return
    with report.guarded("measure"):
        rates = measure(jax.devices()[:1], "bfloat16")
        report(launch_seconds=rates.launch, cache_bytes_per_second=rates.cache_rate, curve=rates.curve)


def round_trip() -> float:
    """Seconds until a few numbers were put on the device, added to and fetched, as every step of the engine does."""
    add = jax.jit(lambda x: x + 1)
    numbers = np.arange(64, dtype=np.int32)

    def seconds() -> float:
        start = time.perf_counter()
        np.asarray(add(jnp.asarray(numbers)))
        return time.perf_counter() - start

    return statistics.median(seconds() for _ in range(50))


if __name__ == "__main__":
    main()
