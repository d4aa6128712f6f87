"""Meshes, layouts, padding, and what compiled programs say."""

from sharding.absent_gpu import keep_quiet

keep_quiet()  # before anything here imports jax
del keep_quiet
