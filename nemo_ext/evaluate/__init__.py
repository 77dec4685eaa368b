"""Evaluating the effect of switched-off neurons on images: generating images with and without them."""
