"""Layouts, memory and time of a model on given devices, before it is loaded."""
