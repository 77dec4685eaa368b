"""Measurements of speed. README.md beside this file describes them and has the results."""
