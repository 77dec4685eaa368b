"""Measurements of a model that do not need a patch: activations and their statistics, scores, and the threshold."""
