"""The model as a Flax module: layers, attention, its KV cache, and the batches that go through it."""
