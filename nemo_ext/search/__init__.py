"""Finding the neurons that carry the image of a memorized prompt: trials with neurons off, searches, certificates."""
