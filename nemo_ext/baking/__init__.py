"""Switching neurons off for good: a copy of a saved pipeline in which the rows of these neurons are zero."""
