"""From a memorized prompt to the neurons that carry its image: trials with neurons off, searches, certificates."""
