"""Continuous batching: who runs in which step, and what becomes of the tokens."""
