"""Accuracy on multiple-choice questions."""
