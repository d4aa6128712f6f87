"""Jitted steps over the decoder: which programs there are, what they are given, sampling, compilation."""
