"""Sharing one job between several processes, and going on with it after it was stopped (docs/scale.md)."""
