"""What becomes of the images: generating them, with and without neurons."""
