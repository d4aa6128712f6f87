"""Jitted steps over the decoder: their programs and batches, sampling, compilation."""
