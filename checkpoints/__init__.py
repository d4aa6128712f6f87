"""Checkpoints of all formats -> config, tokenizer and weights on the devices; and conversion between formats."""

import sharding  # noqa: F401  (keeps the CUDA plugin quiet: before jax is imported)
