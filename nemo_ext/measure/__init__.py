"""What is measured of a model, without patching it: activations and their statistics, scores and the threshold."""
