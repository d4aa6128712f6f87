"""Measurements beside peers and ceilings: `python -m bench.latency` and the others. No part of the wheel."""

import sharding  # noqa: F401  (keeps the CUDA plugin quiet: before jax is imported)
