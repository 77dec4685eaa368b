"""Showing the results of a search: an HTML page with plots, and contact sheets of images."""
